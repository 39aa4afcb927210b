"""Checkpoint choice: what is measured, in which order checkpoints are preferred, and the command as a user runs it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from rlvr.cli import main
from rlvr.errors import ConfigError
from rlvr.trainers.checkpoint_choice import ChoiceConfig, find_checkpoints
from rlvr.trainers.checkpoint_ranking import (
    Measurement,
    format_ranking,
    measure,
    powers_of_two,
    rank,
    ratio_ci95,
    verdict,
)
from rlvr.trainers.checkpoint_sampling import InverseCdf, Samples, completion_entropy, load_model, read_prompts, sample

BAND = (0.3, 0.5)
TASK = ["--task", "chain_sum", "--verifier_workers", "1", "--prompts", "3", "--samples", "2", "--max-tokens", "4"]


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


@pytest.fixture(scope="module")
def scaled_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder of three checkpoints that differ in the scale of the final norm, so in that of their logits."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sft")
    for step, scale in ((9, 0.5), (10, 1.0), (100, 4.0)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.model.norm.weight.data *= scale
        shutil.copytree(tiny_model_dir, folder / f"checkpoint-{step}")
        model.save_pretrained(folder / f"checkpoint-{step}")
    return folder


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_rank_inside_the_band_comes_before_any_better_pass_rate_outside():
    assert order(measured("low", 0.29, 0.9), measured("in", 0.31, 0.1), measured("high", 0.51, 0.9))[0] == "in"


def test_rank_inside_prefers_pass_rate_and_then_the_middle_of_the_band():
    assert order(measured("a", 0.4, 0.5), measured("b", 0.49, 0.6), measured("c", 0.38, 0.5)) == ["b", "a", "c"]


def test_rank_outside_goes_by_distance_to_the_band_on_either_side():
    # distances .25, .1, .2, whatever the pass rates
    assert order(measured("a", 0.05, 0.9), measured("b", 0.6, 0.1), measured("c", 0.1, 0.5)) == ["b", "c", "a"]


def test_rank_does_not_depend_on_the_order_given_and_keeps_that_of_equals():
    found = [measured(name, entropy) for name, entropy in zip("abcd", (0.1, 0.45, 0.7, 0.35), strict=True)]
    assert order(*found[:2], *found[2:]) == ["b", "d", "a", "c"] or order(*found) == ["d", "b", "a", "c"]
    assert sorted(order(*found)[2:]) == sorted(order(*reversed(found))[2:])
    assert order(measured("y", 0.2), measured("x", 0.2)) == ["y", "x"]


def test_rank_puts_a_broken_checkpoint_last_and_an_unmeasured_pass_rate_last_inside():
    found = [measured("nan", math.nan, 1.0), measured("far", 9.0), measured("none", 0.4, math.nan), measured("zero", 0.3, 0)]
    assert order(*found) == ["zero", "none", "far", "nan"]


def test_verdict_counts_the_bounds_as_inside():
    assert [verdict(h, BAND) for h in (0.29, 0.3, 0.5, 0.51)] == ["too low", "inside", "inside", "too high"]
    assert verdict(math.nan, BAND) == verdict(math.inf, BAND) == "not finite"
