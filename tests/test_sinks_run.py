"""What arrives in wandb, trackio and TensorBoard of a real run, read back with their own readers: names, values and
steps are those of the run's records.
"""

import html
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sinks_run
import test_end_to_end
import test_mole_training
import test_sft
import test_two_processes
from sink_cases import (
    INSTALLED,
    ROOT,
    Arrived,
    add_alert,
    add_wandb_row,
    assert_arrived,
    finish_wandb,
    needs,
    of_interval,
    sampled,
    shown_rows,
    table_of,
    use_wandb_in,
    wandb_records,
)
from sinks_run import STEPS

from rlvr.monitor.records import read_steps
from rlvr.trainers.sink_values import COLUMNS, finite_edges
from rlvr.trainers.sinks import TRACKERS


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that stopped and was resumed, told to wandb and TensorBoard."""
    folder = tmp_path_factory.mktemp("sinks")
    report_to = [name for name in INSTALLED if name != "trackio"]
    with pytest.MonkeyPatch.context() as environment:
        use_wandb_in(folder, environment)
        with pytest.raises(sinks_run.Stopped):
            sinks_run.train(tiny_model_dir, folder / "run", report_to=report_to)
        finish_wandb()  # as the end of its process would
        sinks_run.train(tiny_model_dir, folder / "run", resume=True, report_to=report_to)
        finish_wandb()
    yield folder


@needs("wandb")
def test_wandb_holds_one_run_with_our_names_values_and_steps(run: Path) -> None:
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2  # of two processes; `wandb sync` puts them into one run by their id
    known = json.loads((run / "run" / TRACKERS).read_text())["wandb"]
    assert {path.stem for folder in folders for path in folder.glob("*.wandb")} == {f"run-{known}"}
    arrived = Arrived([], [], [], [])
    steps: list[int] = []
    for folder in folders:
        for record in wandb_records(next(folder.glob("*.wandb"))):
            if record.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]
                    (row.setdefault(outer[0], {}) if outer else row)[last] = json.loads(item.value_json)
                steps += add_wandb_row(arrived, row, folder)
            elif record.WhichOneof("record_type") == "alert":
                add_alert(arrived, record.alert.title, record.alert.text)
    assert_arrived(arrived, run / "run", steps)
    assert steps == [2, 4, 6, 6, 8]


@needs("tensorboard")
def test_tensorboard_holds_one_run_without_what_was_repeated(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    folders = list((run / "run" / "runs").iterdir())
    assert [str(path.relative_to(run / "run")) for path in folders] == [tensorboard_identity(run)]
    everything = dict.fromkeys(("scalars", "histograms", "tensors"), 0)
    events = EventAccumulator(str(folders[0]), size_guidance=everything)
    events.Reload()
    arrived = Arrived([], [], [], [])
    for name in events.Tags()["scalars"]:
        if not name.startswith(("train/", "eval/")):
            arrived.scalars += [(event.step, name, event.value) for event in events.Scalars(name)]
    for name in events.Tags()["histograms"]:
        for event in events.Histograms(name):
            name = name.removeprefix("histograms/")
            assert event.histogram_value.bucket_limit == pytest.approx(finite_edges(name)[1:])
            arrived.histograms.append((event.step, name, list(map(int, event.histogram_value.bucket))))
    # What a repeated step says takes the place of what it had said, which this reader does for numbers alone.
    for event in {event.step: event for event in events.Tensors("samples/text_summary")}.values():
        (text,) = make_ndarray(event.tensor_proto).tolist()
        arrived.tables.append((event.step, table_of(text.decode())))
    for event in events.Tensors("alerts/text_summary"):
        (text,) = make_ndarray(event.tensor_proto).tolist()
        kind, _, message = html.unescape(text.decode()).partition(": ")
        arrived.alerts.append((event.step, kind, message))
    records = read_steps(run / "run")
    assert {record["step"] for record in records} == set(range(1, STEPS + 1))
    shown = [(step, shown_rows(sampled(run / "run", of_interval(run / "run", step)))) for step in (2, 4, 6, 8)]
    assert arrived.tables == shown
    arrived.tables = [(step, sampled(run / "run", of_interval(run / "run", step))) for step in (2, 4, 6, 8)]
    assert_arrived(arrived, run / "run", [2, 4, 6, 8])


def tensorboard_identity(run: Path) -> str:
    return json.loads((run / "run" / TRACKERS).read_text())["tensorboard"]


@needs("trackio")
@pytest.mark.slow
def test_trackio_holds_one_run_with_our_names_values_and_steps(tiny_model_dir: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT / "tests")}
    for resume, code in ((False, 3), (True, 0)):
        settings = json.dumps({"report_to": ["trackio"], "project": "sinks", "resume": resume})
        command = [
            sys.executable,
            str(ROOT / "tests/sinks_run.py"),
            str(tiny_model_dir),
            str(tmp_path / "run"),
            settings,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
        assert done.returncode == code, done.stdout + done.stderr
    known = json.loads((tmp_path / "run" / TRACKERS).read_text())["trackio"]
    arrived = Arrived([], [], [], [])
    logged: list[int] = []
    with sqlite3.connect(tmp_path / "trackio" / "sinks.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        alerts = database.execute("SELECT run_name, step, title, text, level FROM alerts").fetchall()
    assert {name for name, *_ in rows + alerts} == {known}
    for _, step, text in rows:
        row = json.loads(text)
        assert row.get("train/global_step", step) == step
        logged += [step] * ("train/loss" in row)
        for name, value in row.items():
            if name == "samples":
                assert [list(found) for found in value["_value"]] == [list(COLUMNS)] * len(value["_value"])
                arrived.tables.append((step, [list(found.values()) for found in value["_value"]]))
            elif name.startswith("histograms/"):
                assert value["bins"] == pytest.approx(finite_edges(name.removeprefix("histograms/")))
                arrived.histograms.append((step, name.removeprefix("histograms/"), value["values"]))
            elif not name.startswith(("train/", "eval/", "profiling/")):
                arrived.scalars.append((step, name, float(value)))
    for _, step, title, text, level in alerts:
        add_alert(arrived, title, text)
        assert arrived.alerts[-1][0] == step and level == "warn"
    assert logged == [2, 4, 6, 6, 8]
    assert_arrived(arrived, tmp_path / "run", logged)


@needs("wandb", "tensorboard")
@pytest.mark.slow
def test_where_trl_sends_its_completions_ours_are_left_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_wandb_in(tmp_path, monkeypatch)
    settings = {"report_to": ["wandb", "tensorboard"], "log_completions": True, "max_steps": 2, "eval_strategy": "no"}
    sinks_run.train(tiny_model_dir, tmp_path / "run", eval_on_start=False, **settings)
    finish_wandb()
    tables = {path.name.split("_")[0] for path in tmp_path.glob("wandb/offline-run-*/files/media/table/*")}
    assert tables == {"completions"}
    (events,) = {path.parent for path in (tmp_path / "run/runs").rglob("events.*")}
    assert any(b"samples/text_summary" in path.read_bytes() for path in events.iterdir())


@needs("tensorboard")
@pytest.mark.slow
def test_only_the_main_process_reports(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"report_to": ["tensorboard"], "per_device_train_batch_size": 4, "save_strategy": "no", "max_steps": 2}
    settings = test_end_to_end.config(tiny_model_dir, out, **changes)
    del settings["use_cpu"]
    code, log = test_two_processes.launch(settings, tmp_path)
    assert code == 0, log[-4000:]
    files = sorted((out / "runs").rglob("events.*"))
    assert len({path.parent for path in files}) == 1 and len({path.name.split(".")[-2] for path in files}) == 1, files


@needs("tensorboard")
@pytest.mark.slow
def test_routers_of_supervised_fine_tuning_arrive_under_their_names(tiny_model_dir: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = test_sft.trainer(
        tiny_model_dir, tmp_path, peft_config=test_mole_training.config(), report_to=["tensorboard"]
    )
    one.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    told = {name: [entry[name] for entry in test_sft.logged(one)] for name in ("router/entropy", "loss")}
    assert [event.value for event in events.Scalars("router/entropy")] == pytest.approx(told["router/entropy"])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(told["loss"])
