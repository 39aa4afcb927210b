"""What the laboratory computes from records: means with intervals, and the answers on GRPO, the law and the steps."""

import math
from dataclasses import replace
from statistics import stdev

import numpy as np
import pytest
from lab_records import exponential, on_its_way, record, suite, watched

from scripts.lab.figures import band
from scripts.lab.intervals import correlation, front, interval, paired, roughness
from scripts.lab.methods import BAND
from scripts.lab.questions import (
    at,
    by_class,
    collapse,
    estimators,
    fall,
    foresight,
    held_out_law,
    law,
    lead,
    select,
    spending,
)
from scripts.lab.scatter import lengths, sensitivity


def test_interval_by_hand():
    """Student's t for 95 % and 4 degrees of freedom is 2.776."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.count) == (3.0, 5)
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), abs=1e-5)
    assert found.sign == 1 and found.low == pytest.approx(3 - found.half, abs=1e-12)


def test_interval_covers_the_mean_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    inside = [(found := interval(rng.normal(1.0, 2.0, 5).tolist())).low <= 1.0 <= found.high for _ in range(4000)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.014)  # four standard errors


def test_interval_of_one_seed_says_nothing():
    one = interval([0.5])
    assert one.mean == 0.5 and math.isnan(one.half) and one.sign == 0
    assert math.isnan(interval([]).mean) and interval([]).sign == 0
    assert interval([0.5, math.nan]).count == 1


def test_paired_difference_drops_what_seeds_share():
    """Seeds differ by 10, the method by 1 ± .1: only the paired interval shows it."""
    reference = {seed: 10.0 * seed for seed in range(5)}
    values = {seed: x + 1 + 0.1 * (seed % 2) for seed, x in reference.items()}
    assert paired(values, reference).sign == 1
    assert interval(list(values.values())).half > 10
    assert paired({0: 1.0, 7: 5.0}, {0: 0.5, 8: 1.0}).count == 1


def test_correlation_of_few_or_constant_points_is_nan():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(correlation([1, 2], [1, 2])) and math.isnan(correlation([1, 1, 1], [1, 2, 3]))


def test_roughness_ignores_a_trend_and_a_scale():
    trend = [1.0 + 0.01 * i for i in range(100)]
    assert roughness(trend) == pytest.approx(0.0, abs=1e-12)
    rough = [x * (1.1 if i % 2 else 0.9) for i, x in enumerate(trend)]
    assert roughness(rough) == pytest.approx(roughness([5 * x for x in rough]), rel=1e-9)
    assert roughness(rough) == pytest.approx(0.1, abs=0.01)
    assert math.isnan(roughness([1.0] * 21))


def test_front_by_hand():
    points = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.0, 0.0), "d": (1.0, 0.0), "e": (math.nan, 9.0)}
    assert front(points) == ["a", "b", "d"]


def test_collapse_by_hand():
    """Rollout i has entropy .60 - .02 i, of 20. At 10 % two are over: .60 and .58; then the last five of 5, 10, 20."""
    found = collapse({0: record(), 1: record(seed=1)})
    assert found.start.mean == pytest.approx(0.60, abs=1e-12)
    assert [x.mean for x in found.at.values()] == pytest.approx([0.59, 0.56, 0.46, 0.26], abs=1e-12)
    assert found.start.half == pytest.approx(0.0, abs=1e-12)


def test_at_uses_no_value_after_the_share():
    assert at([1.0, 1.0, 1.0, 9.0], 0.75) == 1.0
    assert at([1.0, 9.0], 0.01) == 1.0


def test_law_finds_what_records_were_made_with():
    runs = {seed: exponential(seed) for seed in range(3)}
    found = law(runs)
    assert (found.a.mean, found.b.mean) == (pytest.approx(1.2, abs=0.01), pytest.approx(2.2, abs=0.01))
    assert found.r2.mean > 0.9999 > found.r2_linear.mean
    assert found.foresight
    for ahead in found.foresight:
        assert ahead.law.mean == pytest.approx(0.0, abs=1e-3)
        assert ahead.line.mean > 0.02  # exp(H) is flatter at low entropy than where the line was fitted
        assert ahead.last.mean < -0.1  # reward has grown since


def test_held_out_law_is_fitted_to_the_stops():
    runs = {}
    for seed in range(3):
        whole = exponential(seed)
        ends = {count: at(whole.entropy[: max(count, 1)], 1.0) for count in range(0, 40, 4)}
        stops = {str(count): {"1": 1.9 - 1.1 * math.exp(h)} for count, h in ends.items()}
        runs[seed] = replace(whole, stops=stops, pass_at={"1": 1.9 - 1.1 * math.exp(at(whole.entropy, 1.0))})
    found = held_out_law(runs)
    assert (found.a.mean, found.b.mean, found.r2.mean) == pytest.approx((1.1, 1.9, 1.0), abs=1e-9)
    assert held_out_law({0: on_its_way(0)}) is None  # five points are too few


def test_foresight_is_wrong_where_the_law_changes():
    """Half of the gain is lost after the first part: the error is that loss, by which the forecast is too high."""
    whole = exponential(0)
    reward = tuple(r - (0.1 if i >= 20 else 0.0) for i, r in enumerate(whole.reward))
    found = foresight({0: replace(whole, reward=reward)}, 0.35)
    # The law of the mean entropy is not quite the mean of the law over the last 10 rollouts.
    assert found.law.mean == found.size.mean == pytest.approx(0.1, abs=2e-4)
    assert found.covered == 0.0


def test_spending_by_hand():
    """Windows of 5 have entropy .56, .46, .36, .26: shares 0, 1/3, 2/3, 1, and reward the same."""
    found = spending({0: record()})
    assert list(found.at) == [0.5]  # a third and less end with the first window, where nothing can be spent
    assert found.at[0.5][0].mean == pytest.approx(1 / 3, abs=1e-12)
    assert found.at[0.5][1].mean == pytest.approx(1 / 3, abs=1e-12)
    assert found.curve[-1] == pytest.approx((1.0, 1.0), abs=1e-12)


def test_spending_of_a_constant_is_unknown():
    found = spending({0: record(entropy=(0.5,) * 20)})
    assert math.isnan(found.at[0.5][0].mean)


def test_estimators_by_hand():
    found = estimators({seed: watched(seed) for seed in range(3)})
    assert [one.name for one in found] == ["discriminator", "covariance"]
    assert found[0].tokens["correlation"].mean == pytest.approx(0.41, abs=1e-12)  # .40, .41, .42
    assert found[0].tokens["correlation"].half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), abs=1e-6)
    assert found[0].steps["correlation"].mean == pytest.approx(1.0, abs=1e-12)
    assert found[0].steps["slope"].mean == pytest.approx(2.0, abs=1e-9)
    assert abs(found[1].steps["correlation"].mean) < 0.5
    assert estimators({0: record()}) == []


def test_lead_is_paired_by_runs():
    """Seeds share what they differ in; over tokens .40 is .20 more than .20 with each."""
    best, other = estimators({seed: watched(seed) for seed in range(3)})
    tokens, steps = lead(best, other)
    assert tokens.mean == pytest.approx(0.2, abs=1e-12) and tokens.half == pytest.approx(0.0, abs=1e-9)
    assert steps.mean > 0.5


def test_classes_and_the_rest_add_up_to_all_tokens():
    """Six steps; measured -.01 to -.06, classes -.02 + .005 + .01 - .015 a step."""
    found = by_class({0: watched(0)})
    assert found["all_tokens"].mean == pytest.approx(-0.21, abs=1e-12)
    assert found["no_advantage"].mean == pytest.approx(-0.21 + 0.12, abs=1e-12)
    assert fall({0: watched(0)}).mean == pytest.approx(-0.38, abs=1e-12)


def test_lengths_pairs_scatter():
    found = lengths(select(suite(), "lengths"))
    # Of 21 values around one of 1.1, 11 are 1.1; around one of 1.0, 10 are.
    relative = [1.1 / (1 + 0.1 * 11 / 21), 1.0 / (1 + 0.1 * 10 / 21)]
    assert found["grad_norm"]["grpo"].value.mean == pytest.approx(stdev(relative * 30), rel=1e-9)
    assert found["grad_norm"]["c3po"].difference.mean < -0.04
    assert found["tokens"]["c3po"].value.mean == 0.0


def test_sensitivity_cuts_the_own_setting_to_the_same_length():
    found = sensitivity(suite())["kl-cov"]
    assert [(one.value, one.own) for one in found.settings] == [(0.3, False), (1.0, True), (3.0, False)]
    assert found.rollouts == 10
    # Rollouts 5 to 9: .60 - .02 * 7 = .46, and .05 more in the own runs of the comparison (seeds 0 and 1).
    entropy = [one.entropy for one in found.settings]
    assert [one.mean for one in entropy] == pytest.approx([0.468, 0.5105, 0.495], abs=1e-12)
    assert [one.count for one in entropy] == [2, 2, 2]


def test_sensitivity_pairs_the_largest_value_with_the_smallest():
    """Seeds differ by .01 at every value: the differences do not."""
    found = sensitivity(suite())["kl-cov"]
    assert found.entropy.mean == pytest.approx(0.027, abs=1e-12)
    assert found.entropy.half == pytest.approx(0.0, abs=1e-9) and found.reward.mean == pytest.approx(-0.027, abs=1e-12)


def test_spending_takes_seeds_of_different_lengths():
    whole = record()
    cut = replace(whole, made=whole.made[:15], reward=whole.reward[:15])
    assert spending({0: whole, 1: cut}).curve == spending({0: cut, 1: cut}).curve


def test_band_that_is_drawn_is_the_runs_own():
    assert band(record()) == BAND
    for spec in ({"low": 0.4, "high": 0.6}, '{"low": 0.4, "high": 0.6}'):
        assert band(replace(record(), settings={"thermostat": spec})) == (0.4, 0.6)


def test_nothing_is_predicted_from_fewer_rollouts_than_a_fit_needs():
    shares = {n: [one.share for one in law({0: exponential(0, rollouts=n)}).foresight] for n in (30, 40, 100)}
    assert shares == {30: [], 40: [0.35], 100: [0.15, 0.35]}
