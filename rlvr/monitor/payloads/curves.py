"""Numbers of a run against its steps, and the law of its reward and entropy."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlvr.law import LawFit, fit_law
from rlvr.monitor.downsample import downsample, spread
from rlvr.monitor.instruments import law_formula, law_verdict
from rlvr.monitor.payloads.numbers import significant, whole
from rlvr.monitor.payloads.view import View
from rlvr.monitor.table import Table

POINTS = 600
LAW_POINTS = 2000
BAND_POINTS = 60


def series_payload(
    view: View,
    names: Sequence[str] | None = None,
    points: int = POINTS,
    first: float = -math.inf,
    last: float = math.inf,
    extremes: bool = True,
) -> dict[str, Any]:
    """Metrics in buckets of equally many records; the steps, tokens and seconds are those of a bucket's last record.

    names: None for all; those that were not recorded are left out.   first, last: steps between which to look.
    extremes: also the least and the largest value of each bucket.
    """
    table = view.table
    known = [name for name in (table.names if names is None else dict.fromkeys(names)) if name in table.names]
    begin, end = np.searchsorted(table.step, [math.ceil(max(first, -1e18)), math.floor(min(last, 1e18)) + 1])
    begin, end = int(begin), max(int(end), int(begin))
    found = downsample(table.columns(known)[:, begin:end], points)
    at = begin + found.last
    parts = {"mean": found.mean}
    if found.per_point > 1 and extremes:
        parts |= {"min": found.low, "max": found.high}
    rounded = {part: significant(values) for part, values in parts.items()}
    return {
        "step": table.step[at],
        "tokens": whole(table.tokens[at]),
        "seconds": np.round(table.time[at] - (view.started or 0), 3),
        "per_point": found.per_point,
        "series": {name: {part: values[row] for part, values in rounded.items()} for row, name in enumerate(known)},
    }


def rollouts(table: Table) -> np.ndarray:
    """(step, entropy, reward) of each rollout, at the first step that trains on it, [n, 3]."""
    points = np.stack([table.step.astype(float), table.column("entropy/mean"), table.column("reward/mean")], axis=1)
    made = table.column("time/rollout") > 0
    return points[made & np.isfinite(points).all(axis=1)]


def law_payload(view: View) -> dict[str, Any]:
    """The points, the fit to all of them, and what to think of it."""
    points = rollouts(view.table)
    fit = fit_law(points[:, 1].tolist(), points[:, 2].tolist())
    shown = points[spread(len(points), LAW_POINTS)]
    return {
        "points": [
            [int(step), *pair] for step, pair in zip(shown[:, 0], significant(shown[:, 1:]).tolist(), strict=True)
        ],
        "fit": asdict(fit),
        "formula": law_formula(fit) if len(points) else "",
        "verdict_text": law_verdict(fit),
        "band": significant(_band(fit, points[:, 1])),
    }


def _band(fit: LawFit, entropy: np.ndarray) -> np.ndarray:
    """(exp(H), low, middle, high) from H = 0 to the largest entropy; none if the interval is not known."""
    if not len(entropy) or not math.isfinite(fit.interval(0.0)[0]):
        return np.zeros((0, 4))
    grid = np.linspace(1, max(math.exp(entropy.max()), 1), BAND_POINTS)
    rows = [(x, low, fit.b - fit.a * x, high) for x in grid for low, high in [fit.interval(math.log(x))]]
    return np.array(rows)
