"""What the records answer, as numbers with intervals over seeds. Pure: records in, dataclasses out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from rlvr.law import MIN_POINTS, fit_law

from .intervals import Interval, correlation, front, interval, paired
from .records import AGREEMENTS, Record

REFERENCE = "grpo"
SHARES = (0.10, 0.25, 0.50, 1.0)
WINDOW = 5  # rollouts that are averaged: which problems a rollout draws moves its reward by about .05
LATE = 10  # rollouts at the end, whose mean is the reward of a run
EARLY = (0.15, 0.35)  # of the rollouts, from which the final reward is predicted
PASSES = ("1", "16", "64")
SPENT_AT = (1 / 12, 0.25, 1 / 3, 0.5)  # of the run; the first and the third are the paper's 200 and 800 of 2400 steps

BySeed = Mapping[int, Record]


def select(records: Sequence[Record], part: str) -> dict[str, dict[int, Record]]:
    """The part's records by name and seed, in the order in which they come."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.part == part:
            found.setdefault(record.name, {})[record.seed] = record
    return found


def late(values: Sequence[float]) -> float:
    return fmean(values[-LATE:])


def at(values: Sequence[float], share: float) -> float:
    """Mean of the last 5 values of the first `share` of them."""
    end = max(round(share * len(values)), 1)
    return fmean(values[max(0, end - WINDOW) : end])


def window_means(values: Sequence[float]) -> list[float]:
    return [fmean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]


# ------------------------------------------------------------------------------------------------------- collapse


@dataclass(frozen=True, slots=True)
class Collapse:
    """Nats. start: first rollout.   at: by share of the run.   first_quarter: share of the whole drop."""

    start: Interval
    at: dict[float, Interval]
    first_quarter: Interval


def collapse(runs: BySeed) -> Collapse:
    entropy = [record.entropy for record in runs.values()]
    drops = [(h[0] - at(h, 0.25), h[0] - at(h, 1.0)) for h in entropy]
    quarters = [early / whole if whole else math.nan for early, whole in drops]
    return Collapse(
        start=interval([h[0] for h in entropy]),
        at={share: interval([at(h, share) for h in entropy]) for share in SHARES},
        first_quarter=interval(quarters),
    )


# ------------------------------------------------------------------------------------------------------------ law


@dataclass(frozen=True, slots=True)
class Foresight:
    """Of fits to the first `share` of the rollouts: predicted less measured mean reward of the last 10 rollouts.

    law, line: of R = -a exp(H) + b and of a line in H, each at the entropy that those rollouts had.   ceiling: b - a,
    at H = 0, less that reward.   last: what the first part's last 10 rollouts earned, as prediction.   size: mean
    |law|.   covered: share of the seeds whose reward lies in the law's 95 % interval.
    """

    share: float
    law: Interval
    line: Interval
    ceiling: Interval
    last: Interval
    size: Interval
    covered: float


@dataclass(frozen=True, slots=True)
class Law:
    """r2, r2_linear: of the law and of a line in H, both fitted to means over 5 rollouts.   a, b: in units of reward.
    foresight: empty where runs are too short.
    """

    r2: Interval
    r2_linear: Interval
    a: Interval
    b: Interval
    foresight: tuple[Foresight, ...] = ()


def law(runs: BySeed) -> Law:
    fits = [fit_law(window_means(r.made), window_means(r.reward)) for r in runs.values()]
    return Law(
        r2=interval([fit.r2 for fit in fits]),
        r2_linear=interval([fit.r2_linear for fit in fits]),
        a=interval([fit.a for fit in fits]),
        b=interval([fit.b for fit in fits]),
        foresight=tuple(foresight(runs, share) for share in EARLY if round(shortest(runs) * share) >= MIN_POINTS),
    )


def shortest(runs: BySeed) -> int:
    return min((len(record.made) for record in runs.values()), default=0)


def foresight(runs: BySeed, share: float) -> Foresight:
    errors: dict[str, list[float]] = {"law": [], "line": [], "ceiling": [], "last": []}
    inside = []
    for record in runs.values():
        seen = round(share * len(record.made))
        entropy, reward = record.made[:seen], record.reward[:seen]
        final_entropy, final = late(record.made), late(record.reward)
        fit = fit_law(entropy, reward)
        slope, level = np.polyfit(entropy, reward, 1)
        errors["law"].append(fit.b - fit.a * math.exp(final_entropy) - final)
        errors["line"].append(float(level + slope * final_entropy) - final)
        errors["ceiling"].append(fit.ceiling - final)
        errors["last"].append(late(reward) - final)
        low, high = fit.interval(final_entropy)
        inside.append(low <= final <= high)
    found = {name: interval(values) for name, values in errors.items()}
    return Foresight(share, **found, size=interval([abs(e) for e in errors["law"]]), covered=float(np.mean(inside)))


# ------------------------------------------------------------------------------------------------------- spending


@dataclass(frozen=True, slots=True)
class Spending:
    """Of the whole drop of entropy and the whole gain in reward, the shares behind at a share of the run.

    at: by share of the run, (entropy, reward).   curve: (entropy, reward) shares by windows of 5 rollouts, means over
    seeds.
    """

    at: dict[float, tuple[Interval, Interval]]
    curve: tuple[tuple[float, float], ...]


def spending(runs: BySeed) -> Spending:
    length = shortest(runs)
    pairs = [(_shares(record.made[:length]), _shares(record.reward[:length])) for record in runs.values()]

    def reached(share: float, side: int) -> Interval:
        return interval([pair[side][max(round(share * len(pair[side])) - 1, 0)] for pair in pairs])

    curve = np.mean([np.stack(pair, axis=1) for pair in pairs], axis=0)
    return Spending(
        {share: (reached(share, 0), reached(share, 1)) for share in SPENT_AT},
        tuple((float(h), float(r)) for h, r in curve),
    )


def _shares(values: Sequence[float]) -> list[float]:
    """(value - first) / (last - first) of means over 5 rollouts; NaN if the first and the last are the same."""
    means = window_means(values)
    whole = means[-1] - means[0]
    return [(value - means[0]) / whole if whole else math.nan for value in means]


# ----------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True, slots=True)
class Compared:
    """A quantity of a method, and its paired difference to GRPO with the same seeds."""

    value: Interval
    difference: Interval


@dataclass(frozen=True, slots=True)
class Row:
    """A method over its seeds. entropy: nats, at the end.   pass_at: held out, by k.   reward: of the last 10
    rollouts.   equal_compute: the same after as many rollouts as fit into the time of the fastest method, `affordable`
    of them.   seconds: of a rollout with its steps, median over rollouts.   touched: largest share of tokens that clip
    or control changed.
    """

    name: str
    seeds: int
    entropy: Compared
    pass_at: dict[str, Compared]
    reward: Compared
    equal_compute: Compared
    affordable: int
    seconds: Interval
    touched: float


def comparison(methods: Mapping[str, BySeed]) -> list[Row]:
    """Rows in the order of the methods, GRPO among them."""
    cost = {name: median([x for record in runs.values() for x in record.seconds]) for name, runs in methods.items()}
    cheapest = min(cost.values())
    reference = methods[REFERENCE]

    def affordable(name: str) -> int:
        return max(int(shortest(methods[name]) * cheapest / cost[name] + 1e-9), 1)

    equal = {
        name: {seed: late(record.reward[: affordable(name)]) for seed, record in runs.items()}
        for name, runs in methods.items()
    }
    rows = []
    for name, runs in methods.items():
        rows.append(
            Row(
                name=name,
                seeds=len(runs),
                entropy=compared(_final_entropy(runs), _final_entropy(reference)),
                pass_at={
                    k: compared(_passes(runs, k), _passes(reference, k))
                    for k in PASSES
                    if all(k in record.pass_at for record in runs.values())
                },
                reward=compared(
                    {seed: late(record.reward) for seed, record in runs.items()},
                    {seed: late(record.reward) for seed, record in reference.items()},
                ),
                equal_compute=compared(equal[name], equal[REFERENCE]),
                affordable=affordable(name),
                seconds=interval([median(record.seconds) for record in runs.values()]),
                touched=max((x for record in runs.values() for x in record.touched.values()), default=0.0),
            )
        )
    return rows


def compared(values: Mapping[int, float], reference: Mapping[int, float]) -> Compared:
    return Compared(interval(list(values.values())), paired(values, reference))


def _final_entropy(runs: BySeed) -> dict[int, float]:
    return {seed: at(record.entropy, 1.0) for seed, record in runs.items()}


def _passes(runs: BySeed, k: str) -> dict[int, float]:
    return {seed: record.pass_at[k] for seed, record in runs.items() if k in record.pass_at}


def pareto(rows: Sequence[Row], k: str = "16") -> list[str]:
    """Methods that no other beats in pass@1, pass@k and entropy at once, by their means."""
    return front(
        {
            row.name: (row.pass_at["1"].value.mean, row.pass_at[k].value.mean, row.entropy.value.mean)
            for row in rows
            if {"1", k} <= row.pass_at.keys()
        }
    )


# ----------------------------------------------------------------------------------------------------- estimators


@dataclass(frozen=True, slots=True)
class Estimator:
    """How a prediction agrees with the measured entropy change. tokens: within a step, mean (slope: median) over the
    steps of a run, by kind of AGREEMENTS.   steps: of the means of a step, over the steps of a run, likewise.
    """

    name: str
    tokens: dict[str, Interval]
    steps: dict[str, Interval]


def estimators(runs: BySeed) -> list[Estimator]:
    """Best correlation over tokens first; of runs whose steps were watched."""
    watched = [record for record in runs.values() if record.measured]
    found = []
    for name in watched[0].agreement if watched else ():
        within = {
            kind: interval(
                [(median if kind == "slope" else fmean)(record.agreement[name][kind]) for record in watched]
            )
            for kind in AGREEMENTS
        }
        across = [_line(record.predicted[name], record.measured) for record in watched]
        found.append(Estimator(name, within, {kind: interval([line[kind] for line in across]) for kind in AGREEMENTS}))
    return sorted(found, key=lambda one: -one.tokens["correlation"].mean)


def _line(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    r = correlation(predicted, measured)
    spread = float(np.std(predicted))
    return {"correlation": r, "r2": r * r, "slope": r * float(np.std(measured)) / spread if spread else math.nan}
