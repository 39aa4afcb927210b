"""What a page is told of a run: each answer by hand, or against the records themselves."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dashboard_cases import BAND, HOSTILE, write_run

from rlvr.controls import CONTROLS
from rlvr.law import fit_law
from rlvr.monitor import METRICS, Recorder, read_steps
from rlvr.monitor.groups import Groups
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.payloads.curves import law_payload, series_payload
from rlvr.monitor.payloads.details import histograms_payload, positions_payload, router_payload
from rlvr.monitor.payloads.numbers import to_json
from rlvr.monitor.payloads.runs import metrics_payload, run_payload, run_row, runs_payload
from rlvr.monitor.payloads.view import View, control_names, usual_step_seconds
from rlvr.monitor.records import rollout_points, series
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
    assert found["not_finite"] == {} and all(found["has"].values())


def test_run_without_instruments_has_none_of_them(tmp_path: Path) -> None:
    metrics = {"policy/loss": math.nan, "clip/low": 0.0, "entropy/mean": 1.0}
    found = plain(run_payload(recorded(tmp_path, [metrics, metrics], entropy_alarm='{"low": 0.2, "high": 3.0}')))
    assert not any(found["has"].values())
    assert found["not_finite"] == {"policy/loss": 2} and found["band"] is None
    assert found["alarm"] == {"low": 0.2, "high": 3.0}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("clip/low", "controls"),
        ("kl_cov/selected", "controls"),
        ("entropy_bonus/coef", "controls"),
        ("thermostat/value", "controls"),
        ("mismatch/kl", "engine"),
        ("router/entropy", "router"),
        ("dynamics/measured", "dynamics"),
    ],
)
def test_run_has_the_part_that_shows_a_metric(name: str, part: str, tmp_path: Path) -> None:
    found = plain(run_payload(recorded(tmp_path, [{name: 0.5}])))["has"]
    assert [known for known, has in found.items() if has] == [part]


# -------------------------------------------------------------------------------------------------------------- series


def test_series_of_a_short_run_is_the_run_itself(run_dir: Path, view: View) -> None:
    found = plain(series_payload(view, ["entropy/mean", "reward/mean", "not/recorded"], 600))
    records = read_steps(run_dir)
    assert found["per_point"] == 1 and found["series"].keys() == {"entropy/mean", "reward/mean"}
    assert found["step"] == [r["step"] for r in records] and found["tokens"] == [r["tokens"] for r in records]
    for name, parts in found["series"].items():
        assert parts.keys() == {"mean"} and parts["mean"] == pytest.approx(series(records, name)[1], rel=1e-5)
    assert found["seconds"] == pytest.approx([r["time"] - view.started for r in records], abs=1e-3)
    everything = plain(series_payload(view))
    assert everything["series"].keys() == view.table.names.keys()


def test_series_in_buckets_by_hand(tmp_path: Path) -> None:
    """5 records in 2 points: buckets of 3; a metric that is not always there counts where it is."""
    steps = [{"entropy/mean": float(n)} | ({"time/rollout": 2.0 * n} if n % 2 else {}) for n in range(1, 6)]
    steps[4]["entropy/mean"] = math.inf
    found = plain(series_payload(recorded(tmp_path, steps), points=2))
    assert found["per_point"] == 3 and found["step"] == [3, 5]
    assert found["series"]["entropy/mean"] == {"mean": [2, 4], "min": [1, 4], "max": [3, 4]}
    assert found["series"]["time/rollout"] == {"mean": [4, 10], "min": [2, 10], "max": [6, 10]}


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [
        (10, 20, list(range(10, 21))),
        (58.5, math.inf, [59, 60]),
        (-math.inf, 2, [1, 2]),
        (70, 80, []),
        (20, 10, []),
        (-1e30, 1e30, list(range(1, 61))),
    ],
)
def test_series_between_two_steps(first: float, last: float, steps: list[int], view: View) -> None:
    found = plain(series_payload(view, ["entropy/mean"], 600, first, last))
    assert found["step"] == steps and len(found["series"]["entropy/mean"]["mean"]) == len(steps)


# ----------------------------------------------------------------------------------------------------------------- law


def test_law_is_that_of_the_rollouts(run_dir: Path, view: View) -> None:
    found = plain(law_payload(view))
    points = rollout_points(read_steps(run_dir))
    fit = fit_law(*zip(*points, strict=True))
    assert fit.verdict == "holds" and "predicted ceiling" in found["verdict_text"] and "exp(H)" in found["formula"]
    assert found["fit"] == asdict(fit)
    assert [point[1:] for point in found["points"]] == [pytest.approx(point, rel=1e-5) for point in points]
    assert [point[0] for point in found["points"]] == list(range(1, 60, 2))
    x, low, middle, high = zip(*found["band"], strict=True)
    assert len(x) == 60 and x[0] == 1 and x[-1] == pytest.approx(math.exp(max(h for h, _ in points)), rel=1e-5)
    assert (low[0], middle[0], high[0]) == pytest.approx((fit.ceiling_low, fit.ceiling, fit.ceiling_high), rel=1e-5)
    assert middle[-1] == pytest.approx(fit.b - fit.a * x[-1], rel=1e-4)


@pytest.mark.parametrize("number", [0, 1, 2, 11])
def test_law_of_few_rollouts_says_so(number: int, tmp_path: Path) -> None:
    steps = [{"entropy/mean": 1 - 0.05 * n, "reward/mean": 0.1 * n, "time/rollout": 1.0} for n in range(number)]
    found = plain(law_payload(recorded(tmp_path, steps)))
    assert found["fit"]["verdict"] == "not yet" and found["verdict_text"].startswith("not yet: ")
    assert len(found["points"]) == number and len(found["band"]) == (60 if number > 2 else 0)
    assert (found["fit"]["ceiling_low"] is None) == (number <= 2)


def test_law_shows_at_most_two_thousand_points(tmp_path: Path) -> None:
    values = [{"entropy/mean": 1 - n / 5000, "reward/mean": n / 5000, "time/rollout": 1.0} for n in range(2500)]
    lines = [{"step": n + 1, "time": 1.0, "tokens": 1, "metrics": m} for n, m in enumerate(values)]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plain(law_payload(look(tmp_path)))
    assert len(found["points"]) == 2000 and found["points"][0][0] == 1 and found["points"][-1][0] == 2500
    assert found["fit"]["num_points"] == 2500


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
    assert found["load"][-1] == [pytest.approx(load, rel=1e-5) for load in last["load"]]
    assert found["entropy"][-1] == last["entropy"] and found["soft"][-1] == last["soft"]
    assert found["position"] == {name: value for name, value in last.items() if name.startswith("position_")}


def test_details_that_were_not_recorded_are_empty(tmp_path: Path) -> None:
    view = recorded(tmp_path, [{"entropy/mean": 1.0}])
    assert plain(histograms_payload(view)) == {"step": [], "counts": {}}
    assert plain(positions_payload(view)) == {"step": [], "edges": [], "entropy": [], "mismatch": []}
    assert plain(router_payload(view))["layers"] == [] and plain(router_payload(view))["position"] is None
