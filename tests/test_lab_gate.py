"""What the laboratory has shown must stay so: collapse, what holds it, the law, bitwise repetition. A minute.

tests/data/lab-base is the laboratory's base model, as `make lab` made it: it takes minutes.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlvr.law import fit_law
from rlvr.monitor.records import read_steps
from scripts.lab.base import BaseSettings, base_model
from scripts.lab.methods import METHODS
from scripts.lab.questions import at, window_means
from scripts.lab.records import Record, read_record
from scripts.lab.runs import LabRun, perform

BASE = Path(__file__).parent / "data" / "lab-base"
ROLLOUTS = 50


def lab_run(name: str) -> LabRun:
    return LabRun(name=name, part="gate", settings=METHODS[name].settings, rollouts=ROLLOUTS, samples=0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Seed 0 of three methods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lab"))
        runs = [lab_run(name) for name in ("grpo", "kl-cov", "thermostat")]
        for run in runs:
            perform(run, BASE)
        return {run.name: read_record(run) for run in runs}


def test_entropy_collapses_under_grpo(found: dict[str, Record]):
    entropy = found["grpo"].entropy
    assert entropy[0] > 0.5 and at(entropy, 1.0) < 0.25


def test_the_law_fits_the_reference_run(found: dict[str, Record]):
    plain = found["grpo"]
    assert fit_law(window_means(plain.made), window_means(plain.reward)).r2 > 0.9


@pytest.mark.parametrize("name", ["kl-cov", "thermostat"])
def test_what_holds_entropy_holds_it(found: dict[str, Record], name: str):
    assert at(found[name].entropy, 1.0) - at(found["grpo"].entropy, 1.0) > 0.05


def test_runs_repeat_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []
    for again in ("first", "second"):
        monkeypatch.chdir(tmp_path)
        path = perform(replace(lab_run("thermostat"), name=again, rollouts=5), BASE)
        steps = [record["metrics"].items() for record in read_steps(path)]
        measured.append([{k: v for k, v in step if not k.startswith("time/")} for step in steps])
    assert measured[0] == measured[1]


def test_a_short_run_is_the_first_part_of_a_long_one(
    found: dict[str, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Knobs are compared with the method's own setting so."""
    monkeypatch.chdir(tmp_path)
    short = replace(lab_run("grpo"), rollouts=5)
    perform(short, BASE)
    assert read_record(short).entropy == found["grpo"].entropy[:5]


@pytest.mark.slow
def test_base_of_these_tests_is_the_laboratorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Made anew, it has the same numbers; other machines round otherwise."""
    monkeypatch.chdir(tmp_path)
    made, kept = (json.loads((path / "lab.json").read_text()) for path in (base_model(BaseSettings()), BASE))
    assert made.keys() == kept.keys()
    measured = ("pass@1", "pass@8", "pass@16", "entropy")
    assert {k: v for k, v in made.items() if k not in measured} == {k: v for k, v in kept.items() if k not in measured}
    assert [made[k] for k in measured] == pytest.approx([kept[k] for k in measured], abs=0.06)
