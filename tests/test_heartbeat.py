"""A run that lives says so, and one that does not get on is told of; no thread outlives a run."""

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvr.alarm import Alert
from rlvr.monitor.heartbeat import Heartbeat
from rlvr.monitor.lookout import Lookout
from rlvr.trainers.clock import PhaseClock

FILE = "heartbeat"
THREADS = ["rlvr-heartbeat", "rlvr-stalls"]


def verify() -> tuple[str, float]:
    """What a run is at since ever."""
    return "verify", -math.inf


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
        first = json.loads((tmp_path / FILE).read_text())  # before the first wait
        assert first == {"step": 0, "doing": "", "since": pytest.approx(time.time(), abs=5), "stall": None}
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
    one = Heartbeat(tmp_path, step=7, stall_after=0.2, doing=verify, tell=lambda *a: told.append(a))
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


def test_first_step_of_a_process_has_three_times_as_long(tmp_path: Path) -> None:
    told: list[Any] = []
    began = time.monotonic()
    one = Heartbeat(tmp_path, step=4, stall_after=0.3, tell=lambda *a: told.append(time.monotonic()))
    try:
        wait_for(lambda: told)
        assert told[0] - began > 0.9
    finally:
        one.close()


def test_usual_time_of_a_step_is_known_of_the_steps_before(tmp_path: Path) -> None:
    told: list[Any] = []
    settings = {"stall_after": 0.02, "tell": lambda *a: told.append(a)}
    one = Heartbeat(tmp_path, seconds=[0.1, 0.1, math.nan, 0.1], **settings)
    try:
        time.sleep(0.5)
        assert not told
        wait_for(lambda: told)
    finally:
        one.close()


def test_phase_is_judged_from_its_own_start(tmp_path: Path) -> None:
    told: list[Any] = []
    at = ["evaluation", time.perf_counter()]
    one = Heartbeat(tmp_path, stall_after=0.2, doing=lambda: (at[0], at[1]), tell=lambda *a: told.append(a[1].message))
    try:
        one.step_done(1)
        for n in range(10):  # for a second in all
            at[:] = f"phase {n}", time.perf_counter()
            time.sleep(0.1)
        assert not told
        wait_for(lambda: told)
        assert re.fullmatch(
            r"no optimizer step was completed for [1-9] s after step 1; the run is at: phase 9", told[0]
        )
    finally:
        one.close()


def test_file_tells_what_the_run_is_at_and_a_stall_as_long_as_it_lasts(tmp_path: Path) -> None:
    began = time.perf_counter()
    one = Heartbeat(tmp_path, step=3, stall_after=0.1, doing=lambda: ("verify", began), every=0.02)
    try:
        wait_for(lambda: told_by(tmp_path)["stall"])
        told = told_by(tmp_path)
        assert told["step"] == 3 and told["doing"] == "verify" and abs(time.time() - told["since"]) < 5
        assert told["stall"].endswith("after step 3; the run is at: verify")
        one.step_done(4)
        wait_for(lambda: told_by(tmp_path)["step"] == 4)
        assert told_by(tmp_path)["since"] > told["since"] and list(tmp_path.iterdir())
    finally:
        one.close()
    assert not list(tmp_path.iterdir())


def told_by(folder: Path) -> dict[str, Any]:
    """Always whole."""
    return json.loads((folder / FILE).read_text())


def test_stall_is_told_although_the_disk_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    one = Heartbeat(tmp_path, stall_after=0.3, every=0.02, tell=lambda *a: told.append(a))
    held, go = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "utime", lambda *a: (held.set(), go.wait(30)))
    try:
        wait_for(held.is_set)
        wait_for(lambda: told)
    finally:
        go.set()
        one.close()
    assert not our_threads()


def test_clock_says_since_when_a_phase_lasts() -> None:
    clock = PhaseClock()
    with clock.phase("evaluation"):
        name, began = clock.doing
        with clock.phase("rollout"):
            assert clock.doing == (name, began) == ("evaluation", began)
    with clock.phase("old_logps"):
        _, first = clock.doing
        with clock.phase("rollout"):
            assert clock.doing[0] == "rollout" and clock.doing[1] > first > began
        assert clock.doing[0] == "old_logps" and clock.doing[1] > first


def test_stall_is_never_told_without_a_limit(tmp_path: Path) -> None:
    one = Heartbeat(tmp_path, stall_after=float("inf"), every=0.01)
    time.sleep(0.1)
    one.close()
    assert one.step_done(1) == []


def test_heartbeat_goes_on_when_what_it_calls_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = Heartbeat(tmp_path, stall_after=0.02, every=0.02, doing=lambda: ("", 1 / 0))
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
        assert our_threads() == THREADS
        one.stop(1)
        one.stop(1)
        assert not our_threads() and not (tmp_path / FILE).exists()
