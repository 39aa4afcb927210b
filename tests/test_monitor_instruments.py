"""What the summary says of the thermostat, the law, the dynamics and pass@k."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_monitor_summary import synthetic_step

from rlvr.law import fit_law
from rlvr.monitor import Recorder, format_summary, summarize
from rlvr.monitor.instruments import CLASSES, ESTIMATORS, law_found, read_instruments, thermostat_of
from rlvr.monitor.records import read_run, rollout_points

THERMOSTAT = {"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0, "patience": 20}


def instrumented_run(run_dir: Path, num_steps: int = 80, seed: int = 0) -> Path:
    """A run with every instrument on: a thermostat reaches its band, and reward obeys R = .9 - .25 exp(H)."""
    rng = np.random.default_rng(seed)
    recorder = Recorder(run_dir, {"model": "tiny", "thermostat": json.dumps(THERMOSTAT)})
    recorder.record_eval(0, {"heldout/reward": 0.22} | pass_rates(0.22))
    for step in range(1, num_steps + 1):
        entropy = 0.4 + 0.7 * math.exp(-8 * step / num_steps) + rng.normal(0, 0.01)
        values = synthetic_step(rng, step, num_steps) | {"entropy/mean": entropy}
        values |= {"clip/low": 0.0, "clip/high": 0.0}
        if "reward/mean" in values:
            values["reward/mean"] = 0.9 - 0.25 * math.exp(entropy) + rng.normal(0, 0.005)
        inside = THERMOSTAT["low"] <= entropy <= THERMOSTAT["high"]
        values |= {"thermostat/value": 5.0 * step / num_steps, "thermostat/position": 0.5 * step / num_steps}
        values |= {"thermostat/outside": 0.0 if inside else float(step)} | dynamics(rng)
        values |= {
            f"covariance/top_2_in_{10**i}": 0.3 * 4 ** (i - 1) * math.exp(0.1 * rng.normal()) for i in range(1, 5)
        }
        values |= knowledge(0.5 * step / num_steps) | traffic(1 - 0.5 * step / num_steps)
        length = 3 + 2 * (step > num_steps / 2)
        bins = {"edges": [0.0, 16.0, 48.0, 112.0, 240.0][:length], "mean": list(entropy * np.linspace(2, 0.5, length))}
        recorder.record_step(step, values, bins | {"count": [100.0] * (length - 1) + [0.0]}, routers(rng))
    recorder.record_eval(num_steps, {"heldout/reward": 0.5} | pass_rates(0.5))
    recorder.finish()
    return run_dir


def pass_rates(p: float) -> dict[str, float]:
    return {f"heldout/pass_at_{k}": 1 - (1 - p) ** k for k in (1, 2, 4, 8)}


def dynamics(rng: np.random.Generator) -> dict[str, float]:
    parts = dict(zip(CLASSES, (-0.03, 0.01, 0.005, -0.01) + 0.002 * rng.normal(size=4), strict=True))
    values = {f"dynamics/measured_{name}": value for name, value in parts.items()}
    total = sum(parts.values())
    values |= {"dynamics/measured": total, "dynamics/predicted": 1e-7 * total, "kl_cov/effect": 1e-9}
    return values | {f"dynamics/{name}_correlation": 0.3 - 0.05 * i for i, name in enumerate(ESTIMATORS)}


def knowledge(explained: float, value: float = 0.5, earned: float = 0.52) -> dict[str, float]:
    values = {"critic/explained_variance": explained, "critic/value": value, "critic/earned": earned}
    spread = {"advantage/p05": -0.4, "advantage/p50": 0.01, "advantage/p95": 0.6}
    return values | spread | {"critic/loss": 0.1, "time/critic": 0.1}


def traffic(entropy: float) -> dict[str, float]:
    values = {"entropy": entropy, "soft": entropy / 2, "experts": 2.5, "load_max": 1.4, "dead": 0.25}
    return {f"router/{name}": value for name, value in values.items()}


def routers(rng: np.random.Generator) -> dict[str, Any]:
    """Of three layers, one of which has fewer experts."""
    load = [rng.dirichlet(np.ones(n)).tolist() for n in (4, 6, 6)]
    return {"layers": ["a", "b", "c"], "entropy": [0.9, 0.5, 0.7], "soft": [0.8, 0.1, 0.3], "load": load}


def write(run_dir: Path, steps: list[dict[str, float]], config: dict[str, Any] | None = None) -> Path:
    recorder = Recorder(run_dir, config or {})
    for number, values in enumerate(steps, start=1):
        recorder.record_step(number, values)
    return run_dir


def summary_of(run_dir: Path) -> str:
    return format_summary(summarize(run_dir))


# law


def lawful(h: float, a: float = 0.25) -> dict[str, float]:
    return {"entropy/mean": h, "reward/mean": 0.9 - a * math.exp(h), "time/rollout": 1.0}


def test_law_is_that_of_the_rollouts_of_the_whole_run(tmp_path):
    """Steps that reuse a rollout are no points; a law that holds exactly: ceiling .9 - .25."""
    again = {"entropy/mean": 0.01, "reward/mean": 0.0, "time/rollout": 0.0}
    steps = [values for i in range(15) for values in (lawful(1 - i / 20), again)]
    write(tmp_path, steps)
    law = summarize(tmp_path).instruments.law
    assert law == fit_law([1 - i / 20 for i in range(15)], [0.9 - 0.25 * math.exp(1 - i / 20) for i in range(15)])
    text = summary_of(tmp_path)
    assert "law               R = -0.250 exp(H) + 0.900 over 15 rollouts, R2 1.000 (a straight line in H: 0.9" in text
    assert "predicted ceiling 0.650 [0.650, 0.650], if the law holds down to H = 0" in text


def test_law_says_why_not_yet_and_why_it_does_not_hold(tmp_path):
    write(tmp_path / "few", [lawful(1.0), lawful(0.5)])
    assert "not yet: 2 points, at least 12 are needed" in summary_of(tmp_path / "few")
    write(tmp_path / "up", [lawful(0.2 + i / 30, a=-0.1) for i in range(30)])
    text = summary_of(tmp_path / "up")
    assert "does not hold here: reward rises with entropy" in text and "ceiling" not in text
    write(tmp_path / "none", [{"policy/tokens": 1}])
    assert "\nlaw " not in summary_of(tmp_path / "none")


# thermostat


def held(outside: list[float], position: float = 0.2) -> list[dict[str, float]]:
    return [
        {"thermostat/value": 10 * position, "thermostat/position": position, "thermostat/outside": value}
        for value in outside
    ]


def test_thermostat_counts_the_steps_inside_in_the_last_half(tmp_path):
    """Last half: 0, 0, 1, 0 of 8 steps, 3 in 4 inside."""
    write(tmp_path, held([-1, -2, -3, -4, 0, 0, 1, 0]), {"thermostat": THERMOSTAT})
    found = summarize(tmp_path).instruments.thermostat
    assert (found.inside, found.steps, found.value, found.outside) == (0.75, 4, 2.0, 0)
    assert found.thermostat.lever == "kl_cov.coef"
    text = summary_of(tmp_path)
    assert "thermostat        inside the band [0.3, 0.5] nats in 75 % of the last 4 steps" in text
    assert "kl_cov.coef at 2, 20 % of the way to most entropy" in text and " now" not in text


@pytest.mark.parametrize(
    ("outside", "position", "said"),
    [
        (-3, 0.4, "                  below the band for 3 steps now"),
        (1, 0.4, "                  above the band for 1 step now"),
        (-20, 1.0, "WARNING: below the band for 20 steps now"),
        (-20, 1.0, "kl_cov.coef at 10, the end of its range: widen it"),
        (20, 0.0, "kl_cov.coef at 0, the end of its range: widen it"),
    ],
)
def test_thermostat_outside_its_band_is_said(outside, position, said, tmp_path):
    write(tmp_path, held([outside], position), {"thermostat": json.dumps(THERMOSTAT)})
    assert said in summary_of(tmp_path)


def test_thermostat_at_the_wrong_end_needs_no_wider_range(tmp_path):
    write(tmp_path, held([-5], 0.0), {"thermostat": THERMOSTAT})
    assert "widen" not in summary_of(tmp_path)


def test_thermostat_of_a_resumed_run_is_the_last_one(tmp_path):
    write(tmp_path, held([0.0]), {"thermostat": THERMOSTAT})
    changed = THERMOSTAT | {"high": 0.9}
    Recorder.resume(tmp_path, 1, {"thermostat": changed})
    assert thermostat_of(read_run(tmp_path)).high == 0.9
    Recorder.resume(tmp_path, 1, {"thermostat": THERMOSTAT})  # as at the start of the run: no change is written
    assert thermostat_of(read_run(tmp_path)).high == THERMOSTAT["high"]


@pytest.mark.parametrize("spec", [None, "none", "{", {"lever": "x"}, {"speed": 1}])
def test_thermostat_that_the_configuration_does_not_hold_is_none(spec, tmp_path):
    write(tmp_path, held([0.0]), {"thermostat": spec})
    assert thermostat_of(read_run(tmp_path)) is None
    assert "thermostat        inside the band in 100 % of the last 1 step\n" in summary_of(tmp_path)


# dynamics


def test_dynamics_are_means_over_the_watched_steps(tmp_path):
    names = {"discriminator": (0.1, 0.3), "steer": (0.4, 0.2)}
    steps = []
    for i in range(2):
        parts = dict(zip(CLASSES, (-0.04, 0.01, 0.0, -0.02 * i), strict=True))
        values = {f"dynamics/measured_{name}": value for name, value in parts.items()}
        values |= {f"dynamics/{name}_correlation": both[i] for name, both in names.items()}
        values |= {"dynamics/measured": -0.02 - 0.02 * i, "dynamics/predicted": -2e-8, "kl_cov/effect": 1e-8 * i}
        steps += [values, {"policy/tokens": 1}]  # every second step is watched
    write(tmp_path, steps)
    found = summarize(tmp_path).instruments.dynamics
    assert (found.steps, found.measured, found.predicted) == (2, pytest.approx(-0.03, abs=1e-15), -2e-8)
    assert found.correlations == pytest.approx({"discriminator": 0.2, "steer": 0.3}, abs=1e-15)
    classes = (-0.04, 0.01, 0.0, -0.01, -0.03 - (-0.04 + 0.01 - 0.01))  # the last: what the others leave of the whole
    assert list(found.by_class.values()) == pytest.approx(classes, abs=1e-15)
    assert list(found.by_class) == [*CLASSES, "advantage_0"] and found.effects == {"kl_cov": 5e-9}
    text = summary_of(tmp_path)
    assert "-0.03 nats per step measured, -2.0e-08 predicted for SGD (2 steps watched)" in text
    assert "discriminator 0.20, best steer 0.30" in text
    assert "tokens that spend most entropy: rewarded, likely (-0.04 nats per step)" in text
    assert "kl_cov adds +5.0e-09 to the prediction; without it -2.5e-08" in text


def test_dynamics_name_no_class_where_none_loses_entropy(tmp_path):
    parts = {f"dynamics/measured_{name}": 0.1 for name in CLASSES}
    write(tmp_path / "none", [parts | {"dynamics/measured": 0.5, "dynamics/predicted": 1e-8}])
    assert "spend" not in summary_of(tmp_path / "none")
    write(tmp_path / "rest", [parts | {"dynamics/measured": 0.1, "dynamics/predicted": 1e-8}])
    assert "tokens that spend most entropy: advantage 0 (-0.3 nats per step)" in summary_of(tmp_path / "rest")


def test_dynamics_skip_a_step_with_a_class_that_is_no_number(tmp_path):
    whole = dynamics(np.random.default_rng(0))
    write(tmp_path, [whole, whole | {"dynamics/measured_rewarded_likely": math.nan}])
    found = summarize(tmp_path).instruments.dynamics
    assert found.by_class["rewarded_likely"] == whole["dynamics/measured_rewarded_likely"]
    assert sum(found.by_class.values()) == pytest.approx(whole["dynamics/measured"], abs=1e-15)


# pass@k, and a clip that never acted


def test_pass_rates_are_shown_first_and_last(tmp_path):
    recorder = Recorder(tmp_path)
    for step, p in ((0, 0.5), (1, 0.6), (2, 0.8)):
        recorder.record_eval(step, {"heldout/reward": p} | pass_rates(p))
    summary = summarize(tmp_path)
    assert list(summary.heldout_after.pass_at) == [1, 2, 4, 8]
    rows = [line.split() for line in format_summary(summary).splitlines() if "pass@1" in line]
    assert rows == [["pass@1,", "@8", "0.500,", f"{1 - 0.5**8:.3f}", "0.800,", f"{1 - 0.2**8:.3f}"]]


def test_a_clip_that_never_acted_is_not_listed(tmp_path):
    silent = {"clip/low": 0.0, "clip/high": 0.0, "policy/tokens": 10}
    write(tmp_path / "beside", [silent | {"kl_cov/selected": 0.0}])
    text = summary_of(tmp_path / "beside")
    assert "clip/" not in text and "kl_cov/selected" in text  # a control that touches nothing is worth knowing
    write(tmp_path / "alone", [silent])
    assert "share of trained tokens touched: none" in summary_of(tmp_path / "alone")
    write(tmp_path / "acting", [silent | {"clip/low": 0.01}])
    assert "clip/low" in summary_of(tmp_path / "acting")


# all of them


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instrumented_run(tmp_path_factory.mktemp("instrumented"))


def test_summary_of_all_instruments_fits_a_terminal(instrumented):
    lines = summary_of(instrumented).splitlines()
    assert max(map(len, lines[2:])) <= 100 and len(lines) <= 52
    for label in ("critic ", "routers ", "law ", "thermostat ", "entropy dynamics ", "  pass@1, @8 "):
        assert sum(line.startswith(label) for line in lines) == 1


def test_instruments_of_an_empty_run_are_none():
    found = read_instruments({}, [])
    assert (
        found.critic is None
        and found.routers is None
        and (found.law, found.thermostat, found.dynamics) == (None, None, None)
    )
    assert law_found([]) is None and rollout_points([]) == []
