"""What the laws of entropy controls run over: one row of CASES per control, and a batch of tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr.controls import CONTROLS, Control
from rlvr.types import Tokens, token_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One control: settings in which it does something on `batch`, a neutral one, and what it promises."""

    active: Control
    neutral: Control
    draws: bool  # its result depends on the tokens' keys
    refused: dict[str, Any]  # a bad value of each hyper-parameter that has one
    entropy: int  # +1: more entropy is left after an update with it than without, -1: less, 0: no promise
    updates: int = 1  # per rollout
    learning_rate: float = 100.0  # of those updates, on the tabular policy
    engine_agrees: bool = False  # `neutral` is so only where rollout_logps are old_logps


CASES: dict[str, Case] = {
    "adaptive_entropy": Case(
        active=CONTROLS["adaptive_entropy"](coef=0.004, enabled=True),
        neutral=CONTROLS["adaptive_entropy"](coef=0.004, enabled=False),
        draws=False,
        refused={"coef": 1.0, "target": -0.2, "delta": float("inf"), "min_coef": float("nan"), "max_coef": -1.0},
        entropy=+1,
    ),
    "clip_b": Case(
        active=CONTROLS["clip_b"](mu=0.5),
        neutral=CONTROLS["clip_b"](mu=1e6),
        draws=False,
        refused={"mu": -1.0, "scope": "batch"},
        entropy=+1,
    ),
    "clip_cov": Case(
        active=CONTROLS["clip_cov"](fraction=0.05, low=0.3, high=20.0),
        neutral=CONTROLS["clip_cov"](low=1e6, high=2e6),
        draws=True,
        refused={"fraction": -0.1, "low": 20.0, "high": float("nan"), "scope": "batch"},
        entropy=+1,
    ),
    "clip_v": Case(
        active=CONTROLS["clip_v"](mu=0.5, max_fraction=0.1),
        neutral=CONTROLS["clip_v"](mu=1e6),
        draws=False,
        refused={"mu": float("inf"), "max_fraction": 1.5, "scope": "batch"},
        entropy=+1,
    ),
    "entropy_advantage": Case(
        active=CONTROLS["entropy_advantage"](alpha=0.4, kappa=2.0),
        neutral=CONTROLS["entropy_advantage"](alpha=0.0),
        draws=False,
        refused={"alpha": -0.1, "kappa": 0.5, "scope": "batch"},
        entropy=0,  # its sign depends on the size of the step, see test_controls_entropy.py
    ),
    "entropy_bonus": Case(
        active=CONTROLS["entropy_bonus"](coef=0.01),
        neutral=CONTROLS["entropy_bonus"](coef=0.0),
        draws=False,
        refused={"coef": -0.01},
        entropy=+1,
    ),
    "geometric_gate": Case(
        active=CONTROLS["geometric_gate"](),
        neutral=CONTROLS["geometric_gate"](),
        draws=False,
        refused={"low": -0.1, "high": 0.9},
        entropy=0,
        engine_agrees=True,
    ),
    "high_entropy": Case(
        active=CONTROLS["high_entropy"](fraction=0.2),
        neutral=CONTROLS["high_entropy"](fraction=1.0),
        draws=False,
        refused={"fraction": 1.1, "scope": "batch"},
        entropy=+1,
        updates=4,
    ),
    "icepop": Case(
        active=CONTROLS["icepop"](low=0.99, high=1.02),
        neutral=CONTROLS["icepop"](),
        draws=False,
        refused={"low": 6.0, "high": float("nan")},
        entropy=0,
        engine_agrees=True,
    ),
    "kl_cov": Case(
        active=CONTROLS["kl_cov"](fraction=0.05, coef=1.0),
        neutral=CONTROLS["kl_cov"](coef=0.0),
        draws=False,
        refused={"fraction": 1.5, "coef": -1.0, "scope": "batch"},
        entropy=+1,
        updates=4,
    ),
    "mis": Case(
        active=CONTROLS["mis"](high=1.02),
        neutral=CONTROLS["mis"](),
        draws=False,
        refused={"high": 0.0},
        entropy=0,
        engine_agrees=True,
    ),
    "off_policy_mask": Case(
        active=CONTROLS["off_policy_mask"](delta=0.01),
        neutral=CONTROLS["off_policy_mask"](delta=float("inf")),
        draws=False,
        refused={"delta": -0.5},
        entropy=0,
    ),
    "reference_kl": Case(
        active=CONTROLS["reference_kl"](coef=0.1),
        neutral=CONTROLS["reference_kl"](coef=0.0),
        draws=False,
        refused={"coef": float("inf")},
        entropy=0,  # toward the reference's from both sides, see test_controls_entropy.py
    ),
    "steer": Case(
        active=CONTROLS["steer"](min_weight=0.7),
        neutral=CONTROLS["steer"](min_weight=1.0),
        draws=False,
        refused={
            "form": "exact",
            "mapping": "cubic",
            "min_weight": 0.0,
            "max_weight": 1.2,
            "floor": -0.02,
            "scope": "batch",
        },
        entropy=+1,
    ),
    "tis": Case(
        active=CONTROLS["tis"](high=1.005),
        neutral=CONTROLS["tis"](),
        draws=False,
        refused={"high": -1.0, "level": "batch"},
        entropy=0,
        engine_agrees=True,
    ),
    "token_budget": Case(
        active=CONTROLS["token_budget"](tokens=100),
        neutral=CONTROLS["token_budget"](tokens=10**6),
        draws=True,
        refused={"tokens": 0},
        entropy=0,  # fewer tokens, not other ones: see test_budget.py
    ),
}


def batch(seed: int = 0, dtype: torch.dtype = torch.float64, key_seed: int = 0) -> Tokens:
    """24 sequences of 0 to 20 tokens, old and current policy apart, every optional field known."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 21, (24,), generator=generator)
    lengths[0] = 20
    sequence = torch.arange(24).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    n = len(sequence)

    def draw() -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -2 * draw().abs()
    return Tokens(
        logps=(old + 0.2 * draw()).to(dtype).requires_grad_(),
        old_logps=old.to(dtype),
        advantages=torch.randn(24, generator=generator, dtype=torch.float64)[sequence].to(dtype),
        sequence=sequence,
        num_sequences=24,
        position=position,
        key=token_keys(key_seed, 0, sequence, position),
        entropy=draw().abs().to(dtype).requires_grad_(),
        rollout_logps=(old + 0.01 * draw()).to(dtype),
        ref_logps=(old + 0.2 * draw()).to(dtype),
        mean_discriminator=(0.1 * draw()).to(dtype),
    )
