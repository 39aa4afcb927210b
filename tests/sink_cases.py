"""What arrived in wandb, trackio and TensorBoard, and that it is what the records of the run say."""

import html
import importlib.util
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sinks_run import CHECKPOINT, EVERY, HOSTILE, STEPS

from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.metrics import METRICS
from rlvr.monitor.records import read_evals, read_steps, read_tokens, token_steps
from rlvr.trainers.sink_values import COLUMNS, finite_edges

ROOT = Path(__file__).parents[1]
SYSTEMS = ("wandb", "tensorboard", "trackio")
INSTALLED = [name for name in SYSTEMS if importlib.util.find_spec(name)]


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if name not in INSTALLED]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


@dataclass
class Arrived:
    """What a system holds of a run, by the optimizer step that it says."""

    scalars: list[tuple[int, str, float]]
    histograms: list[tuple[int, str, list[int]]]
    tables: list[tuple[int, list[list[Any]]]]
    alerts: list[tuple[int, str, str]]  # step, kind, message


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
    arrived.alerts.append((int(step), title.rpartition(": ")[2], message))


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
