"""Long series as few points: mean, least and largest of buckets of equally many records."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Buckets:
    """per_point: records in a bucket, fewer in the last.   mean, low, high [m, b]: over the finite values of a bucket,
    NaN where it has none.   count [m, b]: of the finite values.   last [b]: index of the last record of each bucket.
    """

    per_point: int
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    last: np.ndarray


def downsample(values: np.ndarray, points: int) -> Buckets:
    """values [m, n]: m series of n records, not finite where there is nothing.   points: buckets at most, >= 1."""
    series, records = values.shape
    per_point = max(1, -(-records // points))
    buckets = -(-records // per_point)
    padded = np.full((series, buckets * per_point), np.nan)
    padded[:, :records] = values
    parts = padded.reshape(series, buckets, per_point)
    finite = np.isfinite(parts)
    count = finite.sum(axis=2)
    nothing = count == 0
    low = np.where(nothing, np.nan, np.where(finite, parts, np.inf).min(axis=2, initial=np.inf))
    high = np.where(nothing, np.nan, np.where(finite, parts, -np.inf).max(axis=2, initial=-np.inf))
    shares = np.where(finite, parts, 0) / np.maximum(count, 1)[:, :, None]  # a sum of the values could overflow
    mean = np.where(nothing, np.nan, np.clip(shares.sum(axis=2), low, high))
    last = np.minimum(np.arange(1, buckets + 1) * per_point, records) - 1
    return Buckets(per_point, mean, low, high, count, last)


def spread(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` entries, evenly spaced, the first and the last among them."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)) if count else np.zeros(0, int)
    )
