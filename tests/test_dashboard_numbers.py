"""Few numbers in the place of many: what a bucket may not lose, and what may not spoil it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rlvr.monitor.downsample import downsample, spread
from rlvr.monitor.payloads.numbers import number, significant, to_json

NUMBERS = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))
SERIES = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=NUMBERS)


@given(values=SERIES, points=st.integers(1, 50))
def test_downsample_weighted_by_counts_has_the_mean_of_the_whole(values: np.ndarray, points: int) -> None:
    found = downsample(values, points)
    finite = np.isfinite(values)
    assert found.count.sum(axis=1).tolist() == finite.sum(axis=1).tolist()
    total = np.where(found.count > 0, found.mean * found.count, 0).sum(axis=1)
    np.testing.assert_allclose(total, np.where(finite, values, 0).sum(axis=1), rtol=1e-10, atol=1e-6)


@given(values=SERIES, points=st.integers(1, 50))
def test_downsample_never_loses_an_extreme(values: np.ndarray, points: int) -> None:
    found = downsample(values, points)
    for row, low, high, mean in zip(values, found.low, found.high, found.mean, strict=True):
        finite = row[np.isfinite(row)]
        known = ~np.isnan(mean)
        assert known.any() == bool(len(finite))
        if len(finite):
            assert low[known].min() == finite.min() and high[known].max() == finite.max()
        assert (low[known] <= mean[known]).all() and (mean[known] <= high[known]).all()


@given(values=SERIES, points=st.integers(1, 50))
def test_downsample_of_what_is_not_finite_leaves_the_rest_alone(values: np.ndarray, points: int) -> None:
    """Every bucket is that of its finite values alone, and unknown exactly where it has none."""
    found = downsample(values, points)
    assert found.mean.shape[1] <= points
    for column, last in enumerate(found.last.tolist()):
        part = values[:, column * found.per_point : last + 1]
        for row in range(len(values)):
            finite = part[row][np.isfinite(part[row])]
            expected = (finite.min(), finite.max(), finite.mean()) if len(finite) else (math.nan,) * 3
            got = (found.low[row, column], found.high[row, column], found.mean[row, column])
            assert got == pytest.approx(expected, rel=1e-12, abs=1e-9, nan_ok=True)
    assert found.last[-1] == values.shape[1] - 1


def test_downsample_of_few_records_is_what_they_are() -> None:
    values = np.array([[1.0, math.nan, -math.inf, 3.0]])
    found = downsample(values, 4)
    assert found.per_point == 1 and found.last.tolist() == [0, 1, 2, 3]
    assert to_json(found.mean) == b"[[1.0,null,null,3.0]]"
    assert downsample(values, 3).per_point == 2 and downsample(np.zeros((2, 0)), 3).mean.shape == (2, 0)


def test_downsample_does_not_overflow() -> None:
    assert downsample(np.full((1, 4), 1.7e308), 1).mean.tolist() == [[1.7e308]]


@given(count=st.integers(0, 500), most=st.integers(1, 60))
def test_spread_has_both_ends_and_no_more_than_asked(count: int, most: int) -> None:
    found = spread(count, most).tolist()
    assert found == sorted(set(found)) and len(found) == min(count, most)
    assert not found or (found[0] == 0 and (most == 1 or found[-1] == count - 1))


# ---------------------------------------------------------------------------------------------------------------- JSON


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_significant_is_the_number_of_six_digits(value: float) -> None:
    got = float(significant(value))
    if not math.isfinite(value):
        assert got == value or math.isnan(value)
    else:
        assert got == pytest.approx(value, rel=5.0001e-6)
        if 1e-15 < abs(value) < 1e15:
            assert got == float(f"{got:.6g}")


def test_significant_rounds_to_the_nearest() -> None:
    assert significant([0.1234567, 1234567.0, -2.0000004, 0.0, 5e-324]).tolist() == [0.123457, 1234570, -2, 0, 5e-324]
    assert significant(1234.5, digits=2) == 1200 and number(None) is None and number(math.nan) is None


def test_to_json_is_strict() -> None:
    odd = {"nan": math.nan, "half": "a \ud83d b", "big": 10**40, 7: np.array([1.5, math.inf]), "set": {1}}
    text = to_json(odd | {"strided": np.arange(6)[::2], "arrays": [np.zeros((1, 2))], "nested": {"\ud83d": "\ud83d"}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found["nan"] is None and found["half"] == "a ? b" and found["big"] == 1e40 and found["7"] == [1.5, None]
    assert found["strided"] == [0, 2, 4] and found["arrays"] == [[[0, 0]]] and found["nested"] == {"?": "?"}
