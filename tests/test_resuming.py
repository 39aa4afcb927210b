"""What a checkpoint and a resumed run do beside going on: the best one, evaluations, changed settings, exports."""

from pathlib import Path
from typing import Any

import pytest
import resume_run
import torch
from ppo_cases import flat
from safetensors.torch import load_file

from rlvr.errors import ConfigError, RunError
from rlvr.monitor.records import read_evals, read_run, read_steps
from rlvr.trainers import checkpoints
from rlvr.trainers.checkpoints import ASIDE, commit, complete_checkpoints, rotate

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "num_generations_eval": 2,
    "per_device_eval_batch_size": 2,
}


def trainer(model_dir: Path, out: Path, kind: str = "grpo", **settings: Any) -> Any:
    return resume_run.trainer(kind, str(model_dir), str(out), **{"max_steps": 3, "save_steps": 1, **settings})


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_best_checkpoint_is_kept_loaded_and_found_again(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """With room for one only; and by a run that was killed after its last checkpoint."""
    one = trainer(tiny_model_dir, tmp_path, kind, save_total_limit=1, **BEST)
    one.train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    best = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert all(torch.equal(x, best[name]) for name, x in one.model.state_dict().items() if name in best)
    again = trainer(tiny_model_dir, tmp_path, kind, save_total_limit=1, **BEST)
    assert again.train(resume_from_checkpoint="auto").global_step == 3
    assert torch.equal(flat(again.model), flat(one.model))
    assert len(read_steps(tmp_path)) == 3
    if kind == "ppo":
        assert torch.equal(flat(again.critic.module), flat(one.critic.module))


def test_evaluations_of_an_epochs_end_are_in_its_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"eval_strategy": "epoch", "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    one = trainer(tiny_model_dir, tmp_path, max_steps=12, save_steps=6, **settings)  # 6 steps per epoch
    seen: list[list[int]] = []
    save = one._save_checkpoint
    one._save_checkpoint = lambda *a: (seen.append([r["step"] for r in read_evals(tmp_path)]), save(*a))
    one.train()
    assert seen == [[6], [6, 12]]
    assert [record["step"] for record in read_evals(tmp_path)] == [6, 12]


def test_evaluation_on_start_is_not_made_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"eval_on_start": True, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    trainer(tiny_model_dir, tmp_path, save_steps=2, **settings).train()
    again = trainer(tiny_model_dir, tmp_path, save_steps=2, **{**settings, "max_steps": 4})
    again.train(resume_from_checkpoint=True)
    assert [record["step"] for record in read_evals(tmp_path)] == [0, 3, 4]


def test_second_evaluation_of_a_step_is_recorded_under_its_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 3, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    one = trainer(tiny_model_dir, tmp_path, **settings)
    one.train()
    one.evaluate(metric_key_prefix="other")
    assert [(record["step"], record.get("name")) for record in read_evals(tmp_path)] == [(3, None), (3, "other")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps=1 \(was 2\)"),
        ({"num_iterations": 1}, r"num_iterations=1 \(was 2\)"),
    ],
)
def test_resuming_otherwise_is_said(changes: dict[str, int], told: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "num_iterations": 2, "steps_per_generation": 2}
    trainer(tiny_model_dir, tmp_path, **settings).train()
    again = trainer(tiny_model_dir, tmp_path, **{**settings, **changes, "max_steps": 6})
    with pytest.warns(UserWarning, match=told):
        again.train(resume_from_checkpoint=True)
    assert [record["step"] for record in read_steps(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_resuming_from_weights_alone_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer(tiny_model_dir, tmp_path, save_only_model=True).train()
    with pytest.warns(UserWarning, match="optimizer, schedule and random numbers start afresh"):
        trainer(tiny_model_dir, tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_interrupted_run_goes_on_in_the_same_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in a notebook, in the middle of a step."""
    whole = trainer(tiny_model_dir, tmp_path / "whole", save_steps=2, max_steps=5, num_iterations=2)
    whole.train()
    one = trainer(tiny_model_dir, tmp_path / "one", save_steps=2, max_steps=5, num_iterations=2)
    compute = one._compute_loss

    def interrupted(*arguments: Any) -> Any:
        if one.state.global_step == 3:
            one._compute_loss = compute
            raise KeyboardInterrupt
        return compute(*arguments)

    one._compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert read_run(tmp_path / "one")["status"] == "interrupted"
    one.train(resume_from_checkpoint=True)
    steps, expected = (read_steps(tmp_path / name) for name in ("one", "whole"))
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    for a, b in zip(steps, expected, strict=True):
        assert a["metrics"]["policy/loss"] == b["metrics"]["policy/loss"]
    assert torch.equal(flat(one.model), flat(whole.model))


def test_export_replaces_a_folder_but_never_a_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path / "run")
    one.train()
    for folder in (tmp_path / "run", tmp_path):
        with pytest.raises(ConfigError, match="holds a run, which would be replaced"):
            one.export(str(folder))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    one.export(str(tmp_path / "model"))
    assert (tmp_path / "model/model.safetensors").is_file() and not (tmp_path / "model/old").exists()
    assert len(complete_checkpoints(tmp_path / "run")) == 3 and not list(tmp_path.glob(".partial*"))


def test_export_that_fails_leaves_the_old_folder(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tiny_model_dir, tmp_path / "run", save_strategy="no")
    one.export(str(tmp_path / "model"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(one, "save_model", fail)
    with pytest.raises(RunError, match="No space left on device"):
        one.export(str(tmp_path / "model"))
    assert (tmp_path / "model/model.safetensors").is_file() and not list(tmp_path.glob(".partial*"))


def checkpoint(output_dir: Path, step: int) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    return path


def test_rotation_keeps_the_newest_by_number_and_the_best(tmp_path: Path) -> None:
    for step in (30, 4, 10, 20):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 5).rename(tmp_path / "checkpoint-mine")
    rotate(tmp_path, 2, "elsewhere/checkpoint-4")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-30"]
    rotate(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-30"]
    rotate(tmp_path, None)
    rotate(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-30"]
    assert (tmp_path / "checkpoint-mine").is_dir()


def test_rotation_goes_on_where_a_file_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step)

    def refuse(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    rotate(tmp_path, 1)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_commit_of_what_is_not_there_leaves_the_old_one(tmp_path: Path) -> None:
    final = checkpoint(tmp_path, 1)
    with pytest.raises(OSError, match="No such file"):
        commit(tmp_path / ASIDE / "checkpoint-1", final)
    assert complete_checkpoints(tmp_path) == [final]
