"""Checkpoints compared: what was measured of each, in which order to prefer them, and the table that says so."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlvr.diagnostics import pass_at_k
from rlvr.trainers.checkpoint_sampling import Samples

Verdict = Literal["inside", "too low", "too high", "not finite"]
REASONS: dict[Verdict, str] = {
    "inside": "entropy is in the band: room to explore is left",
    "too low": "will collapse early, little is left to explore: take one of fewer epochs",
    "too high": "not settled on a way to answer yet: fine-tune for longer",
    "not finite": "the checkpoint's logits hold NaN: it is broken",
}
WIDTH = 100  # columns of a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was found of one checkpoint. *_ci95 is the half width of a 95 % interval over prompts.

    entropy: nats per token.   length: mean tokens per completion.   truncated, unjudged: shares of all completions.
    pass_at_k: by k; the mean over prompts of the unbiased estimator, NaN where no prompt has k judged completions.
    """

    checkpoint: str
    entropy: float
    entropy_ci95: float
    length: float
    truncated: float
    unjudged: float
    pass_at_k: dict[int, float]
    pass_at_1_ci95: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """A measurement with its verdict, in the order of preference."""

    verdict: Verdict
    measured: Measurement


def ratio_ci95(totals: Tensor, counts: Tensor) -> tuple[float, float]:
    """R = sum totals / sum counts over P independent prompts, and the half width of its 95 % interval.

    1.96 std(totals - R counts) / (mean(counts) sqrt(P)), the delta method; with equal counts that of a plain mean.
    totals, counts: [P]. NaN where there is nothing to measure: no counts, or an interval of a single prompt.
    """
    totals, counts = totals.double(), counts.double()
    prompts = counts.numel()
    ratio = totals.sum() / counts.sum()
    variance = (totals - ratio * counts).square().sum() / (prompts - 1) if prompts > 1 else torch.tensor(math.nan)
    return float(ratio), float(1.96 * variance.sqrt() / (counts.mean() * math.sqrt(prompts)))


def measure(
    checkpoint: str, samples: Samples, rewards: Sequence[float | None], *, per_prompt: int, pass_reward: float
) -> Measurement:
    """Reduce the samples of a checkpoint and their rewards [N], which are None where the verifier failed.

    Entropy is a mean over tokens. An unjudged completion is neither right nor wrong: it is no sample of its prompt.
    """
    judged = torch.tensor([reward is not None for reward in rewards]).view(-1, per_prompt).sum(1)
    right = torch.tensor([reward is not None and reward >= pass_reward for reward in rewards])
    correct = right.view(-1, per_prompt).sum(1)
    tokens = samples.length.view(-1, per_prompt).sum(1)
    entropy, entropy_ci95 = ratio_ci95(samples.entropy.view(-1, per_prompt).sum(1), tokens)
    passed = {}
    for k in powers_of_two(per_prompt):
        enough = judged >= k
        passed[k] = float(pass_at_k(judged[enough], correct[enough], k).mean())
    share = correct[judged > 0] / judged[judged > 0]
    return Measurement(
        checkpoint=checkpoint,
        entropy=entropy,
        entropy_ci95=entropy_ci95,
        length=float(samples.length.double().mean()),
        truncated=float(samples.truncated.double().mean()),
        unjudged=1 - int(judged.sum()) / len(rewards),
        pass_at_k=passed,
        pass_at_1_ci95=ratio_ci95(share, torch.ones_like(share))[1],
    )


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to limit."""
    return [1 << i for i in range(limit.bit_length())]


def rank(measured: Iterable[Measurement], band: Sequence[float]) -> list[Ranked]:
    """Best first: those inside the band by pass@k of the largest k, then by nearness to the band's middle; after them
    the others by their distance to the band. A broken checkpoint is last, and equals keep their order.
    """
    low, high = band

    def key(one: Measurement) -> tuple[float, float, float]:
        if not math.isfinite(one.entropy):
            return math.inf, 0.0, 0.0
        passed = one.pass_at_k[max(one.pass_at_k)]
        outside = max(low - one.entropy, one.entropy - high, 0.0)
        if outside:
            return outside, 0.0, 0.0
        return 0.0, math.inf if math.isnan(passed) else -passed, abs(one.entropy - (low + high) / 2)

    return [Ranked(verdict(one.entropy, band), one) for one in sorted(measured, key=key)]


def verdict(entropy: float, band: Sequence[float]) -> Verdict:
    """Where an entropy lies; the bounds themselves are inside."""
    if not math.isfinite(entropy):
        return "not finite"
    return "too low" if entropy < band[0] else "too high" if entropy > band[1] else "inside"


def format_ranking(ranked: Sequence[Ranked], band: Sequence[float]) -> str:
    """Plain text for a terminal of 100 columns: the table, what its verdicts mean, and which checkpoint to take."""
    measured = [one.measured for one in ranked]
    names = _short_names([one.checkpoint for one in measured])
    columns = [
        ["", *(str(i + 1) for i in range(len(ranked)))],
        ["checkpoint", *names],
        ["entropy", *(f"{one.entropy:.3f} ± {one.entropy_ci95:.3f}" for one in measured)],
        ["verdict", *(one.verdict for one in ranked)],
        ["tokens", *(f"{one.length:.1f}" for one in measured)],
        ["cut", *(f"{100 * one.truncated:.0f} %" for one in measured)],
        ["pass@1", *(f"{one.pass_at_k[1]:.2f} ± {one.pass_at_1_ci95:.2f}" for one in measured)],
        *([f"@{k}", *(f"{one.pass_at_k[k]:.2f}" for one in measured)] for k in measured[0].pass_at_k if k > 1),
    ]
    widths = [max(map(len, column)) for column in columns]
    widths[1] = min(widths[1], max(10, WIDTH - sum(widths) - 2 * (len(widths) - 1) + widths[1]))
    columns[1] = [name if len(name) <= widths[1] else "…" + name[1 - widths[1] :] for name in columns[1]]
    left = {1, 3}  # text; numbers end at the right
    rows = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    reasons = [f"{name:<10}  {why}" for name, why in REASONS.items() if name in {one.verdict for one in ranked}]
    return "\n".join([*rows, "", *reasons, *_unjudged(names, measured), "", _advice(names[0], ranked[0], band)])


def _short_names(paths: Sequence[str]) -> list[str]:
    """Paths without what all of them share."""
    whole = [Path(path).absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def _unjudged(names: Sequence[str], measured: Sequence[Measurement]) -> list[str]:
    return [
        f"{name}: {100 * one.unjudged:.2g} % of completions could not be judged; pass@k leaves them out"
        for name, one in zip(names, measured, strict=True)
        if one.unjudged
    ]


def _advice(name: str, best: Ranked, band: Sequence[float]) -> str:
    span = f"{band[0]:g} to {band[1]:g} nats"
    if best.verdict == "inside":
        k = max(best.measured.pass_at_k)
        return f"Start from {name}: none of those inside {span} has a higher pass@{k}."
    low, high = best.measured.entropy - best.measured.entropy_ci95, best.measured.entropy + best.measured.entropy_ci95
    unsure = (
        "; its interval reaches the band, so more --prompts may decide" if low <= band[1] and high >= band[0] else ""
    )
    return f"No checkpoint is inside {span}. {name} is the nearest{unsure}."
