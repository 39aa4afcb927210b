"""What a page is told of a run: each answer by hand, or against the records themselves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dashboard_cases import BAND, HOSTILE, write_run

from rlvr.controls import CONTROLS
from rlvr.monitor import METRICS, Recorder, read_steps
from rlvr.monitor.groups import Groups
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.payloads.curves import series_payload
from rlvr.monitor.payloads.details import histograms_payload, positions_payload, router_payload
from rlvr.monitor.payloads.numbers import to_json
from rlvr.monitor.payloads.runs import metrics_payload, run_payload, run_row, runs_payload
from rlvr.monitor.payloads.view import View, control_names, usual_step_seconds
from rlvr.monitor.watched import Watched


def plain(payload: Any) -> Any:
    """As the page gets it."""
    return json.loads(to_json(payload))


def look(run_dir: Path) -> View:
    return Watched("lab/one", "one", run_dir, eager=10**9).look()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", 60)


@pytest.fixture(scope="module")
def view(run_dir: Path) -> View:
    return look(run_dir)


def recorded(run_dir: Path, steps: list[dict[str, float]], **config: Any) -> View:
    recorder = Recorder(run_dir, config)
    for number, metrics in enumerate(steps, start=1):
        recorder.record_step(number, metrics)
    return look(run_dir)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_metrics_explain_everything_that_can_be_recorded() -> None:
    found = plain(metrics_payload())
    effects = {f"{name}/effect" for name in CONTROLS}
    assert found["metrics"].keys() == METRICS.keys() | effects
    assert found["metrics"]["clip/low"]["touches"] and found["metrics"]["law/b"]["normal"] is None
    for name, one in HISTOGRAMS.items():
        assert found["histograms"][name] == {"unit": one.unit, "meaning": one.meaning, "edges": list(one.edges)}


def test_runs_row_says_how_a_run_stands(run_dir: Path, view: View) -> None:
    found = plain(runs_payload([run_row(view)], [{"id": "x", "error": "y"}], 5.0))
    assert found["problems"] == [{"id": "x", "error": "y"}] and found["now"] == 5.0
    (row,) = found["runs"]
    last = read_steps(run_dir)[-1]
    assert (row["id"], row["name"], row["status"], row["model"]) == ("lab/one", "one", "finished", "tiny")
    assert (row["steps"], row["last_step"], row["max_steps"], row["tokens"]) == (60, 60, 60, last["tokens"])
    assert row["entropy"] == pytest.approx(last["metrics"]["entropy/mean"], rel=1e-5)
    assert row["controls"] == ["kl_cov", "clip_cov"] and row["read"] == 1.0
    assert row["alerts"] == sum(len(r.get("alerts", [])) for r in read_steps(run_dir)) == 6
    assert row["started"] < row["updated"]


def test_runs_row_of_an_empty_directory_is_zero(tmp_path: Path) -> None:
    row = plain(run_row(recorded(tmp_path, [])))
    assert (row["steps"], row["last_step"], row["tokens"], row["entropy"], row["reward"]) == (0, 0, 0, None, None)
    assert row["max_steps"] is None and row["updated"] == row["started"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, []),
        ("kl_cov", ["kl_cov"]),
        ('[{"name": "kl_cov", "coef": 1}, "clip_v"]', ["kl_cov", "clip_v"]),
        (['{"name": "clip_b"}', {"name": "tis"}], ["clip_b", "tis"]),
        ({"name": "mis"}, ["mis"]),
    ],
)
def test_control_names_of_every_way_to_write_them(spec: Any, expected: list[str]) -> None:
    assert control_names({"controls": spec}) == expected


def test_version_changes_with_whatever_changes(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", 4, finish=False, features={"tokens", "prompts", "evals"})
    watched = Watched("a", "a", run_dir)
    versions = [watched.look().version]
    assert watched.look().version == versions[0]
    recorder = Recorder.resume(run_dir, 4)
    for change in (
        lambda: recorder.record_step(5, {"entropy/mean": 1.0}),
        lambda: recorder.record_eval(5, {"heldout/reward": 0.5}),
        lambda: recorder.record_tokens(5, {"reward": [1.0]}),
        lambda: recorder.record_groups(5, Groups(["new"], [1], [8], [0.1])),
        lambda: recorder.finish(),
    ):
        change()
        versions.append(watched.look().version)
    assert len(set(versions)) == len(versions)


def test_usual_step_is_one_that_makes_a_rollout(tmp_path: Path) -> None:
    """One step in 16 takes 1000 s, the others 10 s: 1000 s are usual, too."""
    view = recorded(tmp_path, [{"time/step": 1000.0 if n % 16 == 0 else 10.0} for n in range(160)])
    assert usual_step_seconds(view.table) == 1000


# ----------------------------------------------------------------------------------------------------------------- run


def test_run_has_what_was_recorded(run_dir: Path, view: View) -> None:
    found = plain(run_payload(view))
    assert found["config"]["hub_token"] == "<redacted>" and found["config"]["nested"]["prompt"] == HOSTILE.replace(
        "\ud83d", "?"
    )
    assert set(found["metrics"]) == {name for r in read_steps(run_dir) for name in r["metrics"]}
    assert found["band"] == {name: BAND[name] for name in ("low", "high", "lever", "lowest", "highest")}
    assert found["alarm"] == {"low": 0.01, "high": None} and found["finished"] and found["error"] is None
    assert [entry["step"] for entry in found["evals"]] == [0, 15, 30, 45, 60]
    assert [(a["step"], a["kind"]) for a in found["alerts"][:2]] == [(20, "collapse"), (20, "thermostat")]
    assert found["not_finite"] == {} and found["settings"] == found["config"]


def test_run_without_instruments_has_none_of_them(tmp_path: Path) -> None:
    metrics = {"policy/loss": math.nan, "clip/low": 0.0, "entropy/mean": 1.0}
    found = plain(run_payload(recorded(tmp_path, [metrics, metrics], entropy_alarm='{"low": 0.2, "high": 3.0}')))
    assert found["not_finite"] == {"policy/loss": 2} and found["band"] is None
    assert found["alarm"] == {"low": 0.2, "high": 3.0}


def test_run_has_its_first_settings_and_those_it_goes_on_with(tmp_path: Path) -> None:
    recorded(tmp_path, [{}], learning_rate=1.0, seed=3)
    Recorder.resume(tmp_path, 1, {"learning_rate": 2.0, "seed": 3})
    found = plain(run_payload(look(tmp_path)))
    assert found["config"] == {"learning_rate": 1, "seed": 3} and found["settings"] == {"learning_rate": 2, "seed": 3}


@pytest.mark.parametrize("name", ["started", "config", "resumed", "versions", "status"])
def test_run_with_a_null_in_its_settings_can_be_read(name: str, tmp_path: Path) -> None:
    recorded(tmp_path, [{"entropy/mean": 1.0}])
    run = json.loads((tmp_path / "run.json").read_text()) | {name: None}
    (tmp_path / "run.json").write_text(json.dumps(run))
    view = look(tmp_path)
    assert plain(run_row(view))["steps"] == 1 and plain(run_payload(view))["id"] == "lab/one"
    assert plain(series_payload(view))["step"] == [1]


def test_run_with_a_null_in_a_resumption_can_be_read(tmp_path: Path) -> None:
    recorded(tmp_path, [{"entropy/mean": 1.0}])
    run = json.loads((tmp_path / "run.json").read_text())
    run["resumed"] = [None, {"time": None, "changed_config": None}]
    (tmp_path / "run.json").write_text(json.dumps(run))
    view = look(tmp_path)
    assert plain(run_row(view))["status"] == "running" and plain(run_payload(view))["resumed"] == [{}]


def test_record_that_does_not_tell_its_tokens_has_those_of_the_one_before(tmp_path: Path) -> None:
    """Also at the start of what is read later."""
    watched = Watched("a", "a", tmp_path)
    for counts in ([None, 5], ["NaN", None, 9, None]):
        with open(tmp_path / "steps.jsonl", "a") as file:
            for tokens in counts:
                file.write(json.dumps({"step": 1, "time": 1.0, "tokens": tokens, "metrics": {}}) + "\n")
        view = watched.look()
    assert plain(series_payload(view))["tokens"] == [0, 5, 5, 5, 9, 9] and run_row(view)["tokens"] == 9


# ------------------------------------------------------------------------------------------------------------- details


def test_details_are_in_the_layout_of_the_page(run_dir: Path, view: View) -> None:
    records = read_steps(run_dir)
    found = plain(histograms_payload(view))
    assert found["step"] == [r["step"] for r in records] and found["counts"].keys() == HISTOGRAMS.keys()
    assert found["counts"]["entropy"] == [r["histograms"]["entropy"] for r in records]
    found = plain(positions_payload(view))
    assert found["edges"] == [0, 16, 48, 112, 240] and len(found["entropy"]) == len(found["mismatch"]) == 60
    first = records[0]["entropy_by_position"]
    assert found["entropy"][0] == [pytest.approx(x, rel=1e-5) for x in first["mean"][:2]] + [None] * 3
    found = plain(router_payload(view))
    assert found["layers"] == ["a", "b", "c"] and [len(load) for load in found["load"][0]] == [4, 6, 6]
    last = records[-1]["routers"]
    assert found["load_last"] == [pytest.approx(load, rel=1e-5) for load in last["load"]]
    assert found["load"][-1] == [pytest.approx(load, rel=1e-5) for load in last["load"]]
    assert found["entropy"][-1] == last["entropy"] and found["soft"][-1] == last["soft"]
    assert found["position"] == {name: value for name, value in last.items() if name.startswith("position_")}


def test_details_that_were_not_recorded_are_empty(tmp_path: Path) -> None:
    view = recorded(tmp_path, [{"entropy/mean": 1.0}])
    assert plain(histograms_payload(view)) == {"step": [], "counts": {}}
    assert plain(positions_payload(view)) == {"step": [], "edges": [], "entropy": [], "mismatch": []}
    assert plain(router_payload(view))["load_last"] == []
    assert plain(router_payload(view))["layers"] == [] and plain(router_payload(view))["position"] is None
