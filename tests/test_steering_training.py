"""Controllers and budgets inside the trainer: what moves from step to step, and what a checkpoint keeps of it."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_grpo_trainer import trainer, weights

from rlvr.monitor.records import read_steps

THERMOSTAT = {"lever": "kl_cov.coef", "low": 8.0, "high": 9.0, "lowest": 0.0, "highest": 5.0, "rate": 0.05}
ALL_ROLLOUT = [
    {"name": "clip_cov", "fraction": 0.1, "low": 0.1, "high": 50.0},
    {"name": "kl_cov", "fraction": 0.1},
    {"name": "clip_b", "mu": 0.2},
    {"name": "clip_v", "mu": 0.2, "max_fraction": 0.05},
    {"name": "high_entropy", "fraction": 0.5},
    {"name": "entropy_advantage"},
    {"name": "entropy_bonus", "coef": 0.01},
    {"name": "reference_kl", "coef": 0.1},
    {"name": "token_budget", "tokens": 40},
    {"name": "token_budget", "tokens": 40, "whole_responses": True},
    *({"name": "steer", "form": form, "min_weight": 0.5} for form in ("theorem", "released", "full")),
]


@pytest.mark.parametrize("control", ALL_ROLLOUT, ids=lambda c: "-".join(str(x) for x in c.values()))
def test_control_does_not_depend_on_the_micro_batch_size(
    control: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    histories, ends = [], []
    for size in (16, 4):
        one = trainer(
            tiny_model_dir,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            num_iterations=2,
            controls=[control],
            max_steps=2,
            learning_rate=0.05,
        )
        start = weights(one)
        one.train()
        histories.append([entry for entry in one.state.log_history if "loss" in entry])
        ends.append(weights(one))
    for a, b in zip(*histories, strict=True):
        for name in a:
            if name.startswith((control["name"] + "/", "policy/", "entropy/", "covariance/")):
                assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-7), name
    moved = (ends[0] - start).norm()
    assert moved > 0
    assert (ends[0] - ends[1]).norm() < 1e-4 * moved


@pytest.mark.parametrize("whole", [False, True])
def test_token_budget_is_kept_by_every_step(whole: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two optimizer steps deal with different halves of a rollout; each trains on its own budget."""
    control = {"name": "token_budget", "tokens": 20, "whole_responses": whole}
    one = trainer(
        tiny_model_dir,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        controls=[control],
    )
    one.train()
    for record in read_steps(tmp_path):
        tokens = record["metrics"]["policy/tokens"]
        assert 20 <= tokens < 28 if whole else tokens == 20


def test_token_budget_counts_what_other_controls_keep(tiny_model_dir: Path, tmp_path: Path) -> None:
    controls = [{"name": "clip_b", "mu": 0.0}, {"name": "token_budget", "tokens": 20}]
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, controls=controls)
    one.train()
    steps = [record["metrics"] for record in read_steps(tmp_path)]
    assert any(step["clip_b/masked"] > 0.1 for step in steps)
    assert all(step["policy/tokens"] == 20 for step in steps)


def test_token_budget_larger_than_the_batch_divides_by_the_budget(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The gradient of token-mean aggregation, made smaller by tokens over budget."""
    plain = trainer(tiny_model_dir, tmp_path / "plain", per_device_train_batch_size=16, max_steps=1)
    plain.train()
    tokens = plain.step_metrics["policy/tokens"]
    assert tokens < 120
    budget = {"name": "token_budget", "tokens": 120}
    less = trainer(tiny_model_dir, tmp_path / "less", per_device_train_batch_size=16, max_steps=1, controls=[budget])
    less.train()
    assert less.step_metrics["token_budget/filled"] == pytest.approx(tokens / 120)
    expected = plain.step_metrics["optim/grad_norm"] * tokens / 120
    assert less.step_metrics["optim/grad_norm"] == pytest.approx(expected, rel=1e-5)


def moving(model_dir: Path, out: Path, **settings: Any) -> Any:
    return trainer(
        model_dir,
        out,
        per_device_train_batch_size=16,
        num_iterations=2,
        controls=[{"name": "kl_cov", "fraction": 0.1}, {"name": "entropy_bonus", "coef": 0.001}],
        thermostat=THERMOSTAT,
        **settings,
    )


def test_thermostat_moves_its_lever_and_is_resumed_where_it_was(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = moving(tiny_model_dir, tmp_path / "whole", max_steps=6, learning_rate=0.0)
    whole.train()
    expected = [record["metrics"]["thermostat/value"] for record in read_steps(tmp_path / "whole")]
    assert len(set(expected)) == 6  # entropy is far below the band
    assert all(b - a == pytest.approx(0.25) for a, b in pairwise(expected))
    assert whole.steering.controls["kl_cov"].coef == expected[-1]

    out = tmp_path / "cut"
    moving(tiny_model_dir, out, max_steps=2, learning_rate=0.0, save_strategy="steps", save_steps=2).train()
    saved = json.loads((out / "checkpoint-2/trainer_state.json").read_text())["stateful_callbacks"]["RunCallback"]
    assert saved["attributes"]["thermostat"]["value"] == expected[1]
    resumed = moving(tiny_model_dir, out, max_steps=6, learning_rate=0.0)
    resumed.train(resume_from_checkpoint=True)
    assert [record["metrics"]["thermostat/value"] for record in read_steps(out)] == expected


def test_checkpoint_without_our_state_is_resumed_and_saved_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    moving(tiny_model_dir, out, max_steps=2, save_strategy="steps", save_steps=2).train()
    path = out / "checkpoint-2/trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunCallback"]
    path.write_text(json.dumps(state))
    moving(tiny_model_dir, out, max_steps=4, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)
    assert "RunCallback" in json.loads((out / "checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]


def test_adaptive_entropy_pays_a_bonus_only_below_its_target(tiny_model_dir: Path, tmp_path: Path) -> None:
    below, above = (
        trainer(
            tiny_model_dir,
            tmp_path / str(target),
            per_device_train_batch_size=16,
            controls=[{"name": "adaptive_entropy", "target": target, "delta": 0.001}],
        )
        for target in (10.0, 0.01)
    )
    below.train()
    above.train()
    applied = [entry["adaptive_entropy/applied"] for entry in below.state.log_history if "loss" in entry]
    assert applied == pytest.approx([0.0, 0.001, 0.002, 0.003])  # observed in a step, applied from the next
    assert above.step_metrics["adaptive_entropy/applied"] == 0


def test_entropy_bonus_raises_entropy(tiny_model_dir: Path, tmp_path: Path) -> None:
    entropies = []
    for coef in (1e-6, 1.0):
        controls = [{"name": "entropy_bonus", "coef": coef}]
        one = trainer(tiny_model_dir, tmp_path / str(coef), per_device_train_batch_size=16, controls=controls)
        one.train()
        entropies.append(one.step_metrics["entropy/mean"])
    assert entropies[1] > entropies[0]


def test_entropy_of_the_rollout_costs_no_pass_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Where the log-probs are recomputed anyway; and it is the entropy of the policy that made the rollout."""
    passes = {}
    for name in ("kl_cov", "high_entropy"):
        one = trainer(
            tiny_model_dir,
            tmp_path / name,
            per_device_train_batch_size=16,
            num_iterations=2,
            controls=[name],
            max_steps=2,
        )
        calls: list[bool] = []
        forward = one._pass

        def counted(*args: Any, forward: Any = forward, calls: list[bool] = calls, **kwargs: Any) -> Any:
            calls.append(True)
            return forward(*args, **kwargs)

        one._pass = counted
        one.train()
        passes[name] = len(calls)
    assert passes["high_entropy"] == passes["kl_cov"] == 3  # once for the rollout, once for each update
