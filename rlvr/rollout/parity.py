"""How far the engine that sampled is from the trainer that learns, on the tokens that were sampled.

Both compute the same function of the same weights, so a difference means rounding, or that they are not the same:
stale weights, another temperature, another dtype. RL on such samples degrades without an error; this makes it one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr.errors import RunError
from rlvr.types import Reduce

_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


class EngineMismatchError(RunError):
    """Engine and trainer disagree about the log-probs of the engine's own samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Statistics of delta = trainer - engine log-prob, nats, and of the ratio exp(delta), which add over ranks.

    sums: float64 [5] of count, tokens whose engine log-prob is not finite (in no other entry), |delta|,
    exp(delta) - 1 - delta, exp(delta).   maxima: float64 [3] of |delta|, exp(delta), -exp(delta); -inf without tokens.
    """

    sums: Tensor
    maxima: Tensor

    def __add__(self, other: "Mismatch") -> "Mismatch":
        return Mismatch(sums=self.sums + other.sums, maxima=torch.maximum(self.maxima, other.maxima))

    def reduced(self, reduce: Reduce) -> "Mismatch":
        """The same over all ranks."""
        return Mismatch(sums=reduce.sum(self.sums), maxima=reduce.gather(self.maxima[None]).amax(dim=0))

    @property
    def num_tokens(self) -> int:
        """Tokens with a finite engine log-prob."""
        return int(self.sums[0])

    @property
    def num_nonfinite(self) -> int:
        """Tokens whose engine log-prob is NaN or infinite."""
        return int(self.sums[1])

    @property
    def abs_logp_mean(self) -> float:
        """Mean |delta|, nats; NaN without tokens."""
        return self._mean(2)

    @property
    def abs_logp_max(self) -> float:
        """Largest |delta|, nats."""
        return float(self.maxima[0])

    def metrics(self) -> dict[str, float]:
        """Values by metric key; the KL is the k3 estimate of KL(engine || trainer), nats. Empty without tokens."""
        if not self.num_tokens:
            return {}
        return {
            "mismatch/abs_logp_mean": self.abs_logp_mean,
            "mismatch/abs_logp_max": self.abs_logp_max,
            "mismatch/kl": self._mean(3),
            "mismatch/ratio_mean": self._mean(4),
            "mismatch/ratio_min": -float(self.maxima[2]),
            "mismatch/ratio_max": float(self.maxima[1]),
        }

    def _mean(self, entry: int) -> float:
        return float(self.sums[entry] / self.sums[0])


@torch.no_grad()
def measure_mismatch(trainer_logps: Tensor, rollout_logps: Tensor) -> Mismatch:
    """Compare two [N] tensors of log-probs of the same sampled tokens, taken before any update.

    Raises: ValueError if the shapes differ.
    """
    if trainer_logps.shape != rollout_logps.shape:
        shapes = f"{tuple(trainer_logps.shape)} and {tuple(rollout_logps.shape)}"
        raise ValueError(f"trainer_logps and rollout_logps must have one shape, not {shapes}")
    finite = torch.isfinite(rollout_logps)
    delta = trainer_logps.double()[finite] - rollout_logps.double()[finite]
    ratio = delta.exp()
    count = delta.new_tensor([finite.sum(), (~finite).sum()])
    sums = torch.stack([delta.abs().sum(), (torch.expm1(delta) - delta).sum(), ratio.sum()])
    maxima = delta.new_full((3,), -torch.inf)
    if delta.numel():
        maxima = torch.stack([delta.abs().max(), ratio.max(), (-ratio).max()])
    return Mismatch(sums=torch.cat([count, sums]), maxima=maxima)


def default_tolerance(dtype: str) -> float:
    """Largest mean |delta|, nats, that rounding explains; dtype is the coarser of engine's and trainer's.

    Measured on SmolLM2-135M, 900 tokens at temperature 1: 6e-6 if both are float32, 0.027 to 0.045 if one is or both
    are bfloat16, so the bounds are 1e-4 and 0.1. A temperature of 0.9 against 1 gives 0.16. A policy one sign step of
    1e-5 ahead of the engine gives 6e-4, which float32 finds and bfloat16 cannot.
    Raises: ValueError for a dtype other than "float32", "bfloat16" and "float16".
    """
    name = "bfloat16" if dtype == "float16" else dtype
    if name not in _TOLERANCE:
        raise ValueError(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
    return _TOLERANCE[name]


def check_parity(mismatch: Mismatch, tolerance: float, step: int) -> None:
    """Stop a run whose samples come from another distribution than the one it trains.

    tolerance: largest accepted mean |delta|, nats.   step: optimizer step, for the message.
    Raises: EngineMismatchError; a NaN mean (the trainer's log-probs) raises too.
    """
    if mismatch.num_nonfinite:
        total = mismatch.num_tokens + mismatch.num_nonfinite
        raise EngineMismatchError(
            f"step {step}: {mismatch.num_nonfinite} of {total} sampled tokens have an engine log-prob that is not "
            "finite: logits overflow or weights hold NaN; set vllm_dtype: float32 and look at the gradient norm"
        )
    if not mismatch.num_tokens or mismatch.abs_logp_mean <= tolerance:
        return
    raise EngineMismatchError(
        f"step {step}: engine and trainer differ by {mismatch.abs_logp_mean:.3g} nats per sampled token on average "
        f"(largest {mismatch.abs_logp_max:.3g}, {mismatch.num_tokens} tokens, tolerance {tolerance:g}). Likely: the "
        "engine has stale weights or another checkpoint; its temperature is not the trainer's; top_p, top_k, min_p or "
        "repetition_penalty are not neutral, which only the engine's log-probs include; dropout is on; it computes in "
        "another dtype (set vllm_dtype to the trainer's). If this much is expected, raise mismatch_tolerance"
    )
