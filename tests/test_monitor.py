"""The run directory: what is written is what is read, whatever kills the process."""

import json
import math
import re
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr.errors import ConfigError
from rlvr.monitor import (
    METRICS,
    Recorder,
    check_run_dir,
    metric,
    read_evals,
    read_run,
    read_steps,
    read_tokens,
    token_steps,
)
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.metrics import TOUCHED, format_metrics
from rlvr.monitor.records import series
from rlvr.monitor.summary import MISMATCH, PHASES, VERIFIER


def append(recorder: Recorder, steps: Sequence[int]) -> None:
    for step in steps:
        recorder.record_step(step, {"policy/tokens": 10 * step, "entropy/mean": 1 / step})


# metrics


def test_metrics_every_entry_is_explained():
    for name, entry in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*", name), name
        assert entry.unit and entry.meaning and "\n" not in entry.meaning
        assert entry.normal is None or entry.normal
        assert name in format_metrics()


def test_metrics_are_alphabetical_within_contiguous_areas():
    areas = [(area, list(names)) for area, names in groupby(METRICS, key=lambda name: name.partition("/")[0])]
    assert len({area for area, _ in areas}) == len(areas)
    assert all(names == sorted(names) for _, names in areas)


def test_metrics_touched_are_fractions():
    assert {METRICS[name].unit for name in TOUCHED} == {"fraction"}


def test_metrics_used_by_the_summary_exist():
    used = {*MISMATCH, *VERIFIER, *(f"time/{phase}" for phase in PHASES), *filter(None, PHASES.values())}
    assert used <= set(METRICS)


def test_metric_unknown_names_the_nearest():
    with pytest.raises(ConfigError, match="entropy/mean"):
        metric("entropy/men")


# recorder


def test_recorder_reads_back_what_it_wrote(tmp_path):
    recorder = Recorder(tmp_path / "run", {"lr": 1e-6})
    append(recorder, [1, 2])
    recorder.record_eval(2, {"heldout/reward": np.float32(0.5)}, {"prompts": 8})
    steps = read_steps(tmp_path / "run")
    assert [record["step"] for record in steps] == [1, 2]
    assert [record["tokens"] for record in steps] == [10, 30]
    assert steps[1]["metrics"] == {"policy/tokens": 20, "entropy/mean": 0.5}
    (record,) = read_evals(tmp_path / "run")
    assert record["metrics"] == {"heldout/reward": 0.5} and record["prompts"] == 8
    run = read_run(tmp_path / "run")
    assert run["status"] == "running" and run["config"] == {"lr": 1e-6} and "python" in run["versions"]
    recorder.finish("failed")
    assert read_run(tmp_path / "run")["status"] == "failed"


def test_recorder_writes_strict_json_for_non_finite_values(tmp_path):
    recorder = Recorder(tmp_path, {"beta": math.inf})
    values = {"policy/loss": math.nan, "optim/grad_norm": np.inf, "policy/ratio": -np.inf, "policy/tokens": math.nan}
    recorder.record_step(1, values)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("steps.jsonl", "run.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (record,) = read_steps(tmp_path)
    assert math.isnan(record["metrics"]["policy/loss"]) and record["metrics"]["optim/grad_norm"] == math.inf
    assert record["metrics"]["policy/ratio"] == -math.inf and record["tokens"] == 0
    assert series([record], "policy/loss") == ([], [])


def test_recorder_refuses_an_unexplained_metric_and_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path)
    with pytest.raises(ConfigError, match="did you mean reward/mean"):
        recorder.record_step(1, {"reward/meen": 1.0})
    assert read_steps(tmp_path) == []
    recorder.record_step(1, {"reward/mean": 1.0})


def test_recorder_keeps_details_of_a_step_and_refuses_counts_of_other_bins(tmp_path):
    recorder = Recorder(tmp_path)
    bins = {"edges": [0.0], "mean": [0.25], "count": [3.0]}
    counts = {"advantage": [*range(len(HISTOGRAMS["advantage"].edges)), 2**40]}
    recorder.record_step(1, {}, histograms=counts, mismatch_by_position=bins)
    (record,) = read_steps(tmp_path)
    assert record["histograms"] == counts and record["mismatch_by_position"] == bins
    with pytest.raises(ValueError, match="histogram advantage has 19 bins, got 2 counts"):
        recorder.record_step(2, {}, histograms={"advantage": [1, 2]})


def test_recorder_refuses_a_step_twice(tmp_path):
    recorder = Recorder(tmp_path)
    append(recorder, [1, 2])
    with pytest.raises(ValueError, match="step 2"):
        append(recorder, [2])


def test_recorder_keeps_secrets_out(tmp_path):
    Recorder(
        tmp_path, {"push_to_hub_token": "hf_abc", "vllm": {"api_key": "k"}, "eos_token": "</s>", "hub_token": None}
    )
    config = read_run(tmp_path)["config"]
    assert config["push_to_hub_token"] == config["vllm"]["api_key"] == "<redacted>"
    assert config["eos_token"] == "</s>" and config["hub_token"] is None


def test_check_run_dir_protects_a_run(tmp_path):
    run_dir = tmp_path / "run"
    check_run_dir(run_dir, resume=False)
    (run_dir / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds checkpoint-1, but no run that it is of; choose another"):
        check_run_dir(run_dir, resume=False)
    (run_dir / "checkpoint-1").rmdir()
    append(Recorder(run_dir), [1])
    check_run_dir(run_dir, resume=True)
    for refused in (lambda: check_run_dir(run_dir, resume=False), lambda: Recorder(run_dir)):
        with pytest.raises(ConfigError, match=r"output_dir=.*--resume_from_checkpoint") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert len(read_steps(run_dir)) == 1
    with pytest.raises(ConfigError, match="is a file"):
        check_run_dir(run_dir / "run.json", resume=True)


def test_token_records_round_trip(tmp_path):
    recorder = Recorder(tmp_path)
    columns = {
        "prompt": ["p", "q", ""],
        "reward": [1, 0.5, None],
        "tokens": [["a", "bad \ud83d half"], ["b"], []],
        "entropy": [np.array([0.1, 2.0]), [0.3], []],
        "rollout_logps": [None] * 3,
        "keep": [[True, False], [True], []],
        "covariance": [[0.5, -1], [], []],
        "predicted": [None] * 3,
        "estimator": ["single_logit", None, None],
        "control:kl_cov": [[True, False], None, []],
        "router": [[0, 1], [2], []],
    }
    path = recorder.record_tokens(12, columns)
    assert path.name == "step-000012.parquet" and token_steps(tmp_path) == [12]
    rows = read_tokens(tmp_path, 12)
    assert [row["step"] for row in rows] == [12] * 3 and [row["router"] for row in rows] == [[0, 1], [2], []]
    assert rows[0]["entropy"] == [np.float32(0.1), 2.0] and [row["reward"] for row in rows] == [1.0, 0.5, None]
    assert rows[0]["tokens"] == ["a", "bad ? half"] and rows[2]["tokens"] == []
    assert rows[2]["rollout_logps"] is None and rows[0]["keep"] == [True, False]
    kinds = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert kinds["covariance"] == kinds["predicted"] == "list<element: float>" and kinds["estimator"] == "string"
    assert kinds["keep"] == kinds["control:kl_cov"] == "list<element: bool>"
    assert rows[0]["control:kl_cov"] == [True, False] and rows[0]["covariance"] == [0.5, -1.0]
    with pytest.raises(ValueError, match="one value per sequence"):
        recorder.record_tokens(13, {"reward": [1.0], "prompt": ["a", "b"]})


# resume


@settings(max_examples=100)
@given(num_steps=st.integers(0, 7), kill=st.integers(0, 2**12), checkpoint=st.integers(0, 7))
def test_resume_gives_each_step_once_for_any_kill_point(num_steps, kill, checkpoint):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        append(Recorder(run_dir), range(1, num_steps + 1))
        whole = (run_dir / "steps.jsonl").read_bytes() if num_steps else b""
        torn = whole[: kill % (len(whole) + 1)]
        (run_dir / "steps.jsonl").write_bytes(torn)
        step = checkpoint % (torn.count(b"\n") + 1)

        append(Recorder.resume(run_dir, step), range(step + 1, num_steps + 3))

        records = read_steps(run_dir)
        assert [record["step"] for record in records] == list(range(1, num_steps + 3))
        assert [record["tokens"] for record in records] == [5 * n * (n + 1) for n in range(1, num_steps + 3)]
        kept = b"".join(whole.splitlines(keepends=True)[:step])
        assert (run_dir / "steps.jsonl").read_bytes().startswith(kept)


def test_resume_drops_later_evaluations_and_tokens(tmp_path):
    recorder = Recorder(tmp_path, {"lr": 1e-6, "steps": 4})
    append(recorder, [1, 2, 3, 4])
    for step in (0, 2, 4):
        recorder.record_eval(step, {"heldout/reward": step / 4})
        recorder.record_tokens(step, {"reward": [1.0]})
    (tmp_path / "tokens" / "step-000009.parquet.partial").write_bytes(b"torn")
    with open(tmp_path / "evals.jsonl", "ab") as file:
        file.write(b'{"step": 6, "me')
    Recorder.resume(tmp_path, 2, {"lr": 2e-6, "steps": 4})
    assert [record["step"] for record in read_evals(tmp_path)] == [0, 2]
    assert token_steps(tmp_path) == [0, 2]
    assert len(list((tmp_path / "tokens").iterdir())) == 2 and not list(tmp_path.glob("*.partial"))
    run = read_run(tmp_path)
    (entry,) = run["resumed"]
    assert (entry["step"], entry["last_recorded_step"], entry["dropped_records"]) == (2, 2, 2)
    assert run["config"]["lr"] == 1e-6 and entry["changed_config"] == {"lr": 2e-6}
    Recorder.resume(tmp_path, 2)
    assert len(read_run(tmp_path)["resumed"]) == 2


def test_resume_into_a_new_directory_starts_after_the_checkpoint(tmp_path):
    recorder = Recorder.resume(tmp_path / "new", 5, {"lr": 1.0})
    append(recorder, [6])
    assert [record["step"] for record in read_steps(tmp_path / "new")] == [6]
    assert read_run(tmp_path / "new")["resumed"][0]["last_recorded_step"] == 0


def test_damage_before_the_last_line_is_refused(tmp_path):
    append(Recorder(tmp_path), [1, 2, 3])
    lines = (tmp_path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    for refused in (lambda: read_steps(tmp_path), lambda: Recorder.resume(tmp_path, 1)):
        with pytest.raises(ConfigError, match="line 2 is damaged"):
            refused()
