"""Predicted against measured entropy change inside the trainer, and the moments that it rests on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_grpo_trainer import trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr.monitor.records import read_steps
from rlvr.theory import discriminator, entropy
from rlvr.theory import mean_discriminator as exact_mean_discriminator
from rlvr.trainers.dynamics import squared_discriminator
from rlvr.trainers.forward import completion_statistics, mean_discriminator
from rlvr.trainers.head import add_token_stats


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_moments_equal_those_of_the_logits(temperature: float, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    batch = tokenizer(["ab", "abcdef", "x"], return_tensors="pt", padding=True)
    completion = torch.randint(3, 100, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    ids = torch.cat([batch["input_ids"], completion], dim=1)
    attention = torch.cat([batch["attention_mask"], mask], dim=1)
    want = ("logps", "entropy", "sum_p2", "sum_p2_logp", "sum_p2_logp2")
    add_token_stats(model, temperature=temperature)
    found, _ = completion_statistics(model, ids, attention, mask.bool(), want, batch_size=2)
    logits = model(ids, attention_mask=attention).logits[:, -6:-1].double() / temperature
    expected = {
        "entropy": entropy(logits),
        "logps": logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0],
    }
    valid = mask.bool()
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double()[valid], x[valid], rtol=0, atol=1e-5)
        assert (found[name][~valid] == 0).all()
    flat = {name: x[valid] for name, x in found.items()}
    torch.testing.assert_close(
        mean_discriminator(flat).double(), exact_mean_discriminator(logits)[valid], rtol=0, atol=1e-6
    )
    squares = discriminator(logits).square().sum(-1)[valid]
    torch.testing.assert_close(squared_discriminator(flat), squares, rtol=0, atol=1e-6)


def run(model_dir: Path, out: Path, **settings: Any) -> list[dict[str, float]]:
    one = trainer(
        model_dir,
        out,
        per_device_train_batch_size=16,
        num_iterations=2,
        probe_sequences=16,
        skip_idle_sequences=False,  # every sequence measured anew in every update
        save_strategy="no",
        **settings,
    )
    one.train()
    return [record["metrics"] for record in read_steps(out)]


def test_measured_change_is_the_change_of_the_recorded_entropy(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With the whole step in the probe, what it measures is how the step's own entropy moved to the next pass."""
    steps = run(tiny_model_dir, tmp_path, max_steps=4)
    for first, second in ((0, 1), (2, 3)):  # two updates on one rollout
        moved = steps[second]["entropy/mean"] - steps[first]["entropy/mean"]
        assert steps[first]["dynamics/measured"] == pytest.approx(moved, abs=2e-6)
        assert moved != 0


def test_prediction_agrees_with_the_measured_change(tiny_model_dir: Path, tmp_path: Path) -> None:
    step = run(tiny_model_dir, tmp_path, max_steps=1, learning_rate=1e-3)[0]
    assert step["dynamics/discriminator_correlation"] > 0
    assert step["dynamics/predicted"] == step["dynamics/discriminator_mean"] != 0
    parts = [
        step[f"dynamics/predicted_{sign}_{side}"]
        for sign in ("rewarded", "punished")
        for side in ("likely", "unlikely")
    ]
    assert sum(parts) == pytest.approx(step["dynamics/predicted"], abs=1e-9)
    for name in ("covariance", "single_logit", "steer", "steer_released", "discriminator"):
        assert -1 <= step[f"dynamics/{name}_correlation"] <= 1
        assert step[f"dynamics/{name}_r2"] == pytest.approx(step[f"dynamics/{name}_correlation"] ** 2)
        assert math.isfinite(step[f"dynamics/{name}_slope"])


def test_effects_of_controls_are_what_they_take_from_the_prediction(tiny_model_dir: Path, tmp_path: Path) -> None:
    mask = {"name": "clip_cov", "fraction": 1.0, "low": -1e6, "high": 1e6}
    bonus = {"name": "entropy_bonus", "coef": 0.1}
    alone = run(tiny_model_dir, tmp_path / "alone", max_steps=1)[0]
    masked = run(tiny_model_dir, tmp_path / "masked", max_steps=1, controls=[mask])[0]
    assert masked["dynamics/predicted"] == 0
    assert masked["clip_cov/effect"] == pytest.approx(-alone["dynamics/predicted"], rel=1e-6)
    raised = run(tiny_model_dir, tmp_path / "bonus", max_steps=1, controls=[bonus])[0]
    assert raised["entropy_bonus/effect"] > 0
    assert raised["entropy_bonus/effect"] == pytest.approx(
        raised["dynamics/predicted"] - alone["dynamics/predicted"], rel=1e-5
    )
    both = run(tiny_model_dir, tmp_path / "both", max_steps=1, controls=[mask, bonus])[0]
    assert both["dynamics/measured"] > 0  # nothing but the bonus is left


def test_before_and_after_are_measured_as_the_policy_is_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Under autocast the probe's entropy change is that of the recorded, autocast entropy."""
    steps = run(tiny_model_dir, tmp_path, max_steps=2, bf16=True)
    moved = steps[1]["entropy/mean"] - steps[0]["entropy/mean"]
    assert steps[0]["dynamics/measured"] == pytest.approx(moved, abs=2e-5)


def test_nothing_is_computed_for_instruments_that_are_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, diagnostics=False, max_steps=1)
    one.train()
    assert not any(name.startswith(("dynamics/", "covariance/")) for name in one.step_metrics)


def test_diagnostics_describe_the_steps_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(
        tiny_model_dir,
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=1,
        controls=[{"name": "clip_b", "mu": 0.5}],  # what it takes out still has an entropy
    )
    one.train()
    record = read_steps(tmp_path)[0]
    metrics, bins = record["metrics"], record["entropy_by_position"]
    tops = [metrics[f"covariance/top_2_in_{n}"] for n in (10000, 1000, 100, 10)]
    assert tops == sorted(tops, reverse=True) and tops[-1] > metrics["covariance/mean"]
    assert 0.5 <= metrics["entropy/share_top_50pct"] <= 1
    kept, whole = (sum(record["histograms"][name]) for name in ("covariance", "entropy"))
    assert kept == metrics["policy/tokens"] < whole == sum(bins["count"]) == metrics["rollout/tokens"]
    mean = sum(m * n for m, n in zip(bins["mean"], bins["count"], strict=True)) / sum(bins["count"])
    assert mean == pytest.approx(metrics["entropy/mean"], rel=1e-6)
