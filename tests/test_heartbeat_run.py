"""Heartbeat and stalls of real runs, of which no thread is left."""

from pathlib import Path
from typing import Any

import pytest
import resume_run
from ppo_cases import policy_trainer
from test_grpo_trainer import FixedRollouts
from test_heartbeat import FILE, THREADS, our_threads, wait_for

from rlvr.errors import ConfigError
from rlvr.monitor.records import alerts_of, read_run, read_steps, series


def run(model_dir: Path, out: Path, **settings: Any) -> Any:
    return policy_trainer(FixedRollouts, model_dir, out, num_generations=4, **settings)


def test_stall_of_a_real_run_is_in_the_record_of_the_step_that_was_slow(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(tiny_model_dir, tmp_path, stall_alarm=1.5, max_steps=2)
    honest, beats = one.reward_funcs[0], []

    def slow(**columns: Any) -> list[float]:
        if not beats:
            wait_for(lambda: "the run is at: verify" in caplog.text, 20.0)
        beats.append((tmp_path / FILE).exists())
        return honest(**columns)

    one.reward_funcs[0] = slow
    one.train()
    first, *_ = read_steps(tmp_path)
    (alert,) = [alert for alert in alerts_of(first) if alert.kind == "stall"]
    assert alert.message.endswith(" s since the run began; the run is at: verify")
    assert beats == [True, True]
    assert not (tmp_path / FILE).exists() and not our_threads()


def test_long_evaluation_is_told_as_one(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"eval_on_start": True, "eval_strategy": "steps", "num_generations_eval": 2, "save_strategy": "no"}
    settings |= {"per_device_eval_batch_size": 2, "stall_alarm": 1.5, "max_steps": 1}
    one = resume_run.trainer("grpo", str(tiny_model_dir), str(tmp_path), **settings)
    honest = one.reward_funcs[0]

    def slow(**columns: Any) -> list[float]:
        if not one.model.training:
            wait_for(lambda: "the run is at: evaluation" in caplog.text, 20.0)
        return honest(**columns)

    one.reward_funcs[0] = slow
    one.train()
    assert [alert.kind for record in read_steps(tmp_path) for alert in alerts_of(record)] == ["stall"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_no_thread_is_left_by_a_run_that_was_stopped(
    error: BaseException, tiny_model_dir: Path, tmp_path: Path
) -> None:
    one = run(tiny_model_dir, tmp_path)
    assert not our_threads()
    compute = one._compute_loss

    def stopped(*arguments: Any) -> Any:
        assert our_threads() == THREADS
        if one.state.global_step == 1:
            raise error
        return compute(*arguments)

    one._compute_loss = stopped
    with pytest.raises(type(error)):
        one.train()
    assert not our_threads() and not (tmp_path / FILE).exists()
    assert read_run(tmp_path)["status"] in ("failed", "interrupted")


def test_no_thread_is_begun_by_a_run_that_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(tiny_model_dir, tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny_model_dir, tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match="no column 'prompt'"):
        rows = run(tiny_model_dir, tmp_path / "other").train_dataset.rename_column("prompt", "question")
        type(run(tiny_model_dir, tmp_path / "other"))("no/model", [], run(tiny_model_dir, tmp_path).args, rows)
    assert not our_threads()


def test_resumed_run_knows_how_long_its_steps_take(tiny_model_dir: Path, tmp_path: Path) -> None:
    run(tiny_model_dir, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    kept = series(read_steps(tmp_path), "time/step")[1]
    one = run(tiny_model_dir, tmp_path, max_steps=3, save_strategy="no")
    compute, known = one._compute_loss, []
    one._compute_loss = lambda *a: (known.extend(one.run_callback._lookout._heartbeat._seconds), compute(*a))[1]
    one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert known[:2] == kept and len(kept) == 2


def test_saving_is_told_as_a_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(tiny_model_dir, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    save, seen = one.save_model, []
    one.save_model = lambda *a, **k: (seen.append(one.run_callback._doing()[0]), save(*a, **k))
    compute = one._compute_loss
    one._compute_loss = lambda *a: (seen.append(one.run_callback._doing()[0]), compute(*a))[1]
    one.train()
    assert seen == ["update", "checkpoint"] and one.run_callback._doing()[0] == ""
