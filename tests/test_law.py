"""The law R = -a exp(H) + b: the fit, its intervals, and a verdict that is right about data of known origin."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_vectors import VECTORS

from rlvr.law import LawFit, departure, effective_points, fit_law, student_quantile, student_within

SEEDS = 100


def cases() -> Any:
    return pytest.mark.parametrize(
        "case", [v for v in VECTORS.values() if v["method"] == "r_fit"], ids=lambda v: v["id"]
    )


def noise(number: int, size: float, rng: random.Random, autocorrelation: float = 0.0) -> list[float]:
    """A stationary AR(1) series of this standard deviation."""
    values = [rng.gauss(0, size)]
    for _ in range(number - 1):
        shock = rng.gauss(0, size) * math.sqrt(1 - autocorrelation**2)
        values.append(autocorrelation * values[-1] + shock)
    return values


def lawful(number: int, seed: int, size: float = 0.02, autocorrelation: float = 0.0) -> LawFit:
    """A run whose entropy decays from 1.15 to .1 and whose reward obeys a = .3, b = .7: ceiling .4."""
    rng = random.Random(seed)
    h = [0.05 + 1.1 * math.exp(-3 * i / number) for i in range(number)]
    r = [0.7 - 0.3 * math.exp(v) + e for v, e in zip(h, noise(number, size, rng, autocorrelation), strict=True)]
    return fit_law(h, r)


def turning(number: int, seed: int, size: float = 0.02) -> LawFit:
    """A run whose entropy falls to .3 and rises again while the reward keeps growing."""
    rng = random.Random(seed)
    h = [0.3 + 1.6 * abs(i / number - 0.5) for i in range(number)]
    r = [0.1 + 0.5 * (1 - math.exp(-3 * i / number)) + rng.gauss(0, size) for i in range(number)]
    return fit_law(h, r)


# ------------------------------------------------------------------------------------------------------------- the fit


@cases()
def test_fit(case: dict[str, Any]) -> None:
    got, expected = fit_law(case["inputs"]["H"], case["inputs"]["R"]), case["expected"]
    assert (got.a, got.b, got.ceiling) == pytest.approx((expected["a"], expected["b"], expected["ceiling"]), abs=1e-10)


def test_fit_of_exact_data_leaves_nothing() -> None:
    h = [1.0 - i / 20 for i in range(20)]
    got = fit_law(h, [0.9 - 0.35 * math.exp(v) for v in h])
    assert (got.a, got.b, got.r2) == pytest.approx((0.35, 0.9, 1.0), abs=1e-10)
    assert got.rmse == pytest.approx(0, abs=1e-10)
    assert got.ceiling_low == pytest.approx(0.55, abs=1e-10)
    assert got.ceiling_high == pytest.approx(0.55, abs=1e-10)
    assert got.verdict == "holds"


def test_fit_is_least_squares() -> None:
    got = fit_law(h := [0.9, 0.7, 0.8, 0.2, 0.4], r := [0.1, 0.3, 0.1, 0.5, 0.3])
    x = torch.tensor([[-math.exp(v), 1.0] for v in h], dtype=torch.float64)
    a, b = torch.linalg.lstsq(x, torch.tensor(r, dtype=torch.float64)).solution.tolist()
    assert (got.a, got.b) == pytest.approx((a, b), abs=1e-10)
    left = [v - (b - a * math.exp(e)) for v, e in zip(r, h, strict=True)]
    assert got.rmse == pytest.approx(math.sqrt(sum(v * v for v in left) / 5), abs=1e-10)
    assert got.autocorrelation == pytest.approx(
        sum(u * v for u, v in pairwise(left)) / sum(v * v for v in left), abs=1e-10
    )


def test_fit_takes_tensors() -> None:
    h, r = [0.6, 0.4, 0.25], [0.1, 0.2, 0.35]
    assert fit_law(torch.tensor(h, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)) == fit_law(h, r)


def test_r2_linear_is_that_of_a_straight_line() -> None:
    h = [0.1 * i for i in range(15)]
    got = fit_law(h, [1 - 0.5 * v for v in h])
    assert got.r2_linear == pytest.approx(1, abs=1e-10)
    assert got.r2 < 0.97


# ------------------------------------------------------------------------------------------------------- the intervals


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.7062047362),
        (2, 4.3026527297),
        (3, 3.1824463053),
        (10, 2.2281388520),
        (30, 2.0422724563),
        (120, 1.9799304051),
    ],
)
def test_student_quantile(freedom: int, quantile: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-9)


def test_student_of_one_and_two_degrees_has_closed_forms() -> None:
    for t in (0.1, 1.0, 7.0):
        assert student_within(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-10)
        assert student_within(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-10)


def test_student_tends_to_the_normal() -> None:
    assert student_within(1.5, 10**6) == pytest.approx(math.erf(1.5 / math.sqrt(2)), abs=1e-6)


def test_ceiling_interval_by_hand() -> None:
    """x = -2, -4, -6 and R = 1, 0, 0: a = 1/4, b = 4/3; R fitted 5/6, 1/3, -1/6, residuals 1/6, -1/3, 1/6.

    RSS = 1/6 over 1 degree of freedom; at x = -1, 3 from the mean, Sxx = 8: variance 1/6 (1/3 + 9/8).
    """
    got = fit_law([math.log(2), math.log(4), math.log(6)], [1.0, 0.0, 0.0])
    half = 12.7062047362 * math.sqrt(1 / 6 * (1 / 3 + 9 / 8))
    assert (got.a, got.b) == pytest.approx((1 / 4, 4 / 3), abs=1e-10)
    assert (got.ceiling_low, got.ceiling_high) == pytest.approx((13 / 12 - half, 13 / 12 + half), abs=1e-9)


def test_interval_by_hand() -> None:
    """The points above, at exp(H) = 5: fitted 4/3 - 5/4 = 1/12, 1 from the mean; variance 1/6 (1/3 + 1/8)."""
    got = fit_law([math.log(2), math.log(4), math.log(6)], [1.0, 0.0, 0.0])
    half = 12.7062047362 * math.sqrt(1 / 6 * (1 / 3 + 1 / 8))
    assert got.interval(math.log(5)) == pytest.approx((1 / 12 - half, 1 / 12 + half), abs=1e-9)
    assert got.center == 4


def test_interval_without_entropy_is_that_of_the_ceiling() -> None:
    for seed in range(SEEDS):
        fit = lawful(40, seed, autocorrelation=0.5)
        assert fit.interval(0.0) == (fit.ceiling_low, fit.ceiling_high)


def test_interval_is_narrowest_at_the_mean_of_the_points() -> None:
    fit = lawful(40, 0)
    widths = [high - low for low, high in (fit.interval(math.log(fit.center * x)) for x in (0.5, 1.0, 1.5))]
    assert widths[1] == pytest.approx(2 * fit.error, rel=1e-12)
    assert widths[0] == pytest.approx(widths[2], rel=1e-12) and widths[0] > widths[1]


def test_interval_of_few_points_is_not_known() -> None:
    for number in range(3):
        fit = fit_law([1 - 0.05 * i for i in range(number)], [0.1 * i for i in range(number)])
        assert all(map(math.isnan, (*fit.interval(0.5), fit.error, fit.slope_error)))


@pytest.mark.parametrize("autocorrelation", [0.0, 0.5])
def test_ceiling_interval_covers_the_truth(autocorrelation: float) -> None:
    """95 % of 100 seeds, give or take 3 standard errors (2.2 each) of the count."""
    fits = [lawful(100, seed, autocorrelation=autocorrelation) for seed in range(SEEDS)]
    covered = sum(fit.ceiling_low <= 0.4 <= fit.ceiling_high for fit in fits)
    assert covered >= 95 - 6.6


def test_autocorrelated_residuals_count_for_fewer() -> None:
    """Residuals 1, 1, -1, -1: products 1, -1, 1 over squares 4, c = 1/4; 4 * (3/4) / (5/4) = 2.4."""
    assert effective_points([1.0, 1.0, -1.0, -1.0]) == pytest.approx(2.4, abs=1e-12)
    assert effective_points([1.0, -1.0, 1.0, -1.0]) == 4.0  # alternation is not taken for evidence


# --------------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize("number", [15, 40, 150])
def test_law_with_noise_holds(number: int) -> None:
    assert sum(lawful(number, seed).verdict == "holds" for seed in range(SEEDS)) >= 95


@pytest.mark.parametrize("number", [40, 150])
def test_law_with_autocorrelated_noise_holds(number: int) -> None:
    fits = [lawful(number, seed, autocorrelation=0.5) for seed in range(SEEDS)]
    assert sum(fit.verdict == "holds" for fit in fits) >= 95


@pytest.mark.parametrize("number", [20, 40, 150])
def test_law_does_not_hold_where_entropy_turns_while_reward_grows(number: int) -> None:
    assert sum(turning(number, seed).verdict == "does not hold here" for seed in range(SEEDS)) >= 95


def test_law_does_not_hold_where_reward_rises_with_entropy() -> None:
    h = [0.2 + i / 30 for i in range(30)]
    got = fit_law(h, [0.1 * math.exp(v) + 0.01 * (-1) ** i for i, v in enumerate(h)])
    assert got.verdict == "does not hold here"
    assert "a is at most" in got.reason


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 11])
def test_few_points_are_not_enough(number: int) -> None:
    got = fit_law([1 - 0.05 * i for i in range(number)], [0.1 * i for i in range(number)])
    assert got.verdict == "not yet"
    assert got.num_points == number
    assert math.isnan(got.ceiling_low) == (number < 3)


def test_flat_reward_is_not_enough() -> None:
    got = fit_law([1 - 0.05 * i for i in range(20)], [0.3] * 20)
    assert (got.a, got.b) == pytest.approx((0.0, 0.3), abs=1e-10)
    assert (got.verdict, got.reason) == ("not yet", "the reward has not moved")
    assert math.isnan(got.r2)


def test_flat_entropy_is_not_enough() -> None:
    got = fit_law([0.3] * 20, [0.1 * i for i in range(20)])
    assert (got.a, got.b) == pytest.approx((0.0, 0.95), abs=1e-10)
    assert got.verdict == "not yet"
    assert math.isnan(got.ceiling_low) and math.isnan(got.r2)


def test_noise_alone_is_not_enough() -> None:
    """Reward that does not depend on entropy: a may be 0; 5 % of the intervals leave it out, on either side."""
    verdicts = []
    for seed in range(SEEDS):
        rng = random.Random(seed)
        h = [0.3 + 0.8 * math.exp(-3 * i / 60) for i in range(60)]
        verdicts.append(fit_law(h, noise(60, 0.02, rng)).verdict)
    assert verdicts.count("not yet") >= 90


def test_departure_of_a_trend_is_found_and_of_a_law_is_not() -> None:
    """Residuals that are the step number itself: all of the variance goes, and nothing that is orthogonal does."""
    x = [-1.0, -2.0, -1.0, -2.0, -1.0, -2.0, -1.0, -2.0]
    steps = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    share, p = departure(x, steps, steps)
    assert share == pytest.approx(1, abs=1e-10)
    assert p < 1e-10
    crossed = [1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0]  # orthogonal to 1, x and the step number
    assert departure(x, crossed, crossed) == pytest.approx((0.0, 1.0), abs=1e-10)


@pytest.mark.parametrize(
    ("h", "r", "said"),
    [
        ([0.1, 0.2], [0.1], "entropy has 2 values, reward has 1: give one of each per step"),
        ([0.1, math.nan], [0.1, 0.2], r"entropy\[1\]=nan: must be finite"),
        ([0.1, 0.2], [math.inf, 0.2], r"reward\[0\]=inf: must be finite"),
    ],
)
def test_bad_data_are_refused(h: list[float], r: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_law(h, r)
