"""What the runs of an experiment show: numbers per run, means over seeds, and entropy against the step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from rlvr.law import fit_law
from rlvr.monitor.records import read_evals, read_steps, rollout_points, series

from .drawing import COLORS, GRID, render

SHARES = (0.10, 0.25, 0.50, 1.0)
WINDOW = 5  # rollouts that are averaged: which problems a rollout draws moves its reward by about .05

TOP = 1.0  # nats, where the picture ends: a policy that explodes goes up to log 108


@dataclass(frozen=True, slots=True)
class Band:
    """Entropy, nats."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Result:
    """Numbers of one run.

    entropy [4]: nats at 10, 25, 50 and 100 % of the run, mean over the steps of the last 5 rollouts.   inside: share
    of the rollouts in the second half whose entropy lies in the band.   reward: mean of the last 10 rollouts.
    pass_at: by k, held out, after training.   r2, r2_linear: of the law R = -a exp(H) + b and of a line in H, both
    fitted to means over 5 rollouts.   explained: share of the variance of what tokens earned that the critic's values
    explain, mean over the rollouts of the second half; None without a critic.
    """

    entropy: tuple[float, ...]
    inside: float
    reward: float
    pass_at: dict[str, float]
    r2: float
    r2_linear: float
    explained: float | None


def result(run_dir: Path, updates: int, band: Band) -> Result:
    """Read out a run with `updates` optimizer steps per rollout."""
    records = read_steps(run_dir)
    entropy = entropy_of_rollouts(run_dir, updates)
    ends = [round(share * len(entropy)) for share in SHARES]
    rewards = [reward for _, reward in rollout_points(records)]
    law = fit_law(_window_means(entropy), _window_means(rewards))
    late = entropy[len(entropy) // 2 :]
    held_out = read_evals(run_dir)[-1]["metrics"]
    _, explained = series(records, "critic/explained_variance")
    return Result(
        entropy=tuple(fmean(entropy[max(0, end - WINDOW) : end]) for end in ends),
        inside=float(np.mean([band.low <= h <= band.high for h in late])),
        reward=fmean(rewards[-10:]),
        pass_at={str(k): held_out[f"heldout/pass_at_{k}"] for k in (1, 8, 16)},
        r2=law.r2,
        r2_linear=law.r2_linear,
        explained=fmean(explained[len(explained) // 2 :]) if explained else None,
    )


def entropy_of_rollouts(run_dir: Path, updates: int) -> list[float]:
    """Mean entropy over the optimizer steps of each rollout, nats."""
    _, values = series(read_steps(run_dir), "entropy/mean")
    return [fmean(values[start : start + updates]) for start in range(0, len(values), updates)]


def _window_means(values: Sequence[float]) -> list[float]:
    return [fmean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [asdict(one) for one in results]


def table(by_method: dict[str, list[Result]]) -> str:
    """Markdown, a line per method: means over seeds, with their standard deviation where it matters."""
    lines = [
        "| method | seeds | H at 10 / 25 / 50 / 100 % | in band | reward | pass@1 | pass@8 | pass@16 | R² | critic |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, results in by_method.items():
        entropy = " ".join(f"{fmean(r.entropy[i] for r in results):.3f}" for i in range(len(SHARES)))
        cells = [
            method,
            str(len(results)),
            f"{entropy} ± {_spread([r.entropy[-1] for r in results])}",
            f"{fmean(r.inside for r in results):.2f}",
            f"{fmean(r.reward for r in results):.3f} ± {_spread([r.reward for r in results])}",
            *(f"{fmean(r.pass_at[k] for r in results):.3f}" for k in ("1", "8", "16")),
            f"{fmean(r.r2 for r in results):.3f}",
            ", ".join(f"{r.explained:.2f}" for r in results if r.explained is not None),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{stdev(values):.3f}" if len(values) > 1 else "?"


def picture(curves: dict[str, list[list[float]]], updates: int, band: Band) -> bytes:
    """Entropy against the optimizer step, PNG: the mean over seeds with their range, and the band.

    curves: entropy of each rollout, of each seed, by method.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhspan(band.low, band.high, color=GRID, alpha=0.6, label=f"band {band.low:g} to {band.high:g}")
        for number, (method, seeds) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            entropy = np.array(seeds)
            steps = updates * (np.arange(entropy.shape[1]) + 0.5)
            axes.plot(steps, entropy.mean(0), "-" if number < len(COLORS) else "--", color=color, label=method)
            axes.fill_between(steps, entropy.min(0), entropy.max(0), color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("entropy (nats)")
        axes.set_ylim(0, TOP)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return render(draw)
