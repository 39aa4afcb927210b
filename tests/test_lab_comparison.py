"""Methods against GRPO, at its end, at equal compute and stopped early; and the verdicts by rule."""

import math
from dataclasses import replace

import pytest
from lab_records import on_its_way, record, suite

from scripts.lab.comparison import Compared, Row, at_equal_compute, at_equal_entropy, comparison, dearer, pareto
from scripts.lab.intervals import Interval
from scripts.lab.questions import select
from scripts.lab.records import stopped, with_stops
from scripts.lab.verdicts import MATERIAL, by_chance, goals, verdict, verdicts


def test_comparison_pairs_seeds_and_counts_time():
    rows = {row.name: row for row in comparison(select(suite(), "compare"))}
    assert rows["kl-cov"].entropy.difference.mean == pytest.approx(0.051, abs=1e-9)
    assert rows["kl-cov"].entropy.difference.sign == 1
    assert rows["kl-cov"].pass_at["1"].difference.mean == pytest.approx(0.102, abs=1e-9)
    assert rows["clip-cov"].pass_at["1"].difference.sign == -1
    assert rows["grpo"].pass_at["1"].difference.mean == 0.0
    assert (rows["kl-cov"].cost.mean, rows["clip-cov"].cost.mean, rows["grpo"].cost.mean) == (2.0, 1.0, 1.0)
    assert dearer(list(rows.values())) == [rows["kl-cov"]]


def test_a_stopped_run_ends_there():
    whole = on_its_way(0)
    half, none = stopped(whole, 10), stopped(whole, 0)
    assert half.entropy == whole.entropy[:10] and half.reward == whole.reward[:10] and len(half.seconds) == 10
    assert half.pass_at == whole.stops["10"] and half.stops == {}
    assert none.entropy == whole.entropy[:1] and none.pass_at["1"] == 0.1  # the base model


def test_stops_are_those_that_all_seeds_have():
    whole, cut = on_its_way(0), on_its_way(1)
    cut = replace(cut, stops={count: cut.stops[count] for count in ("15", "0")})
    found = with_stops({0: whole, 1: cut, 2: record(seed=2)})
    assert [list(one.stops) for one in found.values()] == [["0", "15"]] * 2
    assert with_stops({0: record()}) == {}


def test_equal_compute_takes_the_rollouts_that_fit():
    """PPO's 54 of 100 are 10 of 20; its pass@64 was better then than at its end."""
    ppo = {seed: on_its_way(seed, name="ppo") for seed in range(3)}
    (found,) = at_equal_compute({"grpo": {seed: record(seed=seed) for seed in range(3)}, "ppo": ppo})
    assert (found.name, found.rollouts) == ("ppo", 10)
    assert found.pass_at["64"].difference.mean == pytest.approx(0.05, abs=1e-12)
    assert found.entropy.difference.mean == pytest.approx(0.20, abs=1e-12)  # rollouts 5 to 9 less 15 to 19
    unasked = {seed: replace(one, stops={"5": one.stops["5"]}) for seed, one in ppo.items()}
    assert at_equal_compute({"grpo": ppo, "ppo": unasked}) == []


def test_equal_entropy_stops_grpo_where_it_has_the_methods():
    """GRPO's ends after 5, 10, 15 and 20 are .56, .46, .36, .26; the method's .36 is GRPO's after 15."""
    plain = {seed: on_its_way(seed) for seed in range(3)}
    held = {seed: record("kl-cov", seed, entropy=tuple(h + 0.1 for h in plain[seed].entropy)) for seed in range(3)}
    (found,) = at_equal_entropy({"grpo": plain, "kl-cov": held})
    assert (found.name, found.seeds, found.rollouts) == ("kl-cov", 3, 15)
    assert found.entropy.difference.mean == pytest.approx(0.0, abs=1e-12)
    assert found.pass_at["64"].difference.mean == pytest.approx(-0.02, abs=1e-12)  # better than GRPO's end, .90
    assert found.pass_at["1"].difference.mean == pytest.approx(-0.01, abs=1e-12)
    assert at_equal_entropy({"grpo": {0: record()}, "kl-cov": held}) == []
    assert at_equal_entropy({"grpo": plain, "kl-cov": {0: replace(held[0], pass_at={})}}) == []  # not asked


def test_a_method_that_spends_more_is_compared_with_grpos_end():
    spent = {0: record("clip-higher", entropy=tuple(h - 0.1 for h in record().entropy))}
    (found,) = at_equal_entropy({"grpo": {0: on_its_way(0)}, "clip-higher": spent})
    assert found.rollouts == 20


def test_pareto_by_hand():
    rows = comparison(select(suite(), "compare"))
    assert pareto(rows, "16") == ["kl-cov"]  # more entropy and pass@1 than the others, as much pass@16


def row(entropy: float, one: float, many: float, reward: float = 0.7, sure: float = 0.001, less: float = 0.0) -> Row:
    def compared(difference: float) -> Compared:
        return Compared(Interval(0.5, 0.1, 5), Interval(difference, sure, 5))

    return Row(
        name="kl-cov",
        seeds=5,
        entropy=compared(entropy),
        pass_at={"1": compared(one), "16": compared(0.0), "64": compared(many)},
        reward=Compared(Interval(reward, 0.01, 5), Interval(less, 0.01, 5)),
        rollouts=100,
        cost=Interval(1.0, 0.0, 5),
        clipped=0.01,
        touched=0.1,
    )


@pytest.mark.parametrize(
    ("given", "overall"),
    [
        (row(0.0, 0.0, 0.0), "no effect shown here"),
        (row(0.0, 0.05, 0.0), "helps here"),
        (row(0.1, 0.0, 0.05), "helps here"),
        (row(0.1, -0.05, 0.05), "a trade here"),
        (row(0.1, -0.05, 0.0), "holds entropy at a price"),
        (row(0.1, 0.0, 0.0), "holds entropy at no shown price"),
        (row(0.1, 0.0, 0.0, less=-0.1), "holds entropy at a price"),  # of training reward
        (row(MATERIAL / 2, 0.0, 0.0), "no effect shown here"),  # shown, but immaterial
        (row(-0.1, 0.0, 0.0), "no effect shown here"),
        (row(0.0, -0.05, 0.0), "hurts here"),
        (row(4.0, 0.05, 0.0, reward=0.01), "ruins the policy here"),
        (row(0.1, 0.05, 0.05, sure=0.2), "no effect shown here"),  # no interval excludes 0
        (row(0.1, 0.05, 0.05, sure=math.nan), "no effect shown here"),  # one seed shows nothing
    ],
)
def test_verdict_follows_the_rules(given: Row, overall: str):
    assert verdict(given, base_reward=0.12).overall == overall


@pytest.mark.parametrize(
    ("early", "overall"),
    [
        (row(0.0, 0.0, 0.02), "helps here"),
        (row(0.0, 0.0, 0.0), "no more than stopping early"),
        (row(0.0, -0.02, 0.02), "no more than stopping early"),
        (row(0.0, 0.0, -0.02), "no more than stopping early"),
        (row(0.0, 0.0, 0.02, sure=0.1), "no more than stopping early"),
    ],
)
def test_what_helps_beats_grpo_that_is_stopped(early: Row, overall: str):
    found = verdict(row(0.1, 0.0, 0.05), 0.12, early)
    assert found.overall == overall and found.good_for == ("pass@64", "holding entropy")
    assert found.more_than_early == (("pass@64",) if overall == "helps here" else ())


def test_verdict_of_a_ruined_policy_recommends_nothing():
    assert verdict(row(4.0, 0.05, 0.0, reward=0.01), 0.12).good_for == ()


def test_goals_are_named_without_a_method_too():
    rows = comparison(select(suite(), "compare"))
    assert goals(rows) == ("pass@1", "pass@64", "holding entropy")
    found = {one.name: one.good_for for one in verdicts(rows, base_reward=0.1)}
    assert found == {"kl-cov": ("pass@1", "holding entropy"), "clip-cov": ()}


def test_by_chance_counts_what_excludes_0():
    looked_at = [row(0.1, 0.0, 0.0).entropy, row(-0.1, 0.0, 0.0).entropy, *[row(0.0, 0.0, 0.0).entropy] * 18]
    assert by_chance(looked_at) == "Of 20 differences 2 exclude 0; about 1.0 would if nothing differed."


def test_tokens_are_touched_by_the_control_and_not_by_the_clip():
    some = {"kl_cov/selected": 0.10, "clip/high": 0.02, "clip/low": 0.01}
    term = {"controls": [{"name": "entropy_bonus"}]}
    of = {"grpo": record(), "kl-cov": record("kl-cov", touched=some), "bonus": record("bonus", settings=term)}
    rows = {one.name: one for one in comparison({name: {0: one} for name, one in of.items()})}
    assert (rows["kl-cov"].clipped, rows["kl-cov"].touched) == (pytest.approx(0.03), 0.10)
    assert (rows["bonus"].touched, rows["grpo"].touched) == (1.0, 0.0)
