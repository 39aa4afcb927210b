"""The law R = -a exp(H) + b between the entropy of a run and its reward: the fit, and whether to believe it.

Standard library alone, so that a report of a run needs no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

Verdict = Literal["not yet", "does not hold here", "holds"]

CONFIDENCE = 0.95
MIN_POINTS = 12
MIN_SPREAD = 0.05  # range of exp(H), as a share of its mean: below it, slope and ceiling are extrapolation
SIGNIFICANCE = 0.01  # of the departure from the law
MATERIAL = 0.02  # share of the reward's variance that a departure must explain: long runs make any significant


@dataclass(frozen=True, slots=True)
class LawFit:
    """R = -a exp(H) + b, fitted to the steps of one run.

    verdict, reason: see `fit_law`.
    a, b: in units of reward.   ceiling: b - a, the reward at H = 0; ceiling_low, ceiling_high: its 95 % confidence
    interval, *if* the law holds that far.
    r2: share of the reward's variance that the law explains; r2_linear: what a straight line in H explains. Where both
    are alike, the data do not tell an exponential from a line, and the two extrapolate to different ceilings.
    rmse: of the reward around the law.   autocorrelation: of the residuals, from one step to the next; intervals and
    tests count num_points (1 - autocorrelation) / (1 + autocorrelation) of them as independent.
    center: mean of exp(H), where the line is known best; error, slope_error: half widths of the 95 % intervals of the
    line there and of a.
    Numbers that the data cannot give are NaN.
    """

    verdict: Verdict
    reason: str
    num_points: int
    a: float
    b: float
    ceiling: float
    ceiling_low: float
    ceiling_high: float
    r2: float
    r2_linear: float
    rmse: float
    autocorrelation: float
    center: float
    error: float
    slope_error: float

    def interval(self, entropy: float) -> tuple[float, float]:
        """95 % confidence interval of the mean reward at this entropy (nats), *if* the law holds there.

        At H = 0 it is that of the ceiling.
        """
        x = math.exp(entropy)
        middle, half = self.b - self.a * x, _half_width(self.error, self.slope_error, x - self.center)
        return middle - half, middle + half


def _half_width(error: float, slope_error: float, distance: float) -> float:
    """Of the interval of a line, `distance` away from the mean of its points."""
    return math.hypot(error, slope_error * distance)


def fit_law(entropy: Iterable[float], reward: Iterable[float]) -> LawFit:
    """Ordinary least squares of R on x = -exp(H), the verdict on it, and the reason in a few words.

    entropy [n], nats, and reward [n]: of the same steps, in the order of training.
    "not yet": fewer than 12 points, exp(H) within 5 % of itself, a constant reward, or a slope that may be 0 (its 95 %
    interval holds it).   "does not hold here": a significantly negative, or the residuals follow the step number or
    the curvature x^2 (F-test at 1 %, and at least 2 % of the reward's variance).   "holds": neither; the data do not
    refute it, and may not refute other laws (see `LawFit.r2_linear`).
    Both tests use the effective number of points of autocorrelated residuals, an approximation for AR(1) noise.
    Raises: ValueError if lengths differ or a value is not finite.
    Ref: Cui et al. 2025, arXiv 2505.22617, Eq. 6.
    Differs: no iterative fit is needed, the law is linear in exp(H); the paper gives neither interval nor test.
    """
    h, r = [float(v) for v in entropy], [float(v) for v in reward]
    _check(h, r)
    x = [-math.exp(v) for v in h]
    n = len(x)
    if n == 0:
        return LawFit("not yet", "there are no points", 0, *[math.nan] * 12)
    moved, sxx = min(x) < max(x), _products(x, x)
    a = _products(x, r) / sxx if moved else 0.0
    b = fmean(r) - a * fmean(x)
    residuals = [ri - (a * xi + b) for ri, xi in zip(r, x, strict=True)]
    rss = _dot(residuals, residuals)
    independent = effective_points(residuals)
    noise = rss / max(n - 2, 1) * n / independent
    slope_variance = noise / sxx if moved and n > 2 else math.nan
    t = student_quantile(CONFIDENCE, max(int(independent) - 2, 1))
    error = t * math.sqrt(noise / n) if n > 2 else math.nan
    slope_half = t * math.sqrt(slope_variance)
    half = _half_width(error, slope_half, 1 + fmean(x))
    verdict, reason = _judge(x, r, residuals, (a - slope_half, a + slope_half))
    return LawFit(
        verdict=verdict,
        reason=reason,
        num_points=n,
        a=a,
        b=b,
        ceiling=b - a,
        ceiling_low=b - a - half,
        ceiling_high=b - a + half,
        r2=_r2(x, r),
        r2_linear=_r2(h, r),
        rmse=math.sqrt(rss / n),
        autocorrelation=_autocorrelation(residuals),
        center=-fmean(x),
        error=error,
        slope_error=slope_half,
    )


def _check(entropy: Sequence[float], reward: Sequence[float]) -> None:
    if len(entropy) != len(reward):
        raise ValueError(f"entropy has {len(entropy)} values, reward has {len(reward)}: give one of each per step")
    for name, values in (("entropy", entropy), ("reward", reward)):
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"{name}[{i}]={value}: must be finite; leave out steps without a measurement")


def _judge(
    x: Sequence[float], r: Sequence[float], residuals: Sequence[float], slope: tuple[float, float]
) -> tuple[Verdict, str]:
    if len(x) < MIN_POINTS:
        return "not yet", f"{len(x)} points, at least {MIN_POINTS} are needed"
    spread = (max(x) - min(x)) / -fmean(x)
    if spread < MIN_SPREAD:
        return "not yet", f"exp(H) has moved by {spread:.1%}, at least {MIN_SPREAD:.0%} is needed"
    if min(r) == max(r):
        return "not yet", "the reward has not moved"
    share, p = departure(x, r, residuals)
    if p < SIGNIFICANCE and share > MATERIAL:
        return "does not hold here", f"step number and curvature explain {share:.0%} more of the reward (p = {p:.1g})"
    if slope[1] < 0:
        return "does not hold here", f"reward rises with entropy: a is at most {slope[1]:.3g}"
    if slope[0] <= 0:
        return "not yet", f"a may be 0: it lies in [{slope[0]:.3g}, {slope[1]:.3g}]"
    return "holds", f"a lies in [{slope[0]:.3g}, {slope[1]:.3g}] and the residuals show no trend"


def departure(x: Sequence[float], r: Sequence[float], residuals: Sequence[float]) -> tuple[float, float]:
    """(share of the reward's variance that step number and x^2 explain beyond the law, p-value of that).

    F-test of two added terms, whose tail is P(F(2, d) > f) = (1 + 2 f / d)^(-d/2) = (RSS with / RSS without)^(d/2).
    """
    ones, steps = [1.0] * len(x), [float(i) for i in range(len(x))]
    left = _project_out(residuals, [ones, list(x), steps, [v * v for v in x]])
    before, after = _dot(residuals, residuals), _dot(left, left)
    if before == 0:
        return 0.0, 1.0
    freedom = max(effective_points(left) - 4, 1.0)
    return (before - after) / _products(r, r), (after / before) ** (freedom / 2)


def effective_points(residuals: Sequence[float]) -> float:
    """n (1 - c) / (1 + c): independent points worth as much as n residuals with autocorrelation c, if c > 0."""
    c = max(_autocorrelation(residuals), 0.0)
    return len(residuals) * (1 - c) / (1 + c)


def _autocorrelation(residuals: Sequence[float]) -> float:
    total = _dot(residuals, residuals)
    return _dot(residuals[:-1], residuals[1:]) / total if total else 0.0


def student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence, for T of Student's distribution with `freedom` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while student_within(high, freedom) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_within(middle, freedom) < confidence else (low, middle)
    return high


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t), the finite series for whole degrees of freedom. Ref: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (i - 1) / i
    return (theta + sine * total) * 2 / math.pi if odd else sine * total


def _dot(u: Sequence[float], v: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def _products(u: Sequence[float], v: Sequence[float]) -> float:
    """Sum of (u - mean u)(v - mean v)."""
    mean_u, mean_v = fmean(u), fmean(v)
    return math.fsum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))


def _r2(u: Sequence[float], r: Sequence[float]) -> float:
    if min(u) == max(u) or min(r) == max(r):
        return math.nan
    return min(_products(u, r) ** 2 / (_products(u, u) * _products(r, r)), 1.0)


def _project_out(values: Sequence[float], columns: Sequence[Sequence[float]]) -> list[float]:
    """What a least-squares fit on the columns leaves of the values. Modified Gram-Schmidt."""
    basis: list[list[float]] = []
    for column in columns:
        rest = _without(column, basis)
        length = math.sqrt(_dot(rest, rest))
        if length > 1e-9 * math.sqrt(_dot(column, column)):  # else it says what the others say
            basis.append([v / length for v in rest])
    return _without(values, basis)


def _without(values: Sequence[float], basis: Sequence[Sequence[float]]) -> list[float]:
    rest = list(values)
    for unit in basis:
        along = _dot(rest, unit)
        rest = [v - along * u for v, u in zip(rest, unit, strict=True)]
    return rest
