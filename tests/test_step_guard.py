"""A loss or gradient that is not finite never reaches the weights, and is not lost sight of."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import FixedPPO, by_step, flat, policy_trainer
from test_grpo_trainer import FixedRollouts
from torch import Tensor

from rlvr.monitor.records import alerts_of, read_run, read_steps
from rlvr.monitor.summary import format_summary, summarize
from rlvr.trainers.batch_files import read_batches, write_batches
from rlvr.trainers.guard import NonFiniteError

KINDS = {"grpo": FixedRollouts, "ppo": FixedPPO, "shared": FixedPPO}


def run(kind: str, model_dir: Path, out: Path, **settings: Any) -> Any:
    own = {"num_generations": 4} if kind == "grpo" else {"critic_learning_rate": 0.1}
    own |= {"critic": "shared"} if kind == "shared" else {}
    return policy_trainer(KINDS[kind], model_dir, out, optim="adamw_torch", **own, **settings)


def poison_gradient(one: Any, steps: set[int]) -> None:
    """NaN in one parameter's gradient in these optimizer steps."""

    def hook(gradient: Tensor) -> Tensor:
        return gradient * math.nan if one.state.global_step + 1 in steps else gradient

    next(p for p in one.model.parameters() if p.dim() == 1).register_hook(hook)


def of_policy(one: Any) -> list[Tensor]:
    if hasattr(one, "critic"):
        return by_step(one)["policy"]
    return by_step_of_policy(one)


def by_step_of_policy(one: Any) -> list[Tensor]:
    from transformers import TrainerCallback

    found = [flat(one.model)]

    class Remember(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.append(flat(one.model))

    one.add_callback(Remember())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_step_with_a_gradient_that_is_not_finite_is_skipped(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(kind, tiny_model_dir, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=8)
    poison_gradient(one, {2})
    weights = of_policy(one)
    inputs: list[Any] = []
    watch = one.guard.watch
    one.guard.watch = lambda batch: (inputs.append(batch), watch(batch))
    one.train()
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3])
    assert all(w.isfinite().all() for w in weights)
    steps = read_steps(tmp_path)
    assert [record["metrics"]["optim/skipped"] for record in steps] == [0, 1, 0, 0]
    told = f"step 2: optim/grad_norm is nan; its batch is in '{tmp_path}/skipped/step-000002-rank-0.safetensors'"
    assert steps[1]["alerts"] == [{"kind": "skipped", "message": f"{told}. The step is skipped (1 in a row)"}]
    batches, state = read_batches(tmp_path / "skipped/step-000002-rank-0.safetensors")
    assert state == {"step": 2, "rank": 0, "optim/grad_norm": "nan"}
    assert len(batches) == 2
    for saved, used in zip(batches, inputs[2:4], strict=True):
        assert list(saved) == list(used)
        for name, value in used.items():
            assert torch.equal(saved[name], value) if isinstance(value, Tensor) else saved[name] == value
    assert "1 step skipped" in format_summary(summarize(tmp_path))


def test_adam_does_not_move_in_a_skipped_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Neither by its momentum nor by weight decay."""
    one = run("grpo", tiny_model_dir, tmp_path, weight_decay=0.1)
    poison_gradient(one, {3})
    moments: list[Tensor] = []
    close = one.close_step

    def observe() -> None:
        close()
        moments.append(torch.cat([s["exp_avg"].flatten() for s in one.optimizer.state_dict()["state"].values()] or []))

    one.close_step = lambda: observe() if one.state.global_step else close()
    one.train()
    assert torch.equal(moments[1], moments[2])  # before steps 3 and 4
    assert not torch.equal(moments[0], moments[1])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_run_stops_after_too_many_steps_in_a_row(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(kind, tiny_model_dir, tmp_path, max_skipped_steps=2, max_steps=6, num_iterations=2)
    poison_gradient(one, {1, 3, 4})
    before = of_policy(one)
    with pytest.raises(NonFiniteError, match=r"step 4: .*2 such steps in a row \(max_skipped_steps=2\)"):
        one.train()
    assert [record["step"] for record in read_steps(tmp_path)] == [1, 2, 3]
    assert torch.equal(before[-1], flat(one.model)) and before[-1].isfinite().all()
    assert read_run(tmp_path)["error"].startswith("NonFiniteError: step 4")
    assert len(list((tmp_path / "skipped").iterdir())) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_reward_of_a_callable_is_not_scored(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """As a verifier's, which is an error; a function that a user passes in may return anything."""
    one = run(kind, tiny_model_dir, tmp_path)
    honest, calls = one.reward_funcs[0], []

    def reward(**columns: Any) -> list[float]:
        calls.append(1)
        values = honest(**columns)
        return [math.inf, *values[1:]] if len(calls) == 2 else values

    one.reward_funcs[0] = reward
    one.train()
    steps = read_steps(tmp_path)
    assert [record["metrics"]["reward/unscored"] for record in steps] == [0, 1 / 16, 0, 0]
    told = "1 rewards of a step are infinite: such completions count as not scored"
    assert [record.get("alerts") for record in steps] == [None, [{"kind": "reward", "message": told}], None, None]
    assert not any(record["metrics"]["optim/skipped"] for record in steps)
    assert flat(one.model).isfinite().all()


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_gradient_of_a_critic_is_guarded_as_the_policys(critic: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run("ppo", tiny_model_dir, tmp_path, critic=critic, max_skipped_steps=2)
    parameter = next(one.critic.module.parameters())
    parameter.register_hook(lambda gradient: gradient * (math.nan if one.state.global_step in (1, 2) else 1.0))
    weights = by_step(one)
    with pytest.raises(NonFiniteError, match=r"step 3: critic/grad_norm is nan"):
        one.train()
    for part in ("policy", "critic"):
        assert torch.equal(weights[part][1], weights[part][2]) and not torch.equal(*weights[part][:2])
    assert [record["metrics"]["optim/skipped"] for record in read_steps(tmp_path)] == [0, 1]


def test_step_is_skipped_where_its_batch_cannot_be_saved(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run("grpo", tiny_model_dir, tmp_path)
    poison_gradient(one, {2})
    (tmp_path / "skipped").touch()  # no folder
    one.train()
    steps = read_steps(tmp_path)
    (alert,) = alerts_of(steps[1])
    assert alert.message.startswith("step 2: optim/grad_norm is nan; its batch could not be saved (")
    assert steps[1]["metrics"]["optim/skipped"] == 1 and flat(one.model).isfinite().all()


def test_batch_files_keep_order_values_and_state(tmp_path: Path) -> None:
    batches = [
        {"b": torch.arange(3), "none": None, "a": torch.tensor(2.5), "n": [1, 2]},
        {"x": torch.ones(2, 2)[:, 0]},
    ]
    write_batches(tmp_path / "deep/file.safetensors", batches, {"step": 7})
    found, state = read_batches(tmp_path / "deep/file.safetensors")
    assert state == {"step": 7}
    assert [list(batch) for batch in found] == [["b", "none", "a", "n"], ["x"]]
    assert torch.equal(found[0]["a"], torch.tensor(2.5)) and found[0]["n"] == [1, 2]
    assert torch.equal(found[1]["x"], torch.ones(2))
