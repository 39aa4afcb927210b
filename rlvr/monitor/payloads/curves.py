"""Numbers of a run against its steps, and the law of its reward and entropy."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlvr.law import LawFit, fit_law
from rlvr.monitor.downsample import Buckets, downsample, spread
from rlvr.monitor.instruments import law_formula, law_verdict
from rlvr.monitor.payloads.clock import seconds_trained
from rlvr.monitor.payloads.numbers import number, significant, whole
from rlvr.monitor.payloads.view import View
from rlvr.monitor.table import Table

POINTS = 600
LAW_POINTS = 2000
AGREEMENT_POINTS = 2000
FARTHEST = 1e18  # a step that no run reaches
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
    extremes: also the least and the largest value of each bucket. `first`, `last`, `least` and `most` of a metric are
    those of all its finite values between these steps. `seconds` are those of `seconds_trained`.
    """
    table = view.table
    known = [name for name in (table.names if names is None else dict.fromkeys(names)) if name in table.names]
    first, last = (min(max(step, -FARTHEST), FARTHEST) for step in (first, last))
    begin, end = np.searchsorted(table.step, [math.ceil(first), math.floor(last) + 1])
    begin, end = int(begin), max(int(end), int(begin))
    values = table.columns(known)[:, begin:end]
    found = downsample(values, points)
    at = begin + found.last
    parts = {"mean": found.mean}
    if found.per_point > 1 and extremes:
        parts |= {"min": found.low, "max": found.high}
    rounded = {part: significant(values) for part, values in (parts | _ends(values, found)).items()}
    return {
        "step": table.step[at],
        "tokens": whole(table.tokens[at]),
        "seconds": np.round(seconds_trained(view)[at], 3),
        "per_point": found.per_point,
        "series": {name: {part: rows[row] for part, rows in rounded.items()} for row, name in enumerate(known)},
    }


def _ends(values: np.ndarray, found: Buckets) -> dict[str, np.ndarray]:
    """First, last, least and largest finite value of each series, [m] each, not finite where it has none.

    values [m, n].   found: their buckets.
    """
    if not values.shape[1]:
        return dict.fromkeys(("first", "last", "least", "most"), np.full(len(values), np.nan))
    rows, finite = np.arange(len(values)), np.isfinite(values)
    return {
        "first": values[rows, finite.argmax(axis=1)],
        "last": values[rows, -1 - finite[:, ::-1].argmax(axis=1)],
        "least": np.fmin.reduce(found.low, axis=1),
        "most": np.fmax.reduce(found.high, axis=1),
    }


def agreement_payload(view: View) -> dict[str, Any]:
    """The entropy change that each record measured against the one predicted, and the least-squares line of all."""
    table = view.table
    x, y = (table.column(f"dynamics/{name}") for name in ("predicted", "measured"))
    known = np.isfinite(x) & np.isfinite(y)
    x, y, step = x[known], y[known], table.step[known]
    shown = spread(len(x), AGREEMENT_POINTS)
    pairs = significant(np.stack([x[shown], y[shown]], axis=1)).tolist()
    slope, intercept, r2 = _line(x, y)
    return {
        "points": [[*pair, at] for pair, at in zip(pairs, step[shown].tolist(), strict=True)],
        "slope": number(slope),
        "intercept": number(intercept),
        "r2": number(r2),
        "count": len(x),
    }


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and R2 of y on x [n], NaN for fewer than 3 points, or if either does not vary."""
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return math.nan, math.nan, math.nan
    scale_x, scale_y = np.abs(x).max(), np.abs(y).max()  # their squares could underflow
    u, v = x / scale_x, y / scale_y
    du, dv = u - u.mean(), v - v.mean()
    uv, uu, vv = float(du @ dv), float(du @ du), float(dv @ dv)
    slope = uv / uu
    return slope * scale_y / scale_x, float(v.mean() - slope * u.mean()) * scale_y, uv**2 / (uu * vv)


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
