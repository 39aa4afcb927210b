"""Time spent training and left to go: by hand, whatever pauses lie between."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr.monitor.payloads.clock import RECENT, seconds_left, seconds_trained
from rlvr.monitor.payloads.curves import series_payload
from rlvr.monitor.payloads.runs import run_row
from rlvr.monitor.payloads.view import View
from rlvr.monitor.status import Status
from rlvr.monitor.table import Table, parse_step


def view_of(
    times: list[float | None],
    resumed: list[float] | None = None,
    step_seconds: float | None = None,
    state: Any = "running",
    every: int = 1,
    **config: Any,
) -> View:
    """A run that started at 1000 s, with a record of every `every`th step at these times."""
    metrics = {} if step_seconds is None else {"time/step": step_seconds}
    records = [{"step": 1 + every * n, "time": time, "metrics": metrics} for n, time in enumerate(times)]
    table = Table()
    table.extend([parse_step(json.dumps(record).encode()) for record in records])
    run = {"started": 1000.0, "config": config, "resumed": [{"time": time} for time in resumed or []]}
    return View("a", "a", Path("a"), run, table, Status(state), num_steps=len(times))


@pytest.mark.parametrize(
    ("times", "resumed", "step_seconds", "expected"),
    [
        ([1010, 1020, 1030], [], None, [10, 20, 30]),
        ([1010, 1020, 9030, 9040], [9000], 12.0, [10, 20, 32, 42]),
        ([1010, 1020, 9030, 9040], [9000], None, [10, 20, 30, 40]),  # as long as the others
        ([1010, 1020, 9030, 9040], [3000, 9000], 12.0, [10, 20, 32, 42]),  # a resumption that recorded nothing
        ([9030, 9040], [9000], 12.0, [12, 22]),
        ([9030], [9000], None, [30]),  # nothing to go by but the time since
        ([1010, 1020, 1025], [1020], 90.0, [10, 20, 25]),  # never more than has passed
        ([1010, 1020], [1500], 12.0, [10, 20]),  # resumed, and no record since
        ([1010, None, 1030], [], None, [10, 10, 30]),
        ([None, None], [], None, [0, 0]),
        ([1010, 1005, 1025], [], None, [10, 10, 30]),  # a clock that was set back
        ([], [], None, []),
    ],
)
def test_seconds_trained_by_hand(
    times: list[float | None], resumed: list[float], step_seconds: float | None, expected: list[float]
) -> None:
    view = view_of(times, resumed, step_seconds)
    assert seconds_trained(view).tolist() == expected
    assert series_payload(view)["seconds"].tolist() == expected


def test_seconds_trained_of_a_sketch_count_the_steps_between() -> None:
    assert seconds_trained(view_of([1010, 1110, 9210], [9000], 10.0, every=10)).tolist() == [10, 110, 210]


@given(
    times=st.lists(st.one_of(st.none(), st.floats(0, 1e4)), max_size=20),
    resumed=st.lists(st.floats(0, 1e4), max_size=5),
    step_seconds=st.one_of(st.none(), st.floats(0, 1e3), st.just(math.nan)),
)
def test_seconds_trained_never_fall(
    times: list[float | None], resumed: list[float], step_seconds: float | None
) -> None:
    spent = seconds_trained(view_of(times, resumed, step_seconds))
    assert np.isfinite(spent).all() and (np.diff(spent, prepend=0) >= 0).all()


def test_seconds_left_go_by_the_recent_pace() -> None:
    """A slow start, then 10 s a step, with a pause that does not count."""
    times = [1000.0 + 500 * n for n in range(1, 21)]
    times += [times[-1] + 10 * n for n in range(1, 31)]
    times += [times[-1] + 50_000 + 10 * n for n in range(1, 31)]
    view = view_of(times, [times[49] + 49_000], 10.0, max_steps=100)
    row = run_row(view)
    assert RECENT == 50 and row["left"] == 20 * 10 and row["spent"] == 20 * 500 + 60 * 10


@pytest.mark.parametrize(
    ("times", "state", "config"),
    [
        ([1010.0, 1020.0], "running", {}),
        ([1010.0, 1020.0], "running", {"max_steps": -1}),
        ([1010.0, 1020.0], "finished", {"max_steps": 9}),
        ([1010.0, 1020.0], "stalled", {"max_steps": 9}),
        ([1010.0], "running", {"max_steps": 9}),
        ([None, None], "running", {"max_steps": 9}),
    ],
)
def test_seconds_left_are_unknown_where_nothing_tells(times: Any, state: str, config: dict[str, int]) -> None:
    assert run_row(view_of(times, state=state, **config))["left"] is None


def test_seconds_left_are_never_below_zero() -> None:
    view = view_of([1010.0, 1020.0, 1030.0])
    assert seconds_left(view, seconds_trained(view), 2) == 0
