"""Methods against GRPO, over the same seeds. Pure: records in, dataclasses out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .intervals import Interval, front, interval, paired
from .questions import REFERENCE, BySeed, at, late, shortest

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
    with the same seed.   touched: largest share of tokens whose gradient the clip or a control changed.
    """

    name: str
    seeds: int
    entropy: Compared
    pass_at: dict[str, Compared]
    reward: Compared
    rollouts: int
    cost: Interval
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
        touched=max((x for record in runs.values() for x in record.touched.values()), default=0.0),
    )


def compared(values: Mapping[int, float], reference: Mapping[int, float]) -> Compared:
    return Compared(interval(list(values.values())), paired(values, reference))


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
