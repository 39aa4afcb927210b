"""Which runs an experiment compares."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import Band, Result, as_json, entropy_of_rollouts, picture, result, table
from .runs import RUNS, UPDATES, LabRun, perform

Settings = Mapping[str, Any]
BAND = Band(0.35, 0.45)
KL_COV = {"name": "kl_cov", "fraction": 0.2}
CRITIC = {"critic_learning_rate": 3e-4}


def bonus(coef: float) -> Settings:
    return {"controls": [{"name": "entropy_bonus", "coef": coef}]}


def hold(lever: str, control: Settings, lowest: float, highest: float) -> Settings:
    """A thermostat that holds entropy in the band by a hyper-parameter of the control, starting from `lowest`.

    A run has only 400 steps, so its gain is three times the default; chosen on seed 0.
    """
    name, _, field = lever.partition(".")
    band = {"low": BAND.low, "high": BAND.high}
    return {
        "controls": [{"name": name, **control, field: lowest}],
        "thermostat": {"lever": lever, **band, "lowest": lowest, "highest": highest, "gain": 3.0, "rate": 0.2},
    }


# Of the constant bonuses 0.1 hardly slows the collapse and 0.3 ends in a uniform policy; the thermostat's range spans
# both. KL-Cov does not reach the band: at coef 10 the gradient's norm is 10 to 20, and it is clipped to 1.
METHODS: dict[str, Settings] = {
    "grpo": {},
    **{f"bonus-{coef}": bonus(coef) for coef in (0.03, 0.1, 0.3, 1.0)},
    "clip-cov": {"controls": [{"name": "clip_cov", "fraction": 0.02}]},
    "kl-cov": {"controls": [{**KL_COV, "coef": 1.0}]},
    "thermostat-bonus": hold("entropy_bonus.coef", {}, 0.0, 1.0),
    "thermostat-kl-cov": hold("kl_cov.coef", KL_COV, 0.0, 10.0),
    "ppo": CRITIC,
    "ppo-no-groups": {**CRITIC, "num_generations": 1},
    "ppo-shared": {"critic": "shared", "critic_learning_rate": 1e-3},
    "ppo-kl-cov": {**CRITIC, "controls": [{**KL_COV, "coef": 1.0}]},
    "ppo-warmup": {**CRITIC, "critic_warmup_steps": 40},
}


def lab_run(method: str, seed: int) -> LabRun:
    """Names of methods begin with their trainer's."""
    algorithm = "ppo" if method.startswith("ppo") else "grpo"
    return LabRun(name=method, algorithm=algorithm, seed=seed, settings=METHODS[method])


EXPERIMENTS = {
    "collapse": ("grpo",),
    "covariance": ("grpo", "clip-cov", "kl-cov"),
    "thermostat": ("grpo", *(name for name in METHODS if name.startswith(("bonus", "thermostat"))), "kl-cov"),
    "critic": ("grpo", *(name for name in METHODS if name.startswith("ppo"))),
}


def conduct(name: str, seeds: Sequence[int], base: Path) -> str:
    """Make the experiment's runs that are missing, write <name>.json and <name>.png beside them; returns the table."""
    results: dict[str, list[Result]] = {}
    curves: dict[str, list[list[float]]] = {}
    for method in EXPERIMENTS[name]:
        for seed in seeds:
            path = perform(lab_run(method, seed), base)
            results.setdefault(method, []).append(result(path, UPDATES, BAND))
            curves.setdefault(method, []).append(entropy_of_rollouts(path, UPDATES))
    written = {method: as_json(found) for method, found in results.items()}
    (RUNS / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
    (RUNS / f"{name}.png").write_bytes(picture(curves, UPDATES, BAND))
    return table(results)
