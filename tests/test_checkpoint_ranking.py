"""Checkpoint ranking: what is made of samples and rewards, and in which order checkpoints are preferred."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from rlvr.trainers.checkpoint_ranking import (
    Measurement,
    format_ranking,
    measure,
    powers_of_two,
    rank,
    ratio_ci95,
    verdict,
)
from rlvr.trainers.checkpoint_sampling import Samples

BAND = (0.3, 0.5)


def measured(name: str, entropy: float, best: float = 0.5) -> Measurement:
    return Measurement(
        checkpoint=f"/runs/{name}",
        entropy=entropy,
        entropy_ci95=0.01,
        length=12.5,
        truncated=0.25,
        unjudged=0.0,
        pass_at_k={1: 0.25, 2: best},
        pass_at_1_ci95=0.05,
    )


def order(*found: Measurement) -> list[str]:
    return [Path(one.measured.checkpoint).name for one in rank(found, BAND)]


def test_rank_inside_the_band_comes_before_any_better_pass_rate_outside():
    assert order(measured("low", 0.29, 0.9), measured("in", 0.31, 0.1), measured("high", 0.51, 0.9))[0] == "in"


def test_rank_inside_prefers_pass_rate_and_then_the_middle_of_the_band():
    assert order(measured("a", 0.4, 0.5), measured("b", 0.49, 0.6), measured("c", 0.38, 0.5)) == ["b", "a", "c"]


def test_rank_outside_goes_by_distance_to_the_band_on_either_side():
    # distances .25, .1, .2, whatever the pass rates
    assert order(measured("a", 0.05, 0.9), measured("b", 0.6, 0.1), measured("c", 0.1, 0.5)) == ["b", "c", "a"]


def test_rank_depends_on_the_order_given_only_among_equals():
    found = [measured(name, entropy) for name, entropy in zip("abcd", (0.1, 0.45, 0.75, 0.38), strict=True)]
    assert order(*found) == order(*reversed(found)) == ["d", "b", "a", "c"]
    assert order(measured("y", 0.2), measured("x", 0.2)) == ["y", "x"]


def test_rank_puts_a_broken_checkpoint_last_and_an_unmeasured_pass_rate_last_inside():
    found = [
        measured("nan", math.nan, 1.0),
        measured("far", 9.0),
        measured("none", 0.4, math.nan),
        measured("zero", 0.3, 0),
    ]
    assert order(*found) == ["zero", "none", "far", "nan"]


def test_verdict_counts_the_bounds_as_inside():
    assert [verdict(h, BAND) for h in (0.29, 0.3, 0.5, 0.51)] == ["too low", "inside", "inside", "too high"]
    assert verdict(math.nan, BAND) == verdict(math.inf, BAND) == "not finite"


def test_format_ranking_fits_the_terminal_and_says_why():
    name = "a-rather-long-name-of-an-experiment/checkpoint-"
    found = [measured(f"{name}{step}", h) for step, h in ((1, 0.7), (2, 0.4), (3, 0.1))]
    many = [dataclasses.replace(one, pass_at_k={1 << i: 0.5 for i in range(6)}) for one in found]
    text = format_ranking(rank(many, BAND), BAND)
    assert max(map(len, text.splitlines())) <= 100
    rows = text.splitlines()[1:4]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert ["point-2" in rows[0], "point-1" in rows[1], "point-3" in rows[2]] == [True] * 3
    assert "inside" in rows[0] and "too high" in rows[1] and "too low" in rows[2]
    assert "will collapse early" in text and text.endswith(
        "checkpoint-2: none of those inside 0.3 to 0.5 nats has a higher pass@32."
    )


def test_format_ranking_says_when_none_is_inside_and_what_was_not_judged():
    ranked = rank([measured("near", 0.2), dataclasses.replace(measured("far", 0.1), unjudged=0.25)], BAND)
    text = format_ranking(ranked, BAND)
    assert "far: 25 % of completions could not be judged" in text
    assert text.endswith("No checkpoint is inside 0.3 to 0.5 nats. near is the nearest.")
    close = format_ranking(rank([measured("close", 0.295)], BAND), BAND)  # 0.295 + 0.01 is inside
    assert close.endswith("close is the nearest; its interval reaches the band, so more --prompts may decide.")


# --- measuring -------------------------------------------------------------------------------------------------------


def test_ratio_ci95_of_equal_counts_is_that_of_a_mean():
    # values 1, 2, 6 of count 2 each: mean 3/2 = 1.5; of x/2 = .5, 1, 3 the deviation is sqrt((1 + .25 + 2.25) / 2)
    ratio, half = ratio_ci95(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 2, 2]))
    assert ratio == 1.5
    assert half == pytest.approx(1.96 * math.sqrt(1.75) / math.sqrt(3), abs=1e-12)


def test_ratio_ci95_weighs_prompts_by_their_tokens():
    # (3 + 1) / (1 + 3) = 1; residuals 3 - 1 = 2 and 1 - 3 = -2, variance 8 / 1, mean count 2
    ratio, half = ratio_ci95(torch.tensor([3.0, 1.0]), torch.tensor([1, 3]))
    assert ratio == 1.0 and half == pytest.approx(1.96 * math.sqrt(8) / (2 * math.sqrt(2)), abs=1e-12)


def test_ratio_ci95_of_a_single_prompt_has_no_interval():
    ratio, half = ratio_ci95(torch.tensor([3.0]), torch.tensor([2]))
    assert ratio == 1.5 and math.isnan(half)


def test_ratio_ci95_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (2000, 64), generator=generator)
    totals = counts * (0.4 + 0.2 * torch.randn(2000, 64, generator=generator))
    hits = [abs(r - 0.4) <= half for r, half in map(ratio_ci95, totals, counts)]
    assert 0.93 < sum(hits) / len(hits) < 0.965


def test_powers_of_two_up_to_the_samples():
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


def test_measure_of_a_hand_made_case():
    # prompts: rewards (1, .5) and (1, None); entropies 1, 2 | 3, 0 over 2, 2 | 3, 1 tokens
    samples = Samples(
        texts=["a", "b", "c", "d"],
        entropy=torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64),
        length=torch.tensor([2, 2, 3, 1]),
        truncated=torch.tensor([False, True, False, False]),
    )
    found = measure("x", samples, [1.0, 0.5, 1.0, None], per_prompt=2, pass_reward=1.0)
    assert (found.entropy, found.length, found.truncated, found.unjudged) == (6 / 8, 2.0, 0.25, 0.25)
    assert found.pass_at_k == {1: (1 / 2 + 1) / 2, 2: 1.0}  # only the first prompt has two judged samples
    assert found.pass_at_1_ci95 == pytest.approx(1.96 * math.sqrt(0.125) / math.sqrt(2), abs=1e-12)
    assert measure("x", samples, [1.0, 0.5, 1.0, None], per_prompt=2, pass_reward=0.5).pass_at_k == {1: 1.0, 2: 1.0}


def test_measure_without_a_single_verdict_is_nan_and_not_zero():
    samples = Samples(["a", "b"], torch.ones(2), torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    found = measure("x", samples, [None, None], per_prompt=1, pass_reward=1.0)
    assert found.unjudged == 1.0 and math.isnan(found.pass_at_k[1]) and math.isnan(found.pass_at_1_ci95)
