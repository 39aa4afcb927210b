"""Means over seeds with Student's intervals, and what follows from them. Nothing here knows of runs or methods."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from rlvr.law import CONFIDENCE, student_quantile


@dataclass(frozen=True, slots=True)
class Interval:
    """mean ± half over `count` seeds: the 95 % interval mean ± t(count - 1) std / sqrt(count), for seeds drawn at
    random and values that are about normal.   half: NaN with one seed.   mean: NaN with none.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sign(self) -> Literal[-1, 0, 1]:
        """Of the mean, if the interval excludes 0; else 0, also where there is no interval."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of the values that are numbers."""
    known = [value for value in values if math.isfinite(value)]
    count = len(known)
    if count < 2:
        return Interval(known[0] if known else math.nan, math.nan, count)
    half = student_quantile(CONFIDENCE, count - 1) * stdev(known) / math.sqrt(count)
    return Interval(fmean(known), half, count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Of the mean difference value - reference over the seeds that both have; by seed."""
    return interval([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; NaN with fewer than 3 points or where one does not vary."""
    try:
        return statistics.correlation(x, y) if len(x) > 2 else math.nan
    except statistics.StatisticsError:
        return math.nan


def roughness(values: Sequence[float], window: int = 21) -> float:
    """Standard deviation of values over their centered moving mean: how they scatter, without their trend.

    window: values in the mean, odd; those nearer to an end than half of it are left out. NaN with fewer than two left.
    """
    half = window // 2
    around = [fmean(values[i - half : i + half + 1]) for i in range(half, len(values) - half)]
    relative = [value / mean for value, mean in zip(values[half:], around, strict=False) if mean]
    return stdev(relative) if len(relative) > 1 else math.nan


def front(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Names of the points that no other is at least as good as in everything and better in something: Pareto's front.

    points: by name, larger is better; one with a NaN is on no front.
    """

    def beats(other: tuple[float, ...], one: tuple[float, ...]) -> bool:
        return all(a >= b for a, b in zip(other, one, strict=True)) and other != one

    known = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    return [name for name, point in known.items() if not any(beats(other, point) for other in known.values())]
