"""A run that lives says so, and one that does not get on is told of; no thread outlives a run."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import resume_run
from ppo_cases import policy_trainer
from test_grpo_trainer import FixedRollouts

from rlvr.alarm import Alert
from rlvr.errors import ConfigError
from rlvr.monitor.heartbeat import Heartbeat
from rlvr.monitor.lookout import Lookout
from rlvr.monitor.records import alerts_of, read_run, read_steps

FILE = "heartbeat"


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rlvr-")]


def test_heartbeat_renews_its_file_and_removes_it(tmp_path: Path) -> None:
    one = Heartbeat(tmp_path, every=0.02)
    try:
        assert (tmp_path / FILE).read_bytes() == b""  # before the first wait
        os.utime(tmp_path / FILE, (0, 0))
        wait_for(lambda: abs(time.time() - (tmp_path / FILE).stat().st_mtime) < 2)
    finally:
        one.close()
    assert not (tmp_path / FILE).exists() and not our_threads()


def test_heartbeat_outlives_a_disk_that_refuses_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = Heartbeat(folder, every=0.02)  # a folder that is not there
    try:
        time.sleep(0.1)
        folder.mkdir()
        wait_for((folder / FILE).exists)
    finally:
        one.close()
    assert not our_threads()


def test_stall_is_told_once_and_given_to_the_next_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, Alert]] = []
    one = Heartbeat(tmp_path, step=7, stall_after=0.2, doing=lambda: "verify", tell=lambda *a: told.append(a))
    try:
        wait_for(lambda: told)
        time.sleep(0.3)
        ((step, alert),) = told
        assert step == 8 and alert.kind == "stall"
        assert re.fullmatch(
            r"no optimizer step was completed for \d s after step 7; the run is at: verify", alert.message
        )
        assert caplog.messages == [alert.message]
        assert one.step_done(8) == [alert]
        assert one.step_done(9) == []
        wait_for(lambda: len(told) > 1)  # and again, if there is another
        assert told[1][0] == 10 and "after step 9" in told[1][1].message
    finally:
        one.close()


def test_stall_takes_ten_usual_steps(tmp_path: Path) -> None:
    told: list[Any] = []
    one = Heartbeat(tmp_path, stall_after=0.05, tell=lambda *a: told.append(a))
    try:
        wait_for(lambda: told)
        for step in range(1, 4):
            time.sleep(0.1)
            one.step_done(step)
        told.clear()
        time.sleep(0.5)
        assert not told
        wait_for(lambda: told)
    finally:
        one.close()


def test_stall_is_never_told_without_a_limit(tmp_path: Path) -> None:
    one = Heartbeat(tmp_path, stall_after=float("inf"), every=0.01)
    time.sleep(0.1)
    one.close()
    assert one.step_done(1) == []


def test_heartbeat_goes_on_when_what_it_calls_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Heartbeat(tmp_path, stall_after=0.02, every=0.02, doing=lambda: str(1 // 0))
    try:
        wait_for(lambda: "the watch for stalls failed" in caplog.text)
        os.utime(tmp_path / FILE, (0, 0))
        wait_for(lambda: time.time() - (tmp_path / FILE).stat().st_mtime < 2)
        assert one.step_done(1) == []
    finally:
        one.close()


def test_lookout_may_be_stopped_twice_and_started_again(tmp_path: Path) -> None:
    one = Lookout(tmp_path)
    one.stop(0)
    assert not our_threads() and one.step_done(1) == []
    for _ in range(2):
        one.start(1)
        one.start(1)
        assert our_threads() == ["rlvr-heartbeat"]
        one.stop(1)
        one.stop(1)
        assert not our_threads() and not (tmp_path / FILE).exists()


# real runs


def run(model_dir: Path, out: Path, **settings: Any) -> Any:
    return policy_trainer(FixedRollouts, model_dir, out, num_generations=4, **settings)


def test_stall_of_a_real_run_is_in_the_record_of_the_step_that_was_slow(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(tiny_model_dir, tmp_path, stall_alarm=3.0, max_steps=2)
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
    settings |= {"per_device_eval_batch_size": 2, "stall_alarm": 3.0, "max_steps": 1}
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
        assert our_threads() == ["rlvr-heartbeat"]
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


def test_saving_is_told_as_a_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(tiny_model_dir, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    save, seen = one.save_model, []
    one.save_model = lambda *a, **k: (seen.append(one.run_callback._doing()), save(*a, **k))
    compute = one._compute_loss
    one._compute_loss = lambda *a: (seen.append(one.run_callback._doing()), compute(*a))[1]
    one.train()
    assert seen == ["update", "checkpoint"] and one.run_callback._doing() == ""
