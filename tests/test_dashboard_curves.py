"""Lines of a run and what is fitted to them: each answer by hand, or against the records themselves."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from dashboard_cases import write_run
from test_dashboard_payloads import look, plain, recorded

from rlvr.law import fit_law
from rlvr.monitor import read_steps
from rlvr.monitor.payloads.curves import agreement_payload, law_payload, series_payload
from rlvr.monitor.payloads.view import View
from rlvr.monitor.records import rollout_points, series


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", 60)


@pytest.fixture(scope="module")
def view(run_dir: Path) -> View:
    return look(run_dir)


# -------------------------------------------------------------------------------------------------------------- series


def test_series_of_a_short_run_is_the_run_itself(run_dir: Path, view: View) -> None:
    found = plain(series_payload(view, ["entropy/mean", "reward/mean", "not/recorded"], 600))
    records = read_steps(run_dir)
    assert found["per_point"] == 1 and found["series"].keys() == {"entropy/mean", "reward/mean"}
    assert found["step"] == [r["step"] for r in records] and found["tokens"] == [r["tokens"] for r in records]
    for name, parts in found["series"].items():
        values = series(records, name)[1]
        assert parts.pop("mean") == pytest.approx(values, rel=1e-5)
        ends = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}
        assert parts == pytest.approx(ends, rel=1e-5)
    assert found["seconds"] == pytest.approx([r["time"] - view.started for r in records], abs=1e-3)
    everything = plain(series_payload(view))
    assert everything["series"].keys() == view.table.names.keys()


def test_series_in_buckets_by_hand(tmp_path: Path) -> None:
    """5 records in 2 points: buckets of 3; a metric that is not always there counts where it is."""
    steps = [{"entropy/mean": float(n)} | ({"time/rollout": 2.0 * n} if n % 2 else {}) for n in range(1, 6)]
    steps[4]["entropy/mean"] = math.inf
    found = plain(series_payload(recorded(tmp_path, steps), points=2))
    assert found["per_point"] == 3 and found["step"] == [3, 5]
    ends = {"first": 1, "last": 4, "least": 1, "most": 4}
    assert found["series"]["entropy/mean"] == {"mean": [2, 4], "min": [1, 4], "max": [3, 4]} | ends
    ends = {"first": 2, "last": 10, "least": 2, "most": 10}
    assert found["series"]["time/rollout"] == {"mean": [4, 10], "min": [2, 10], "max": [6, 10]} | ends


def test_series_tells_ends_of_all_records_whatever_it_draws(tmp_path: Path) -> None:
    values = [math.nan, 3.0, 9.0, -5.0, 4.0, math.inf]
    view = recorded(tmp_path, [{"entropy/mean": value, "policy/loss": math.nan} for value in values])
    for points in (1, 2, 600):
        found = plain(series_payload(view, points=points, extremes=False))["series"]
        ends = {"first": 3, "last": 4, "least": -5, "most": 9}
        assert {name: found["entropy/mean"][name] for name in ends} == ends
        assert [found["policy/loss"][name] for name in ends] == [None] * 4 and "min" not in found["entropy/mean"]
    found = plain(series_payload(view, first=2, last=3))["series"]["entropy/mean"]
    assert found == {"mean": [3, 9], "first": 3, "last": 9, "least": 3, "most": 9}
    assert plain(series_payload(view, first=7))["series"]["entropy/mean"]["first"] is None


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


# ----------------------------------------------------------------------------------------------------------- agreement


def test_agreement_is_the_least_squares_line_of_all_records(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = 1e-9 * rng.normal(size=2500)
    y = 1e6 * x + 1e-3 + 0.01 * rng.normal(size=2500)
    x[7], y[9] = math.nan, math.inf
    lines = [
        {"step": n + 1, "time": 1.0, "tokens": 1, "metrics": {"dynamics/predicted": a, "dynamics/measured": b}}
        for n, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True))
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plain(agreement_payload(look(tmp_path)))
    known = np.isfinite(x) & np.isfinite(y)
    slope, intercept = np.polyfit(1e9 * x[known], y[known], 1)
    r2 = np.corrcoef(x[known], y[known])[0, 1] ** 2
    assert found["count"] == 2498 and 0.001 < r2 < 0.1
    assert [found[name] for name in ("slope", "intercept", "r2")] == pytest.approx(
        [1e9 * slope, intercept, r2], rel=1e-5
    )
    assert len(found["points"]) == 2000
    assert found["points"][0] == pytest.approx([x[0], y[0], 1], rel=1e-5) and found["points"][-1][2] == 2500


@pytest.mark.parametrize(
    "pairs", [[], [(1, 2), (3, 4)], [(0.1, 1), (0.1, 2), (0.1, 3)], [(1, 0.1), (2, 0.1), (3, 0.1)]]
)
def test_agreement_without_a_line_is_null(pairs: list[tuple[float, float]], tmp_path: Path) -> None:
    steps = [{"dynamics/predicted": a, "dynamics/measured": b} for a, b in pairs]
    found = plain(agreement_payload(recorded(tmp_path, steps)))
    assert found["points"] == [[a, b, n] for n, (a, b) in enumerate(pairs, start=1)]
    assert found["count"] == len(pairs) and [found[name] for name in ("slope", "intercept", "r2")] == [None] * 3
