"""What arrives in wandb, trackio and TensorBoard, read back with their own readers: names, values and steps are those
of the run's records, and a model's output does nothing.
"""

import html
import importlib.util
import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sinks_run
import test_end_to_end
import test_mole_training
import test_sft
import test_two_processes
from hypothesis import given
from hypothesis import strategies as st
from sinks_run import CHECKPOINT, EVERY, HOSTILE, STEPS
from test_imports import imports

import rlvr
from rlvr.errors import ConfigError
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.metrics import METRICS
from rlvr.monitor.records import read_evals, read_steps, read_tokens, token_steps
from rlvr.trainers.sink_values import COLUMNS, LONGEST, finite_edges, inert, markdown, own_names, raw_histogram
from rlvr.trainers.sinks import TRACKERS, check_report_to

ROOT = Path(__file__).parents[1]
SYSTEMS = ("wandb", "tensorboard", "trackio")
INSTALLED = [name for name in SYSTEMS if importlib.util.find_spec(name)]


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if name not in INSTALLED]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


# ---------------------------------------------------------------------------------------------- names and shapes


def test_own_names_are_those_of_the_records_and_nothing_is_lost() -> None:
    logs = {
        "loss": 1.0,
        "entropy/mean": 2.0,
        "kl_cov/effect": 3.0,
        "eval_heldout/reward": 4.0,
        "eval_math_heldout/reward": 5.0,
        "eval_runtime": 6.0,
        "law/a": None,
    }
    ours, theirs = own_names(logs)
    assert ours == {"entropy/mean": 2.0, "kl_cov/effect": 3.0, "heldout/reward": 4.0}
    assert theirs == {"loss": 1.0, "eval_math_heldout/reward": 5.0, "eval_runtime": 6.0}


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_finite_edges_hold_the_bins_of_the_table_and_increase(name: str) -> None:
    edges = finite_edges(name)
    assert tuple(edges[1:-1]) == HISTOGRAMS[name].edges
    assert all(a < b for a, b in pairwise(edges)) and all(map(math.isfinite, edges))
    assert edges[0] >= 0 or HISTOGRAMS[name].edges[0] < 0


@needs("tensorboard")
@given(st.lists(st.sampled_from([0, 0, 1, 2**24]), min_size=16, max_size=16).filter(any))
def test_histograms_in_tensorboard_keep_every_bin_between_those_that_hold_something(counts: list[int]) -> None:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
    from tensorboard.data_compat import migrate_value
    from tensorboard.util.tensor_util import make_ndarray

    edges = finite_edges("entropy")
    raw = raw_histogram(counts, edges)
    histo = HistogramProto(
        **{name: raw[name] for name in ("min", "max", "num", "sum", "sum_squares")},
        bucket_limit=raw["bucket_limits"],
        bucket=raw["bucket_counts"],
    )
    drawn = make_ndarray(migrate_value(Summary.Value(tag="x", histo=histo)).tensor)
    held = [i for i, count in enumerate(counts) if count]
    shown = range(held[0], held[-1] + 1)
    assert drawn[:, 2].tolist() == [counts[i] for i in shown]
    assert drawn[:, 0] == pytest.approx([edges[i] for i in shown])
    assert drawn[:, 1] == pytest.approx([edges[i + 1] for i in shown])


@needs("tensorboard")
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"))) | st.sampled_from([HOSTILE, "![i](http://e/)|<b>"]))
def test_inert_text_is_shown_as_it_is_by_tensorboard(text: str) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    row = [1, 2, "p", text, 0.5, None, 0.25, 3]
    shown = markdown_to_safe_html(markdown([row]))
    assert set(re.findall(r"<(\w+)", shown)) <= {"table", "thead", "tbody", "tr", "th", "td"}
    cell = html.unescape(re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)[3])
    assert cell.split() == text.replace("\n", "⏎").split()


def test_long_texts_are_cut_and_say_so() -> None:
    from rlvr.trainers.sink_values import sample_row

    row = {"sequence": 0, "prompt": "p", "completion": "x" * (LONGEST + 5), "reward": 1.0, "advantage": 0.0}
    made = dict(zip(COLUMNS, sample_row(3, {**row, "entropy": None, "token_ids": [1, 2]}), strict=True))
    assert made["completion"] == "x" * LONGEST + "… (5 more characters)"
    assert made["entropy"] is None and made["length"] == 2 and made["prompt"] == "p"


def test_control_characters_are_inert() -> None:
    assert inert("\x02klzzwxh:0000\x03\r\0") == "&#2;klzzwxh&#58;0000&#3;&#13;&#0;"


# ---------------------------------------------------------------------------------------------- report_to


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("tensorbord", "report_to='tensorbord' is not known; did you mean tensorboard"),
        (["wand"], "report_to='wand' is not known; did you mean wandb"),
        (None, r"report_to=\[None\]: write `none` alone"),
        (["none", "tensorboard"], "write `none` alone"),
    ],
)
@pytest.mark.parametrize("config", [rlvr.GRPOConfig, rlvr.PPOConfig])
def test_unknown_systems_are_refused_when_the_settings_are_read(
    config: Any, report_to: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config(output_dir=str(tmp_path), report_to=report_to, use_cpu=True, bf16=False)
    assert "\n" not in str(error.value)


def test_absent_packages_are_refused_when_the_settings_are_read(tmp_path: Path) -> None:
    packages = {name: name for name in (*SYSTEMS, "clearml", "dvclive", "swanlab")}
    for name, package in (packages | {"flyte": "flytekit", "azure_ml": "azureml"}).items():
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ConfigError, match=f"report_to='{name}': its package is not installed"):
                rlvr.GRPOConfig(output_dir=str(tmp_path), report_to=[name], use_cpu=True, bf16=False)


def test_every_system_of_transformers_can_be_checked() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in INTEGRATION_TO_CALLBACK:
        try:
            check_report_to(SimpleNamespace(report_to=[name]))
        except ConfigError as error:
            assert "its package is not installed" in str(error)


def test_rlvr_imports_none_of_the_systems_itself() -> None:
    for path in sorted((ROOT / "rlvr").rglob("*.py")):
        found = {item.name.split(".")[0] for item in imports(path.read_text())}
        assert not found & {*SYSTEMS, "tensorboardX"}, path


# ---------------------------------------------------------------------------------------------- a run


@dataclass
class Arrived:
    """What a system holds of a run, by the optimizer step that it says."""

    scalars: list[tuple[int, str, float]]
    histograms: list[tuple[int, str, list[int]]]
    tables: list[tuple[int, list[list[Any]]]]
    alerts: list[tuple[int, str, str]]  # step, kind, message


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


def use_wandb_in(folder: Path, environment: pytest.MonkeyPatch) -> None:
    """Without network."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        environment.setenv(f"WANDB_{name}", str(folder))
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        environment.setenv(f"WANDB_{name}", value)
    environment.delenv("WANDB_RUN_ID", raising=False)


def finish_wandb() -> None:
    if "wandb" in INSTALLED:
        import wandb

        wandb.finish()
        wandb.teardown()


def of_interval(out: Path, step: int) -> list[dict[str, Any]]:
    """The records that the log after `step` covers."""
    return [record for record in read_steps(out) if step - EVERY < record["step"] <= step]


def assert_arrived(arrived: Arrived, out: Path, logged: list[int]) -> None:
    """Everything after the checkpoint, and what was before it, is what the records say.

    logged: steps at which training was logged, in the order of the logs.
    """
    trained = [(step, name, x) for step, name, x in arrived.scalars if not name.startswith("heldout/")]
    assert sorted({step for step, _, _ in trained}) == sorted(set(logged))
    for step in sorted(set(logged)):
        records = of_interval(out, step)
        values: dict[str, list[float]] = {}
        for record in records:
            for name, value in record["metrics"].items():
                values.setdefault(name, []).append(value)
        names = {name for at, name, _ in trained if at == step}
        assert names == {name for name, found in values.items() if not all(map(math.isnan, found))}
        for name in names:
            assert name in METRICS
            sent = [x for at, label, x in trained if (at, label) == (step, name)]
            assert len(sent) == logged.count(step)
            finite = [x for x in values[name] if not math.isnan(x)]
            # The first of two was of records that resuming has dropped.
            assert sent[-1] == pytest.approx(sum(finite) / len(finite), rel=1e-6), name
        for name in HISTOGRAMS.keys() & records[0]["histograms"].keys():
            counts = [sum(bins) for bins in zip(*(record["histograms"][name] for record in records), strict=True)]
            assert [x for at, label, x in arrived.histograms if (at, label) == (step, name)][-1] == counts
            assert sum(counts) == sum(record["metrics"]["policy/tokens"] for record in records)
        tables = [table for at, table in arrived.tables if at == step]
        assert tables[-1] == sampled(out, records) and len(tables) == logged.count(step)
    told = {(r["step"], a["kind"], a["message"]) for r in read_steps(out) for a in r.get("alerts", [])}
    assert told and told <= set(arrived.alerts)
    for record in read_evals(out):
        for name, value in record["metrics"].items():
            sent = [x for at, label, x in arrived.scalars if (at, label) == (record["step"], name)]
            assert sent and all(x == pytest.approx(value, rel=1e-6, nan_ok=True) for x in sent)
    assert {record["step"] for record in read_evals(out)} == {0, CHECKPOINT, STEPS}


def sampled(out: Path, records: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    for step in sorted({record["step"] for record in records} & set(token_steps(out))):
        for row in read_tokens(out, step):
            mean = sum(row["entropy"]) / len(row["entropy"])
            told = {**row, "step": step, "entropy": mean, "length": len(row["token_ids"])}
            rows.append([told[name] for name in COLUMNS])
    assert rows and all(HOSTILE.startswith(row[3]) for row in rows)
    return [[pytest.approx(x, rel=1e-5) if isinstance(x, float) else x for x in row] for row in rows]


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


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a LevelDB log behind 7 bytes of wandb's own: blocks of 32 KiB, of chunks with checksum, length
    and place (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, place = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def add_wandb_row(arrived: Arrived, row: dict[str, Any], folder: Path) -> list[int]:
    """Returns the step if the row is a log of training."""
    step = row["train/global_step"]
    for name, value in row.items():
        if name == "samples":
            table = json.loads((folder / "files" / value["path"]).read_text())
            assert table["columns"] == list(COLUMNS)
            arrived.tables.append((step, table["data"]))
        elif name.startswith("histograms/"):
            name = name.removeprefix("histograms/")
            assert value["bins"] == pytest.approx(finite_edges(name))
            arrived.histograms.append((step, name, value["values"]))
        elif not name.startswith(("train/", "eval/", "profiling/", "_")):
            arrived.scalars.append((step, name, float(value)))
    return [step] if "train/loss" in row else []


def add_alert(arrived: Arrived, title: str, text: str) -> None:
    step, _, message = text.removeprefix("step ").partition(": ")
    arrived.alerts.append((int(step), title.removeprefix("rlvr: "), message))


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


def table_of(text: str) -> list[list[str]]:
    """Cells of the table that TensorBoard makes of a text."""
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(text)
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td)\b)", shown)
    rows = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    assert re.findall(r"<th>(.*?)</th>", rows[0]) == list(COLUMNS)
    return [list(map(html.unescape, re.findall(r"<td>(.*?)</td>", row, re.DOTALL))) for row in rows[1:]]


def shown_rows(rows: list[list[Any]]) -> list[list[str]]:
    plain = [[getattr(x, "expected", x) for x in row] for row in rows]
    return [[f"{x:.4g}" if isinstance(x, float) else str(x).strip().replace("\n", "⏎") for x in row] for row in plain]


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
