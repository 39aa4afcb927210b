"""What a run leaves for the page: plain numbers, read out of its records once, kept as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rlvr.monitor.metrics import TOUCHED
from rlvr.monitor.records import read_evals, read_run, read_steps, rollout_points, series
from rlvr.theory import ESTIMATORS

from .methods import ALL
from .runs import HELD_OUT_PROMPTS, LabRun

METHOD_FIELDS = ("surrogate", "controls", "thermostat")  # of a recipe
CLIPPED = ("clip/low", "clip/high")
AGREEMENTS = ("correlation", "r2", "slope")
CLASSES = ("rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely")  # of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """name, part, algorithm, seed, settings, numbers: of the run (`LabRun`).

    Of each rollout: entropy, nats, mean over its optimizer steps; made, nats, of the policy that made it; reward, mean
    of its completions; seconds, time/step of its steps.   Of each step: grad_norm, before clipping; update_seconds;
    tokens, those of sequences without a gradient included.   pass_at: by k, held out, after training, on `prompts`
    problems.   stops: the same after fewer rollouts, by their number; 0: before training.   touched: share of the
    tokens that the clip or the control changed or left out, by metric, mean over the steps.   Of each watched step:
    measured, mean entropy change of its tokens, nats; predicted, the same by each estimator, of an SGD step;
    agreement: over the step's tokens, by estimator and then by kind of AGREEMENTS; by_class: what the tokens of each
    of CLASSES add to measured.
    """

    name: str
    part: str
    algorithm: str
    seed: int
    settings: Mapping[str, Any]
    numbers: tuple[int, ...]
    entropy: tuple[float, ...]
    made: tuple[float, ...]
    reward: tuple[float, ...]
    seconds: tuple[float, ...]
    grad_norm: tuple[float, ...] = ()
    update_seconds: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    pass_at: Mapping[str, float]
    prompts: int = HELD_OUT_PROMPTS
    stops: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    touched: Mapping[str, float]
    measured: tuple[float, ...] = ()
    predicted: Mapping[str, Sequence[float]]
    agreement: Mapping[str, Mapping[str, Sequence[float]]]
    by_class: Mapping[str, Sequence[float]] = field(default_factory=dict)


def read_record(run: LabRun) -> Record:
    """Read out a run of the laboratory."""
    return record_of(run, run.path, run.samples and HELD_OUT_PROMPTS)


def read_others(folder: Path) -> list[Record]:
    """Finished runs of recipes in directories METHOD-seedN, such as those of docs/lab.md, as the comparison's."""
    found = []
    for path in sorted(folder.glob("*-seed*")):
        name, _, seed = path.name.rpartition("-seed")
        evals = read_evals(path)
        if name in ALL and seed.isdecimal() and read_run(path).get("status") == "finished" and evals:
            config = read_run(path)["config"]
            settings = {field: config[field] for field in METHOD_FIELDS if config.get(field)}
            run = LabRun(name=name, algorithm=ALL[name].algorithm, seed=int(seed), settings=settings)
            found.append(record_of(run, path, evals[-1].get("prompts", 0)))
    return sorted(found, key=lambda record: list(ALL).index(record.name))


def record_of(run: LabRun, path: Path, prompts: int) -> Record:
    """What lies in the directory, as the record of this run."""
    steps = read_steps(path)
    points = rollout_points(steps)
    evals = read_evals(path)
    updates = round(len(steps) / max(len(points), 1))

    def of(name: str) -> tuple[float, ...]:
        return tuple(series(steps, name)[1])

    # A step whose learning rate is 0 moves nothing: it has a measurement and no agreement.
    moved = [step for step in steps if "dynamics/discriminator_correlation" in step["metrics"]]
    return Record(
        name=run.name,
        part=run.part,
        algorithm=run.algorithm,
        seed=run.seed,
        settings=run.settings,
        numbers=run.numbers,
        entropy=means(of("entropy/mean"), updates),
        made=tuple(entropy for entropy, _ in points),
        reward=tuple(reward for _, reward in points),
        seconds=tuple(x * updates for x in means(of("time/step"), updates)),
        grad_norm=of("optim/grad_norm"),
        update_seconds=of("time/update"),
        tokens=of("policy/tokens"),
        pass_at=_passes(evals[-1]) if evals else {},
        prompts=prompts,
        stops={str(round(one["step"] / updates)): _passes(one) for one in evals[:-1]},
        touched=_touched(of),
        measured=tuple(series(moved, "dynamics/measured")[1]),
        predicted={name: series(moved, f"dynamics/{name}_mean")[1] for name in ESTIMATORS} if moved else {},
        agreement={
            name: {kind: series(moved, f"dynamics/{name}_{kind}")[1] for kind in AGREEMENTS} for name in ESTIMATORS
        }
        if moved
        else {},
        by_class={name: series(moved, f"dynamics/measured_{name}")[1] for name in CLASSES} if moved else {},
    )


def _touched(of: Callable[[str], Sequence[float]]) -> dict[str, float]:
    found = {name: fmean(values) for name in TOUCHED if (values := of(name))}
    if kept := of("token_budget/kept"):
        found["token_budget/left_out"] = 1 - fmean(kept)
    return found


def _passes(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """pass@k by k."""
    prefix = "heldout/pass_at_"
    return {k.removeprefix(prefix): x for k, x in evaluation["metrics"].items() if k.startswith(prefix)}


def stopped(record: Record, rollouts: int) -> Record:
    """The run as it was after so many of its rollouts, one of its `stops`; after 0, with the first one's numbers."""
    seen = max(rollouts, 1)
    return replace(
        record,
        entropy=record.entropy[:seen],
        made=record.made[:seen],
        reward=record.reward[:seen],
        seconds=record.seconds[:seen],
        pass_at=record.stops[str(rollouts)],
        stops={},
    )


def with_stops(runs: Mapping[int, Record]) -> dict[int, Record]:
    """Runs whose held-out problems were asked on their way, each with the stops that all have."""
    asked = [set(one.stops) for one in runs.values() if one.stops]
    common = sorted(set.intersection(*asked), key=int) if asked else []
    return {
        seed: replace(one, stops={count: one.stops[count] for count in common})
        for seed, one in runs.items()
        if one.stops and common
    }


def means(values: Sequence[float], size: int) -> tuple[float, ...]:
    """Of `size` values each, one after the other; the last of what is left."""
    return tuple(fmean(values[start : start + size]) for start in range(0, len(values), size))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a page is made of. about: facts of the suite, by name.   missing: runs that failed, a line each."""

    records: Sequence[Record]
    about: Mapping[str, str]
    missing: Sequence[str] = ()


def write_kept(kept: Kept, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(kept)) + "\n")


def load_kept(path: Path) -> Kept:
    """What `write_kept` wrote."""
    tuples = {f.name for f in fields(Record) if str(f.type).startswith("tuple")}
    held = json.loads(path.read_text())
    records = [Record(**{k: tuple(v) if k in tuples else v for k, v in row.items()}) for row in held["records"]]
    return Kept(records, held["about"], held["missing"])
