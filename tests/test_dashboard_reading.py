"""What a dashboard knows of a run is what its files say, however they grow, are cut or are replaced."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboard_cases import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.errors import ConfigError
from rlvr.monitor import Recorder, read_steps
from rlvr.monitor.history import History, sketch
from rlvr.monitor.records import series
from rlvr.monitor.table import Table

WHOLE = 10**9


def record(step: int, seed: int = 0) -> dict[str, Any]:
    """Metrics that differ from step to step in which there are, some not finite."""
    values: dict[str, Any] = {"policy/tokens": 10 * step, "entropy/mean": 1 / (step + seed)}
    values |= {"time/rollout": 3.5} if step % 2 else {}
    values |= {"optim/grad_norm": ("NaN", "Infinity", "-Infinity", 0.25)[step % 4]} if step % 3 else {}
    return {"step": step, "time": 1e9 + step + 0.5, "tokens": 10 * step, "metrics": values}


def lines(count: int, seed: int = 0) -> list[bytes]:
    return [json.dumps(record(step, seed)).encode() + b"\n" for step in range(1, count + 1)]


def assert_holds(table: Table, records: list[dict[str, Any]]) -> None:
    """The table has the records of `read_steps`, all of them and in their order."""
    assert table.step.tolist() == [r["step"] for r in records]
    assert table.time.tolist() == [r["time"] for r in records]
    assert table.tokens.tolist() == [r["tokens"] for r in records]
    names = {name for r in records for name in r["metrics"]}
    assert table.names.keys() == names
    for name in names:
        column = [float(r["metrics"].get(name, math.nan)) for r in records]
        np.testing.assert_array_equal(table.column(name), column)
        odd = sum(not math.isfinite(r["metrics"][name]) for r in records if name in r["metrics"])
        assert table.not_finite.get(name, 0) == odd
        finite = series(records, name)[1]
        assert table.last(name) == (finite[-1] if finite else None)


# ------------------------------------------------------------------------------------------------------------- history


@settings(max_examples=60)
@given(count=st.integers(0, 9), cuts=st.lists(st.integers(0, 2**12), max_size=6))
def test_history_is_what_read_steps_reads_at_any_cut(count: int, cuts: list[int]) -> None:
    """A file that grows by arbitrary pieces, the last of which may be a torn line."""
    whole = b"".join(lines(count))
    with tempfile.TemporaryDirectory() as folder:
        history = History(folder, WHOLE)
        written = 0
        for end in sorted(cut % (len(whole) + 1) for cut in cuts):
            with open(history.path, "ab") as file:
                file.write(whole[written:end])
            written = end
            history.refresh()
            assert_holds(history.table, read_steps(folder))
            assert history.read == 1.0 and not history.pending and history.num_steps == history.table.count


def test_history_before_there_is_a_file_is_empty(tmp_path: Path) -> None:
    history = History(tmp_path / "nowhere")
    history.refresh()
    assert history.table.count == 0 and history.read == 1.0
    assert history.table.column("entropy/mean").tolist() == [] and history.table.last("entropy/mean") is None


def test_history_of_a_resumed_run_has_the_steps_that_count(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 12, finish=False)
    history = History(run_dir, WHOLE)
    history.refresh()
    assert history.table.step[-1] == 12
    recorder = Recorder.resume(run_dir, 6)
    history.refresh()
    assert_holds(history.table, read_steps(run_dir))
    for step in range(7, 16):
        recorder.record_step(step, {"entropy/mean": 0.1 * step})
    history.refresh()
    assert history.table.step.tolist() == list(range(1, 16))
    assert_holds(history.table, read_steps(run_dir))


@pytest.mark.parametrize("count", [5, 9, 30])
def test_history_notices_that_a_file_was_written_over(count: int, tmp_path: Path) -> None:
    """In place: the inode is the same, and the file may be as long as before, or longer."""
    history = History(tmp_path, WHOLE)
    history.path.write_bytes(b"".join(lines(9)))
    history.refresh()
    before = history.key
    with open(history.path, "r+b") as file:
        file.write(b"".join(lines(count, seed=1)))
        file.truncate()
    os.utime(history.path, ns=(1, 1))
    history.refresh()
    assert history.key != before
    assert_holds(history.table, read_steps(tmp_path))


def test_history_forgets_a_file_that_is_gone(tmp_path: Path) -> None:
    history = History(tmp_path, WHOLE)
    history.path.write_bytes(b"".join(lines(4)))
    history.refresh()
    history.path.unlink()
    history.refresh()
    assert history.table.count == 0
    history.path.write_bytes(b"".join(lines(2, seed=3)))
    history.refresh()
    assert_holds(history.table, read_steps(tmp_path))


@pytest.mark.parametrize("eager", [WHOLE, 100])
def test_history_tells_of_a_damaged_line_until_it_is_gone(eager: int, tmp_path: Path) -> None:
    history = History(tmp_path, eager, retry=0)
    whole = lines(5)

    def read_again() -> None:
        history.refresh()
        if eager == 100:  # a sketch does not see all of the file
            assert history.pending
            history.read_all()
            assert not history.pending
            history.refresh()

    history.path.write_bytes(b"".join([whole[0], whole[1][:9] + b"\n", *whole[2:]]))
    with pytest.raises(ConfigError, match=r"steps.jsonl line 2 is damaged; delete that line"):
        read_again()
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        history.refresh()
    with open(history.path, "ab") as file:
        file.write(json.dumps(record(6)).encode() + b"\n")
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        read_again()
    history.path.write_bytes(b"".join(whole))
    read_again()
    assert_holds(history.table, read_steps(tmp_path))


def test_history_of_a_long_damaged_file_is_not_read_at_every_look(tmp_path: Path) -> None:
    history = History(tmp_path, eager=100, retry=60)
    history.path.write_bytes(lines(1)[0] + b"{\n" + lines(3)[2])
    history.refresh()
    history.read_all()
    for step in (4, 5):
        with open(history.path, "ab") as file:
            file.write(lines(step)[-1])
        with pytest.raises(ConfigError, match="line 2 is damaged"):
            history.refresh()
        assert not history.pending


@pytest.mark.parametrize(
    "line", [b"{}", b'{"step": 2}', b'{"step": "2", "metrics": {}}', b'{"step": 2, "metrics": []}', b"", b"[1]", b"7"]
)
def test_history_refuses_a_line_that_is_no_record(line: bytes, tmp_path: Path) -> None:
    history = History(tmp_path, WHOLE)
    history.path.write_bytes(lines(1)[0] + line + b"\n")
    history.refresh()  # it may be what a kill has left of a line
    assert history.table.count == 1
    with open(history.path, "ab") as file:
        file.write(lines(3)[2])
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        history.refresh()


def test_history_takes_what_strict_json_does_not(tmp_path: Path) -> None:
    """Halves of surrogate pairs, NaN without quotes, a value that is no number."""
    history = History(tmp_path, WHOLE)
    metrics = b'{"entropy/mean": NaN, "reward/mean": "x", "policy/tokens": null}'
    odd = b'{"step": 1, "metrics": ' + metrics + b', "alerts": ["\\ud83d"]}\n'
    history.path.write_bytes(odd + b'{"step": 2, "time": 5, "tokens": 7, "metrics": {"entropy/mean": 1}}\n')
    history.refresh()
    assert history.table.step.tolist() == [1, 2] and history.table.last("entropy/mean") == 1
    assert history.table.not_finite == {"entropy/mean": 1, "reward/mean": 1, "policy/tokens": 1}
    (told,) = history.table.alerts
    assert (told.step, told.alert.kind, told.alert.message) == (1, "other", "\ud83d") and math.isnan(told.time)


# ------------------------------------------------------------------------------------------------------------- sketch


def test_sketch_is_shown_until_all_is_read(tmp_path: Path) -> None:
    history = History(tmp_path, eager=1000)
    history.path.write_bytes(b"".join(lines(3000)))
    history.refresh()
    assert history.pending and history.read < 1
    steps = history.table.step
    assert len(steps) == 500 and steps[0] == 1 and steps[-1] == 3000 and history.num_steps == 3000
    assert np.diff(steps).max() <= 8  # evenly: 6 steps of about the same length
    before = history.key
    history.refresh()
    assert history.key == before and history.table.count == 500
    history.read_all()
    assert history.key != before and history.read == 1.0 and not history.pending
    assert_holds(history.table, read_steps(tmp_path))
    with open(history.path, "ab") as file:
        file.write(json.dumps(record(3001)).encode() + b"\n")
    history.refresh()
    assert_holds(history.table, read_steps(tmp_path))


@settings(max_examples=40)
@given(count=st.integers(1, 40), wanted=st.integers(2, 60), cut=st.integers(0, 2**10), long=st.integers(0, 30_000))
def test_sketch_holds_whole_lines_of_the_file_in_order(count: int, wanted: int, cut: int, long: int) -> None:
    """Whatever their length, with the last one that is whole."""
    whole = lines(count)
    whole[count // 2] = whole[count // 2].replace(b'"step"', b'"note": "' + b"x" * long + b'", "step"')
    text = b"".join(whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.jsonl"
        path.write_bytes(text[: len(text) - cut % len(text)])
        records = read_steps(folder)
        table = sketch(path, wanted)
    if not records:
        return
    found = table.step.tolist()
    assert found == sorted(set(found)) and set(found) <= {r["step"] for r in records}
    assert found[0] == 1 and found[-1] == records[-1]["step"] and len(found) <= wanted
    assert_holds(table, [r for r in records if r["step"] in found])


def test_sketch_of_heavy_lines_is_of_fewer(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    heavy = [line.replace(b'"step"', b'"routers": "' + b"x" * 30_000 + b'", "step"') for line in lines(200)]
    path.write_bytes(b"".join(heavy))
    table = sketch(path, most=1 << 20)
    assert 30 <= table.count <= 40 and table.step[-1] == 200
