"""The view of a run in a terminal: what it shows of which records."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlvr.alarm import Alert
from rlvr.cli import main
from rlvr.errors import ConfigError
from rlvr.monitor import Recorder
from rlvr.monitor.records import read_steps
from rlvr.monitor.status import Status
from rlvr.monitor.watch import BARS, Followed, frame, plain, sparkline, watch

ROOT = Path(__file__).resolve().parents[1]
BAND = {"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0}
RUN = {"status": "running", "config": {"max_steps": 40, "thermostat": json.dumps(BAND)}}
ALIVE = Status("running")
METRICS = {
    "entropy/mean": 0.42,
    "reward/mean": 0.625,
    "reward/pass_at_1": 0.6,
    "reward/pass_at_2": 0.7,
    "reward/pass_at_8": 0.9,
    "policy/tokens": 1000,
    "rollout/tokens": 3000,
    "time/rollout": 6.0,
    "time/update": 3.0,
    "time/step": 10.0,
    "kl_cov/selected": 0.002,
    "clip/low": 0.0,
    "mismatch/kl": 0.00012,
    "mismatch/abs_logp_mean": 0.01,
    "law/holds": 0.0,
    "thermostat/value": 2.5,
    "thermostat/position": 0.25,
    "thermostat/outside": 0.0,
}


def records(count: int, **changes: Any) -> list[dict[str, Any]]:
    """The last one is of the time 1000."""
    metrics = METRICS | changes
    return [
        {"step": n, "time": 1000.0 + 10 * (n - count), "tokens": 1000 * n, "metrics": metrics}
        for n in range(1, count + 1)
    ]


def drawn(steps: Sequence[dict[str, Any]], run: Any = RUN, status: Status = ALIVE, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(frame("runs/mine", run, steps, status, 1012.0, width))
    return console.export_text()


def row(text: str, label: str) -> str:
    """Without its continuation."""
    (found,) = [line for line in text.splitlines() if line.startswith(label)]
    return found.removeprefix(label).strip()


# one frame


def test_frame_shows_each_instrument_of_a_run() -> None:
    text = drawn(records(10))
    assert text.splitlines()[0] == "runs/mine  running"
    assert text.splitlines()[1] == "step 10 of 40 · 10,000 tokens · 10.0 s a step · 5 min 0 s left"
    assert row(text, "entropy").startswith("0.420 nats, band 0.3 to 0.5")
    assert row(text, "reward").startswith("0.625")
    assert row(text, "pass rate") == "pass@1 0.60, pass@8 0.90"
    assert row(text, "tokens/s") == "rollout 500, update 333"
    assert row(text, "time") == "rollout 60 %, update 30 %, other 10 %"
    assert row(text, "law") == "not yet"
    assert row(text, "thermostat") == "kl_cov.coef 2.5, 25 % of the way to most entropy; inside the band"
    assert row(text, "touched") == "kl_cov/selected 0.2 %"
    assert row(text, "mismatch") == "KL 0.00012 nats, mean |log-prob difference| 0.01"
    assert "last record 12.0 s ago" in text and "alerts" not in text


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({"law/holds": 1.0, "law/ceiling": 0.7}, "predicted ceiling of the reward 0.700"),
        (
            {"law/holds": 1.0, "law/ceiling": 0.7, "law/ceiling_low": 0.6, "law/ceiling_high": 0.8},
            "predicted ceiling of the reward 0.700 [0.600, 0.800]",
        ),
        ({"law/holds": -1.0, "law/ceiling": 0.7}, "does not hold here"),
    ],
)
def test_frame_says_what_the_law_says(metrics: dict[str, float], told: str) -> None:
    assert row(drawn(records(10, **metrics)), "law") == told


def test_frame_says_what_is_left_from_the_times_of_the_last_records() -> None:
    steps = records(30)
    for n, record in enumerate(steps):
        record["time"] = 1000.0 + (1.0 if n < 10 else 30.0) * n  # with evaluations in between
    assert "10.0 s a step · 5 min 0 s left" in drawn(steps)
    for state in ("stalled", "dead", "finished", "failed", "interrupted", "unknown"):
        assert "left" not in drawn(steps, status=Status(state))
    resumed = {**RUN, "resumed": [{"time": steps[-1]["time"]}]}
    assert "10.0 s a step · 1 min 40 s left" in drawn(steps, resumed)  # of the one record since then


def test_frame_of_a_stalled_run_tells_what_it_is_at(tmp_path: Path) -> None:
    Recorder(tmp_path).record_step(1, {"entropy/mean": 0.5})
    (tmp_path / "heartbeat").write_text(json.dumps({"doing": "verify", "stall": "no step\x1b[2J for long"}))
    one = Followed(tmp_path)
    one.read()
    console = Console(record=True, width=300, file=io.StringIO())
    console.print(one.frame(300))
    text = console.export_text()
    assert "stalled" in text and "it is at: verify" in text and "for long" in text and "\x1b" not in text


def test_frame_leaves_out_what_was_not_recorded() -> None:
    steps = [{"step": 3, "time": 990.0, "tokens": 5, "metrics": {"entropy/mean": 0.5}}]
    text = drawn(steps, {"config": {"max_steps": -1}})
    assert text.splitlines()[1].startswith("step 3 · 5 tokens")
    labels = ("entropy", "law", "reward", "pass", "tokens/s", "time", "thermostat", "touched", "mismatch", "alerts")
    assert [label for label in labels if re.search(f"^{label}", text, re.M)] == ["entropy", "law"]


def test_frame_before_the_first_record() -> None:
    assert drawn([]).splitlines() == ["runs/mine  running", "waiting for the first record"]


def test_frame_counts_alerts_and_shows_the_last_ones() -> None:
    steps = records(12)
    for record in steps:
        record["alerts"] = [{"kind": "skipped", "message": f"skipped {record['step']}"}]
    steps[-1]["alerts"].append({"kind": "stall", "message": "stood [bold]still[/bold]\n for a while"})
    text = drawn(steps)
    assert row(text, "alerts") == "13: 1 stall, 12 skipped"
    assert "skipped 9" not in text and row(text, "  step 10") == "skipped 10"
    assert "  step 12     stood [bold]still[/bold] for a while" in text


def test_frame_shows_numbers_that_are_not_finite_nowhere() -> None:
    steps = records(3, **{"entropy/mean": float("nan"), "mismatch/kl": float("inf"), "time/step": float("nan")})
    text = drawn(steps)
    assert "nan" not in text and "inf" not in text
    steps[0]["metrics"] = METRICS
    assert row(drawn(steps), "entropy").startswith("0.420 nats")


def test_frame_is_of_the_last_resumption() -> None:
    run = RUN | {"resumed": [{"changed_config": {}}, {"changed_config": {"max_steps": 20}}]}
    assert "step 10 of 20" in drawn(records(10), run)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_frame_keeps_to_the_width_of_the_terminal(width: int) -> None:
    steps = records(300)
    steps[-1]["alerts"] = [{"kind": "other", "message": "word " * 60 + "x" * 300}]
    lines = drawn(steps, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(any(bar in line for bar in BARS) for line in lines) == (2 if width >= 60 else 0)


def test_frame_says_that_a_run_is_dead_and_why_it_failed() -> None:
    assert "runs/mine  dead  its process was killed" in drawn(
        records(2), RUN, Status("dead", "its process was killed")
    )
    assert "failed  [red]E: x" in drawn(records(2), RUN, Status("failed", "[red]E:\n x"))


def test_frame_has_nothing_that_moves_a_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\r\u202e[bold]\x9b31m\ud800"
    assert plain(evil).isprintable() and "[bold]" in plain(evil)
    steps = records(2)
    steps[-1]["alerts"] = [{"kind": "other", "message": evil}]
    spec = json.dumps({**BAND, "lever": f"kl_cov.{evil}"})
    text = drawn(steps, RUN | {"config": {"thermostat": spec}}, Status("failed", evil))
    assert all(line.isprintable() for line in text.splitlines())


def test_sparkline_is_of_the_means_of_neighbors() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BARS
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5.0] * 100, 10) == "▄" * 10
    assert sparkline([1.0, float("nan"), 2.0], 9) == "▁█"
    assert sparkline([float("nan")], 9) == sparkline([], 9) == ""


# reading


def test_watched_takes_every_record_once_also_after_a_resumption(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, {"max_steps": 9})
    one = Followed(tmp_path)
    assert one.read() and not one.steps
    for step in range(1, 5):
        recorder.record_step(step, {"entropy/mean": float(step), "policy/tokens": 3}, alerts=[Alert("other", "x")])
        assert one.read() and not one.read()
    assert [r["metrics"]["entropy/mean"] for r in one.steps] == [1, 2, 3, 4]
    recorder = Recorder.resume(tmp_path, 2)
    assert one.read() and [r["step"] for r in one.steps] == [1, 2]
    recorder.record_step(3, {"entropy/mean": float("nan")})
    assert one.read() and [r["step"] for r in one.steps] == [1, 2, 3]
    recorder.finish()
    assert not one.ended
    assert one.read() and one.ended
    for kept, record in zip(one.steps, read_steps(tmp_path), strict=True):
        assert all(kept[name] == record.get(name) for name in ("step", "time", "tokens", "alerts"))


# the command


def test_watch_once_prints_one_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Recorder(tmp_path).record_step(1, {"entropy/mean": 0.5})
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert out.count("step 1 ·") == 1 and "\x1b" not in out and "0.500 nats" in out


def test_watch_refuses_what_it_cannot_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    Recorder(tmp_path)
    for interval in (0.0, float("nan")):
        with pytest.raises(ConfigError, match=r"--interval=.*at least 0.05"):
            watch(tmp_path, interval)


def test_watch_needs_no_torch() -> None:
    code = "import sys, rlvr.monitor.watch; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
