"""What a training records of its tokens, against plain arithmetic on the tokens that it records."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import ppo_trainer
from test_grpo_trainer import FixedRollouts, trainer
from test_histograms import counted

from rlvr.diagnostics import doubling_edges
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.records import read_steps, read_tokens, token_steps

CONTROLS = [
    {"name": "clip_cov", "fraction": 0.1, "low": 0.1, "high": 50.0},
    {"name": "kl_cov", "fraction": 0.1},
    {"name": "clip_b", "mu": 0.5},
    {"name": "steer", "min_weight": 0.5},
]
WHOLE = {  # a rollout of which every sequence is sampled, and trained on twice
    "per_device_train_batch_size": 16,
    "record_sequences": 16,
    "num_iterations": 2,
    "max_steps": 2,
    "surrogate": "unclipped",
}


class ToldRollouts(FixedRollouts):
    """The engine of these completions says how likely each of their tokens was."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return completions, [[-5.0 - i / 7 for i in ids] for ids in completions]


def run(model_dir: Path, out: Path, kind: Any = None, **settings: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """The records of the steps, and the token samples of the first."""
    one = trainer(model_dir, out, **{**WHOLE, **settings})
    if kind is not None:
        one.__class__ = kind
    one.train()
    return read_steps(out), read_tokens(out, 1)


def flat(rows: list[dict[str, Any]], name: str, kept: bool = False) -> list[Any]:
    """A column of all tokens, or of those that no control takes out."""
    tokens = [(x, keep) for row in rows for x, keep in zip(row[name], keeps(row), strict=True)]
    return [x for x, keep in tokens if keep or not kept]


def keeps(row: dict[str, Any]) -> list[bool]:
    return row.get("keep") or [True] * len(row["tokens"])


def products(rows: list[dict[str, Any]]) -> list[float]:
    """(A - mean A)(log p - mean log p) of all tokens; the means are those of the kept ones."""
    pairs = [(row["advantage"], x, keep) for row in rows for x, keep in zip(row["logps"], keeps(row), strict=True)]
    kept = [(a, x) for a, x, keep in pairs if keep]
    a_mean, x_mean = (sum(part) / len(kept) for part in zip(*kept, strict=True))
    return [(a - a_mean) * (x - x_mean) for a, x, _ in pairs]


# ---------------------------------------------------------------------------------------------------------- histograms


def test_histograms_are_those_of_the_recorded_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"controls": CONTROLS, "mismatch_tolerance": 100.0}
    (step, _), rows = run(tiny_model_dir, tmp_path, ToldRollouts, **settings)
    covariance = zip(products(rows), flat(rows, "keep"), strict=True)
    weights = zip(flat(rows, "weight"), flat(rows, "keep"), strict=True)
    mismatch = [abs(a - b) for a, b in zip(flat(rows, "old_logps"), flat(rows, "rollout_logps"), strict=True)]
    expected = {
        "entropy": flat(rows, "entropy"),
        "covariance": [x for x, keep in covariance if keep],
        "advantage": [row["advantage"] for row in rows for keep in row["keep"] if keep],
        "weight": [weight if keep else 0.0 for weight, keep in weights],
        "mismatch": mismatch,
    }
    assert step["histograms"] == {name: counted(x, HISTOGRAMS[name].edges) for name, x in expected.items()}
    everything, trained = len(flat(rows, "tokens")), step["metrics"]["policy/tokens"]
    sums = {name: sum(counts) for name, counts in step["histograms"].items()}
    assert sums["covariance"] == sums["advantage"] == trained < everything
    assert sums["entropy"] == sums["weight"] == sums["mismatch"] == everything
    assert sum(mismatch) / everything == pytest.approx(step["metrics"]["mismatch/abs_logp_mean"], rel=1e-6)

    bins = step["mismatch_by_position"]
    places = [place for row in rows for place in range(len(row["tokens"]))]
    assert bins["edges"] == list(doubling_edges(4, max(places) + 1)) == [0.0, 4.0]
    assert bins["count"] == [sum(place < 4 for place in places), sum(place >= 4 for place in places)]
    whole = sum(mean * count for mean, count in zip(bins["mean"], bins["count"], strict=True)) / everything
    assert whole == pytest.approx(step["metrics"]["mismatch/abs_logp_mean"], rel=1e-6)


@pytest.mark.parametrize("size", [4, 8])
def test_histograms_do_not_depend_on_the_micro_batch_size(size: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    shared = {"controls": CONTROLS, "max_steps": 4}
    whole, rows = run(tiny_model_dir, tmp_path / "whole", **shared)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
    parts, same = run(tiny_model_dir, tmp_path / "cut", **shared, **cut)
    for a, b in zip(whole, parts, strict=True):
        assert a["histograms"] == b["histograms"]
        assert a["histograms"].keys() == {"entropy", "covariance", "advantage", "weight"}
        assert "mismatch_by_position" not in a
    others = {row["sequence"]: row for row in same}
    for row in rows:
        other = others[row["sequence"]]
        for name in ("covariance", "predicted"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-9), name
        for name in ("estimator", *(f"control:{control['name']}" for control in CONTROLS)):
            assert row[name] == other[name], name


def test_histograms_of_a_run_without_controls_have_no_weight(tiny_model_dir: Path, tmp_path: Path) -> None:
    (step, _), rows = run(tiny_model_dir, tmp_path)
    assert step["histograms"].keys() == {"entropy", "covariance", "advantage"}
    assert not any(name.startswith("control:") or name in ("weight", "keep") for name in rows[0])


def test_histograms_and_covariances_are_of_diagnostics_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    (step, _), rows = run(tiny_model_dir, tmp_path, diagnostics=False, controls=CONTROLS)
    assert not {"histograms", "entropy_by_position", "mismatch_by_position"} & step.keys()
    assert "covariance" not in rows[0] and {"predicted", "control:kl_cov"} <= rows[0].keys()


# ------------------------------------------------------------------------------------------------------- token samples


def test_covariance_of_tokens_is_about_the_means_of_the_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    (step, _), rows = run(tiny_model_dir, tmp_path, controls=CONTROLS)
    assert flat(rows, "covariance") == pytest.approx(products(rows), rel=1e-5, abs=1e-6)
    kept = flat(rows, "covariance", kept=True)
    assert sum(kept) / len(kept) == pytest.approx(step["metrics"]["covariance/mean"], rel=1e-5)


def test_covariance_is_known_where_few_sequences_are_sampled(tiny_model_dir: Path, tmp_path: Path) -> None:
    every = {row["sequence"]: row for row in run(tiny_model_dir, tmp_path / "all")[1]}
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "record_sequences": 3}
    few = run(tiny_model_dir, tmp_path / "few", **cut)[1]
    assert sorted(row["sequence"] for row in few) == [0, 1, 2]
    for row in few:
        assert row["covariance"] == pytest.approx(every[row["sequence"]]["covariance"], rel=1e-4, abs=1e-6)


def test_predicted_is_learning_rate_times_push_times_discriminator(tiny_model_dir: Path, tmp_path: Path) -> None:
    """At the first update the ratio is 1, so the loss -(sum of A) / N pushes a token by A / N."""
    _, rows = run(tiny_model_dir, tmp_path, loss_type="dapo", learning_rate=0.05)
    number = len(flat(rows, "tokens"))
    for row in rows:
        assert row["estimator"] == "single_logit"
        for predicted, logp, entropy in zip(row["predicted"], row["logps"], row["entropy"], strict=True):
            step = 0.05 * row["advantage"] / number
            assert predicted == pytest.approx(-step * math.exp(logp) * (logp + entropy), rel=1e-4, abs=1e-12)
    assert any(flat(rows, "predicted"))


def test_predicted_is_what_the_probe_predicts(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A control of micro-batches asks for E_S, with which the prediction is the probe's."""
    controls = [{"name": "clip_v", "mu": 0.2, "max_fraction": 0.3, "scope": "micro_batch"}, *CONTROLS[:2]]
    settings = {"controls": controls, "loss_type": "bnpo", "probe_sequences": 16}
    (step, _), rows = run(tiny_model_dir, tmp_path, **settings)
    predicted = flat(rows, "predicted")
    assert {row["estimator"] for row in rows} == {"discriminator"}
    mean = step["metrics"]["dynamics/predicted"]
    assert mean != 0 and sum(predicted) / len(predicted) == pytest.approx(mean, rel=1e-4)
    assert all(x == 0 for x, keep in zip(predicted, flat(rows, "keep"), strict=True) if not keep)


def test_columns_of_controls_are_what_each_has_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    idle = {"name": "clip_v", "mu": 1e6}
    (step, _), rows = run(tiny_model_dir, tmp_path, controls=[*CONTROLS, idle], beta=0.1)
    told = {name: flat(rows, f"control:{name}") for name in (*(c["name"] for c in CONTROLS), "reference_kl")}
    touched = {"clip_cov": "masked", "kl_cov": "selected", "clip_b": "masked", "steer": "changed"}
    for name, metric in touched.items():
        assert sum(told[name]) / len(told[name]) == pytest.approx(step["metrics"][f"{name}/{metric}"]), name
        assert 0 < sum(told[name]) < len(told[name])
    assert all(told["reference_kl"]) and not any(flat(rows, "control:clip_v"))
    assert [not keep for keep in flat(rows, "keep")] == told["clip_b"]
    assert [drift > 0 for drift in flat(rows, "drift")] == told["kl_cov"]
    weighted = [a or b for a, b in zip(told["clip_cov"], told["steer"], strict=True)]
    assert [abs(weight - 1) > 0.01 for weight in flat(rows, "weight")] == weighted


def test_samples_of_ppo_have_all_that_grpo_has(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=3, critic_warmup_steps=1, controls=CONTROLS[:1])
    one.train()
    assert token_steps(tmp_path) == [2, 3]  # the first trains the critic alone
    assert ["histograms" in record for record in read_steps(tmp_path)] == [False, True, True]
    for row in read_tokens(tmp_path, 2):
        sizes = {len(row[name]) for name in ("tokens", "advantages", "covariance", "predicted", "control:clip_cov")}
        assert len(sizes) == 1
    rows = read_tokens(tmp_path, 2)
    pairs = torch.tensor([flat(rows, "advantages"), flat(rows, "logps")], dtype=torch.float64)
    expected = (pairs - pairs.mean(1, keepdim=True)).prod(0)
    assert flat(rows, "covariance") == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
