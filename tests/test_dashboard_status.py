"""Whether a run lives, by what it left in its directory and when."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlvr.monitor.status import HEARTBEAT, Status, run_status

NOW = 1_000_000.0
RUNNING = {"status": "running", "started": NOW - 50_000}


def state(run_dir: Path, beat: float | None, silent: float | None, usual: float | None = 10.0, **run: Any) -> str:
    """beat: age of the heartbeat, None for no such file.   silent: age of the last record."""
    if beat is not None:
        (run_dir / HEARTBEAT).touch()
        os.utime(run_dir / HEARTBEAT, (NOW - beat, NOW - beat))
    return run_status(run_dir, RUNNING | run, None if silent is None else NOW - silent, usual, NOW).state


@pytest.mark.parametrize(
    ("beat", "silent", "usual", "expected"),
    [
        (5.0, 20.0, 10.0, "running"),
        (5.0, 299.0, 10.0, "running"),
        (5.0, 301.0, 10.0, "stalled"),  # at least 300 s
        (5.0, 301.0, 40.0, "running"),  # a step may take ten times as long as usual
        (5.0, 401.0, 40.0, "stalled"),
        (5.0, 301.0, None, "stalled"),
        (59.0, 20.0, 10.0, "running"),
        (61.0, 20.0, 10.0, "dead"),
        (61.0, 5000.0, 1000.0, "dead"),
        (-30.0, 20.0, 10.0, "running"),  # a file server whose clock is ahead
        (None, 599.0, 10.0, "running"),
        (None, 601.0, 10.0, "dead"),  # at least 600 s without a heartbeat to go by
        (None, 601.0, 100.0, "running"),
        (None, 1001.0, 100.0, "dead"),
    ],
)
def test_status_of_a_running_run(beat, silent, usual, expected, tmp_path):
    assert state(tmp_path, beat, silent, usual) == expected


def test_status_before_the_first_step_is_running_as_long_as_it_lives(tmp_path):
    assert state(tmp_path, 5.0, None, None) == "running"
    found = run_status(tmp_path, RUNNING, None, None, NOW)
    assert found.detail == "no step for 14 hours: the first may take long"
    assert state(tmp_path, 100.0, None, None) == "dead"


def test_status_without_heartbeat_and_steps_goes_by_the_start(tmp_path):
    assert state(tmp_path, None, None, started=NOW - 500) == "running"
    assert state(tmp_path, None, None, started=NOW - 700) == "dead"


def test_status_of_a_resumed_run_goes_by_the_resumption(tmp_path):
    resumed = [{"step": 2, "time": NOW - 100}]
    assert state(tmp_path, None, 40_000.0, resumed=resumed) == "running"
    assert state(tmp_path, 5.0, 40_000.0, resumed=resumed) == "running"


@pytest.mark.parametrize("said", ["finished", "failed", "interrupted"])
def test_status_that_a_run_has_written_stands(said, tmp_path):
    found = run_status(tmp_path, {"status": said, "error": "out of memory"}, NOW - 1e6, 1.0, NOW)
    assert (found.state, found.detail) == (said, "out of memory")
    assert run_status(tmp_path, {"status": said, "error": None}, None, None, NOW).detail == ""


def test_status_without_run_json_is_unknown(tmp_path):
    assert run_status(tmp_path, {}, NOW, 1.0, NOW).state == "unknown"


def test_status_says_for_how_long(tmp_path):
    (tmp_path / HEARTBEAT).touch()
    os.utime(tmp_path / HEARTBEAT, (NOW - 7300, NOW - 7300))
    assert run_status(tmp_path, RUNNING, NOW - 9000, 10.0, NOW).detail.startswith("no sign of life for 2 hours:")
    os.utime(tmp_path / HEARTBEAT, (NOW, NOW))
    stalled = run_status(tmp_path, RUNNING, NOW - 400, 12.0, NOW)
    said = "its process lives, but nothing was recorded for 7 minutes; a step usually takes 12 seconds"
    assert (stalled.state, stalled.detail) == ("stalled", said)


def beating(run_dir: Path, age: float, told: Any) -> None:
    """A heartbeat of this age, which tells this."""
    path = run_dir / HEARTBEAT
    path.write_bytes(told if isinstance(told, bytes) else json.dumps(told).encode())
    os.utime(path, (NOW - age, NOW - age))


def test_status_tells_what_a_dead_or_stalled_run_was_at(tmp_path):
    stall = "no optimizer step was completed for 610 s after step 7; the run is at: verify"
    told = {"step": 7, "doing": "verify", "since": NOW - 1000, "stall": None}
    beating(tmp_path, 100.0, told)
    dead = run_status(tmp_path, RUNNING, NOW - 1000, 10.0, NOW)
    assert dead.state == "dead" and dead.detail.endswith("; it was at: verify")
    beating(tmp_path, 100.0, told | {"stall": stall})
    dead = run_status(tmp_path, RUNNING, NOW - 1000, 10.0, NOW)
    assert dead.state == "dead" and dead.detail.endswith(f"; it was at: verify; it had said: {stall}")
    beating(tmp_path, 5.0, told)
    stalled = run_status(tmp_path, RUNNING, NOW - 1000, 10.0, NOW)
    assert stalled.state == "stalled" and stalled.detail.endswith("; it is at: verify")
    beating(tmp_path, 5.0, told | {"stall": stall})
    for last in (NOW - 100, None):  # the run knows better
        stalled = run_status(tmp_path, RUNNING, last, 10.0, NOW)
        assert stalled.state == "stalled" and stall in stalled.detail


@pytest.mark.parametrize("phase", ["evaluation", "checkpoint"])
def test_status_judges_a_phase_from_its_own_start(phase, tmp_path):
    for lasted, expected in ((299.0, "running"), (301.0, "stalled")):
        beating(tmp_path, 5.0, {"step": 7, "doing": phase, "since": NOW - lasted, "stall": None})
        assert run_status(tmp_path, RUNNING, NOW - 900, 10.0, NOW).state == expected
    assert run_status(tmp_path, RUNNING, NOW - 900, 31.0, NOW).state == "running"


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"{",
        b"\xff\x00",
        b"[" * 60_000,
        [1],
        7,
        {},
        {"doing": 3, "since": "x", "stall": ["y"]},
        {"since": float("nan"), "doing": None},
        {"since": True},
        {"since": 10**400},
    ],
)
def test_status_goes_by_time_alone_where_a_heartbeat_cannot_be_read(told, tmp_path):
    beating(tmp_path, 5.0, told)
    assert run_status(tmp_path, RUNNING, NOW - 20, 10.0, NOW) == Status("running")
    assert run_status(tmp_path, RUNNING, NOW - 400, 10.0, NOW).state == "stalled"
    beating(tmp_path, 100.0, told)
    assert run_status(tmp_path, RUNNING, NOW - 400, 10.0, NOW).state == "dead"
