"""Methods against GRPO, over the same seeds. Pure: records in, dataclasses out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from .intervals import Interval, front, interval, paired
from .methods import AT_EQUAL_COMPUTE, REFERENCE
from .questions import BySeed, at, late, shortest
from .records import CLIPPED, Record, stopped, with_stops

PASSES = ("1", "16", "64")
DEARER = 1.1  # times GRPO's seconds, from where equal samples are no longer about equal compute


@dataclass(frozen=True, slots=True)
class Compared:
    """A quantity of a method, and its paired difference to GRPO with the same seeds."""

    value: Interval
    difference: Interval


@dataclass(frozen=True, slots=True)
class Row:
    """A method over its seeds. entropy: nats, at the end.   pass_at: held out, by k.   reward: of the last 10
    rollouts.   rollouts: of a run.   cost: seconds of a rollout with its steps, median over the rollouts, over GRPO's
    with the same seed.   clipped: share of tokens beyond the clip.   touched: largest share of tokens that a control
    changed, all where it adds a term to each.
    """

    name: str
    seeds: int
    entropy: Compared
    pass_at: dict[str, Compared]
    reward: Compared
    rollouts: int
    cost: Interval
    clipped: float
    touched: float


def comparison(methods: Mapping[str, BySeed]) -> list[Row]:
    """Rows in the order of the methods, GRPO among them."""
    return [row(name, runs, methods[REFERENCE]) for name, runs in methods.items()]


def row(name: str, runs: BySeed, reference: BySeed) -> Row:
    both = runs.keys() & reference.keys()
    return Row(
        name=name,
        seeds=len(runs),
        entropy=compared(_final_entropy(runs), _final_entropy(reference)),
        pass_at={
            k: compared(_passes(runs, k), _passes(reference, k))
            for k in PASSES
            if all(k in record.pass_at for record in (*runs.values(), *reference.values()))
        },
        reward=compared(_final_reward(runs), _final_reward(reference)),
        rollouts=shortest(runs),
        cost=interval([median(runs[seed].seconds) / median(reference[seed].seconds) for seed in sorted(both)]),
        clipped=fmean(sum(record.touched.get(name, 0.0) for name in CLIPPED) for record in runs.values()),
        touched=_touched(list(runs.values())),
    )


def _touched(records: Sequence[Record]) -> float:
    shares = [x for record in records for name, x in record.touched.items() if name not in CLIPPED]
    return max(shares, default=1.0 if any(record.settings.get("controls") for record in records) else 0.0)


def compared(values: Mapping[int, float], reference: Mapping[int, float]) -> Compared:
    return Compared(interval(list(values.values())), paired(values, reference))


def at_equal_compute(methods: Mapping[str, BySeed]) -> list[Row]:
    """The methods of AT_EQUAL_COMPUTE as they were when GRPO's time was over, if held-out problems were asked then."""
    rows = []
    for name in methods.keys() & AT_EQUAL_COMPUTE.keys():
        ends = {seed: (one, len(one.made) * AT_EQUAL_COMPUTE[name] // 100) for seed, one in methods[name].items()}
        then = {seed: stopped(one, end) for seed, (one, end) in ends.items() if str(end) in one.stops}
        if then:
            rows.append(row(name, then, methods[REFERENCE]))
    return sorted(rows, key=lambda one: list(methods).index(one.name))


def at_equal_entropy(methods: Mapping[str, BySeed]) -> list[Row]:
    """Each method at its end less GRPO stopped early: with each seed where its entropy was nearest to the method's.

    rollouts: of GRPO, mean.   Empty where no held-out problems were asked of GRPO on its way, or of the methods.
    """
    plain = with_stops(methods[REFERENCE])
    rows = []
    for name, runs in methods.items():
        if name != REFERENCE and (both := runs.keys() & plain.keys()):
            early = {seed: nearest(plain[seed], at(runs[seed].entropy, 1.0)) for seed in sorted(both)}
            rollouts = round(fmean(len(one.entropy) for one in early.values()))
            rows.append(replace(row(name, runs, early), rollouts=rollouts))
    return [one for one in rows if "1" in one.pass_at]


def nearest(record: Record, entropy: float) -> Record:
    """The run stopped where its entropy was nearest to this one, or as it ended."""
    ends = [stopped(record, int(rollouts)) for rollouts in record.stops]
    return min((record, *ends), key=lambda one: abs(at(one.entropy, 1.0) - entropy))


def dearer(rows: Sequence[Row]) -> list[Row]:
    """Methods of which fewer rollouts than GRPO's fit into GRPO's time."""
    return [row for row in rows if row.cost.mean > DEARER]


def _final_entropy(runs: BySeed) -> dict[int, float]:
    return {seed: at(record.entropy, 1.0) for seed, record in runs.items()}


def _final_reward(runs: BySeed) -> dict[int, float]:
    return {seed: late(record.reward) for seed, record in runs.items()}


def _passes(runs: BySeed, k: str) -> dict[int, float]:
    return {seed: record.pass_at[k] for seed, record in runs.items()}


def pareto(rows: Sequence[Row], k: str) -> list[str]:
    """Methods that no other beats in pass@1, pass@k and entropy at once, by their means."""
    return front(
        {
            row.name: (row.pass_at["1"].value.mean, row.pass_at[k].value.mean, row.entropy.value.mean)
            for row in rows
            if {"1", k} <= row.pass_at.keys()
        }
    )
