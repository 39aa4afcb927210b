"""A run that looks like a real one, written as a trainer writes it: what dashboard and report are tried on."""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from rlvr.alarm import Alert
from rlvr.monitor import Recorder
from rlvr.monitor.groups import Groups
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.instruments import CLASSES, ESTIMATORS

FEATURES = frozenset(
    [
        *("alerts", "controls", "critic", "dynamics", "evals", "histograms", "mismatch", "positions", "prompts"),
        *("routers", "thermostat", "tokens"),
    ]
)
BAND = {"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0, "patience": 20}
A, B = 0.25, 0.9  # of the law that the reward follows
UPDATES = 2  # optimizer steps per rollout
GROUP, GROUPS = 8, 16
HOSTILE = "</script><script>alert('x')</script> <!-- & \"quoted\" \u202e"
WORDS = ("So", " we", " have", " 3", " x", " =", " 12", ",", " hence", " 4", ".\n", "Wait", ", let", " me", " check")


def write_run(
    run_dir: str | Path,
    steps: int,
    *,
    seed: int = 0,
    features: Collection[str] = FEATURES,
    finish: bool = True,
) -> Path:
    """features: of FEATURES, what the run records beside entropy, reward, clipping and times.   finish: the run ends
    well; else it goes on, as far as its records say.
    """
    rng = np.random.default_rng(seed)
    recorder = Recorder(run_dir, _config(steps, features))
    if "evals" in features:
        recorder.record_eval(0, heldout(0.22), {"prompts": 500})
    for step in range(1, steps + 1):
        recorder.record_step(
            step, step_metrics(rng, step, steps, features), **step_details(rng, step, steps, features)
        )
        if "prompts" in features and step % UPDATES == 1:
            recorder.record_groups(step, groups(rng, step, steps))
        if "evals" in features and step % max(1, steps // 4) == 0:
            recorder.record_eval(step, heldout(0.22 + 0.3 * (1 - math.exp(-3 * step / steps))))
    if "tokens" in features and steps:
        for step in sorted({1, 1 + steps // 2, max(1, steps - 1)}):
            recorder.record_tokens(step, token_columns(rng, features=features))
    if finish:
        recorder.finish()
    return Path(run_dir)


def _config(steps: int, features: Collection[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"model": "tiny", "max_steps": steps, "learning_rate": 1e-6, "hub_token": "hf_abc"}
    if "controls" in features:
        config["controls"] = [{"name": "kl_cov", "fraction": 0.02, "coef": 1.0}, "clip_cov"]
    if "thermostat" in features:
        config["thermostat"] = json.dumps(BAND)
    return config | {"nested": {"beta": math.inf, "prompt": HOSTILE}}


def entropy_at(step: int, steps: int) -> float:
    """Nats: it falls into the thermostat's band."""
    return 0.4 + 0.7 * math.exp(-6 * step / steps)


def step_metrics(rng: np.random.Generator, step: int, steps: int, features: Collection[str]) -> dict[str, float]:
    """Metrics of one optimizer step; what a rollout measures stands in each step that trains on it."""
    progress, made = step / steps, step % UPDATES == 1 or UPDATES == 1
    h = entropy_at(step, steps) + rng.normal(0, 0.01)
    tokens = int(rng.integers(50_000, 70_000))
    reward = B - A * math.exp(h) + rng.normal(0, 0.02)
    rates = {f"reward/pass_at_{k}": 1 - (1 - min(max(reward, 0), 1)) ** k for k in (1, 2, 4, 8)}
    seconds = {"update": 21 + rng.normal(), "rollout": 38 + rng.normal(), "old_logps": 7.0, "verify": 2.0}
    values = {
        "policy/loss": rng.normal(0, 0.01),
        "policy/ratio": rng.normal(1, 0.002),
        "policy/kl_old": 0.002 * math.exp(0.3 * rng.normal()),
        "policy/logp": -h,
        "policy/tokens": tokens,
        "policy/skipped": 0.1,
        "entropy/mean": h,
        **{f"entropy/share_top_{p}pct": min(1.0, 0.9 * (p / 50) ** 0.5) for p in (50, 20, 10, 5, 1)},
        "covariance/mean": 0.01 * math.exp(-3 * progress),
        **{f"covariance/top_2_in_{10**i}": 0.3 * 4 ** (i - 1) * math.exp(0.1 * rng.normal()) for i in range(1, 5)},
        "clip/low": 0.001 * math.exp(0.4 * rng.normal()) * (not made),
        "clip/high": 0.002 * math.exp(0.4 * rng.normal()) * (not made),
        "optim/learning_rate": 1e-6,
        "optim/grad_norm": 0.2 * math.exp(0.2 * rng.normal()),
        "reward/mean": reward,
        "reward/std": 0.4,
        **rates,
        "reward/zero_variance_groups": 0.3 + 0.2 * progress,
        "reward/verifier_timeouts": 0.002 * (rng.random() < 0.3),
        "reward/verifier_errors": 0.0,
        "reward/unscored": 0.0,
        "rollout/tokens": UPDATES * tokens,
        "rollout/prompt_length": 71.0,
        "rollout/completion_length": 480 + 200 * progress + 10 * rng.normal(),
        "rollout/completion_length_max": 1024.0,
        "rollout/truncated": 0.02 + 0.01 * rng.random(),
        "time/update": seconds["update"],
        **{f"time/{name}": seconds[name] * made for name in ("rollout", "old_logps", "verify")},
        "time/sync_weights": 1.8 * made,
        "time/step": seconds["update"] + made * (49 + rng.random()),
        "time/rollout_tokens_per_s": UPDATES * tokens / seconds["rollout"],
        "time/update_tokens_per_s": tokens / seconds["update"],
    }
    for name, more in OPTIONAL.items():
        values |= more(rng, progress, h) if name in features else {}
    return values


def _controls(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    return {
        "kl_cov/cov": 0.01 * math.exp(-3 * progress),
        "kl_cov/selected": 0.02,
        "clip_cov/masked": 2e-4,
        "clip_cov/candidates": 0.004 * math.exp(0.2 * rng.normal()),
        "clip_cov/cov": 0.01 * math.exp(-3 * progress),
    }


def _critic(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    values = {"critic/explained_variance": 0.6 * progress, "critic/value": 0.5, "critic/earned": 0.52}
    spread = {"advantage/mean": 0.0, "advantage/p05": -0.4, "advantage/p50": 0.01, "advantage/p95": 0.6}
    return values | spread | {"critic/loss": 0.1 * math.exp(0.1 * rng.normal()), "time/critic": 0.1}


def _dynamics(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    parts = dict(zip(CLASSES, (-0.03, 0.01, 0.005, -0.01) + 0.002 * rng.normal(size=4), strict=True))
    total = sum(parts.values())
    return {
        **{f"dynamics/measured_{name}": value for name, value in parts.items()},
        **{f"dynamics/predicted_{name}": 1e-7 * value for name, value in parts.items()},
        **{f"dynamics/{name}_correlation": 0.3 - 0.05 * i + 0.02 * rng.normal() for i, name in enumerate(ESTIMATORS)},
        "dynamics/measured": total,
        "dynamics/predicted": 1e-7 * total,
        "kl_cov/effect": 1e-9 * math.exp(0.1 * rng.normal()),
    }


def _mismatch(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    gap = 0.012 * math.exp(0.2 * rng.normal())
    return {
        "mismatch/abs_logp_mean": gap,
        "mismatch/abs_logp_max": 40 * gap,
        "mismatch/kl": gap**2,
        "mismatch/ratio_mean": rng.normal(1, 0.001),
        "mismatch/ratio_min": math.exp(-40 * gap),
        "mismatch/ratio_max": math.exp(30 * gap),
    }


def _routers(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    values = {"entropy": 1 - 0.5 * progress, "soft": 0.5 - 0.4 * progress, "experts": 2.5, "dead": 0.25}
    return {f"router/{name}": value for name, value in values.items()} | {"router/load_max": 1.4 + 0.1 * rng.random()}


def _thermostat(rng: np.random.Generator, progress: float, h: float) -> dict[str, float]:
    outside = 0.0 if BAND["low"] <= h <= BAND["high"] else 1 + 100 * progress
    return {
        "thermostat/value": 5.0 * progress,
        "thermostat/position": 0.5 * progress,
        "thermostat/outside": outside,
        "entropy/outside": 0.0,
    }


OPTIONAL = {
    "controls": _controls,
    "critic": _critic,
    "dynamics": _dynamics,
    "mismatch": _mismatch,
    "routers": _routers,
    "thermostat": _thermostat,
}


def step_details(rng: np.random.Generator, step: int, steps: int, features: Collection[str]) -> dict[str, Any]:
    """What a record holds beside its metrics, as keyword arguments of Recorder.record_step."""
    details: dict[str, Any] = {}
    h = entropy_at(step, steps)
    if "histograms" in features:
        details["histograms"] = histograms(rng, h)
    if "positions" in features:
        details["entropy_by_position"] = by_position(step, steps, h)
        if "mismatch" in features:
            details["mismatch_by_position"] = by_position(step, steps, 0.012)
    if "routers" in features:
        details["routers"] = routers(rng)
    if "alerts" in features and step % max(2, steps // 3) == 0:
        message = f"entropy has collapsed: {h:.4f} nats, below 0.5 for {step} steps {HOSTILE}"
        details["alerts"] = [Alert("collapse", message), Alert("thermostat", "kl_cov.coef is at the end of its range")]
    return details


def histograms(rng: np.random.Generator, h: float, tokens: int = 2000) -> dict[str, list[int]]:
    """Counts of tokens with gamma-distributed entropies, and what may go with them."""
    drawn = {
        "entropy": rng.gamma(0.35, h / 0.35, tokens),
        "covariance": rng.standard_t(3, tokens) * 0.1,
        "advantage": rng.choice([-1.2, -0.4, 0.0, 0.8, 1.6], tokens),
        "weight": np.where(rng.random(tokens) < 0.02, 0.0, 1.0),
        "mismatch": 0.012 * rng.exponential(size=tokens),
    }
    return {
        name: np.bincount(np.searchsorted(one.edges, drawn[name], side="right"), minlength=len(one.edges) + 1).tolist()
        for name, one in HISTOGRAMS.items()
    }


def by_position(step: int, steps: int, level: float) -> dict[str, list[float]]:
    """Bins that grow in number as completions grow longer."""
    bins = 3 + 2 * (step > steps / 2)
    edges = [0.0, 16.0, 48.0, 112.0, 240.0][:bins]
    mean = (level * np.linspace(2, 0.5, bins)).tolist()
    return {"edges": edges, "mean": mean, "count": [100.0] * (bins - 1) + [0.0]}


def routers(rng: np.random.Generator) -> dict[str, Any]:
    """Of three layers, one of which has fewer experts."""
    load = [rng.dirichlet(np.ones(n)).tolist() for n in (4, 6, 6)]
    bins = {"edges": [0.0, 16.0], "tokens": [64.0, 32.0], "entropy": [0.9, 0.6], "load": [[0.5, 0.5], [0.7, 0.3]]}
    whole = {"layers": ["a", "b", "c"], "entropy": [0.9, 0.5, 0.7], "soft": [0.8, 0.1, 0.3], "load": load}
    return whole | {f"position_{name}": values for name, values in bins.items()}


def groups(rng: np.random.Generator, step: int, steps: int) -> Groups:
    """Of prompts some of which become solved, while others never do."""
    numbers = rng.choice(3 * GROUPS, GROUPS, replace=False)
    chance = np.clip(numbers / (2 * GROUPS) * (0.3 + step / steps), 0, 1) * (numbers >= 4)
    passed = rng.binomial(GROUP, chance)
    texts = [f"Problem {number}: what is {number} + {number}? {HOSTILE}" for number in numbers]
    return Groups(texts, passed.tolist(), [GROUP] * GROUPS, (passed / GROUP).tolist())


def heldout(p: float) -> dict[str, float]:
    rates = {f"heldout/pass_at_{k}": 1 - (1 - p) ** k for k in (1, 2, 4, 8)}
    return {"heldout/reward": p, "heldout/reward_ci95": 0.036} | rates


def token_columns(
    rng: np.random.Generator, sequences: int = 6, length: int = 120, features: Collection[str] = FEATURES
) -> dict[str, list[Any]]:
    """A sample of rollouts whose text is hostile to a page."""
    tokens = [[WORDS[int(i)] for i in rng.integers(0, len(WORDS), length)] for _ in range(sequences)]
    tokens[0][:3] = [HOSTILE, "bad \ud83d half", "nul \0"]
    entropy = rng.gamma(0.35, 1.0, (sequences, length))
    logps = -entropy * rng.random((sequences, length))
    columns = {
        "sequence": list(range(sequences)),
        "prompt_index": [0] * sequences,
        "prompt": [f"Solve 3x = 12. {HOSTILE}"] * sequences,
        "completion": ["".join(row) for row in tokens],
        "reward": [float(i % 2) for i in range(sequences)],
        "advantage": [1.0 - 2.0 * (i % 2) for i in range(sequences)],
        "token_ids": rng.integers(0, 50_000, (sequences, length)).tolist(),
        "tokens": tokens,
        "entropy": entropy.tolist(),
        "logps": logps.tolist(),
        "old_logps": logps.tolist(),
        "rollout_logps": (logps + 0.01 * rng.normal(size=logps.shape)).tolist()
        if "mismatch" in features
        else [None] * sequences,
        "weight": np.where(rng.random((sequences, length)) < 0.02, 0.0, 1.0).tolist(),
        "keep": [[True] * length] * sequences,
        "covariance": rng.normal(0, 0.1, (sequences, length)).tolist(),
        "predicted": rng.normal(0, 1e-7, (sequences, length)).tolist(),
        "estimator": ["discriminator"] * sequences,
    }
    if "controls" in features:
        columns |= {f"control:{name}": (rng.random(logps.shape) < 0.05).tolist() for name in ("clip_cov", "kl_cov")}
    if "critic" in features:
        columns |= {"advantages": rng.normal(size=logps.shape).tolist(), "values": rng.random(logps.shape).tolist()}
    return columns
