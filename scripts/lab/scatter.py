"""What lengths do to steps, and how far a method hangs on its knob. Pure: records in, dataclasses out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .comparison import Compared, compared
from .intervals import Interval, interval, paired, roughness
from .methods import METHODS, REFERENCE
from .questions import BySeed, at, late
from .records import Record

SCATTER = {"tokens": "tokens of a step", "grad_norm": "norm of the gradient", "update_seconds": "time of an update"}


def lengths(methods: Mapping[str, BySeed]) -> dict[str, dict[str, Compared]]:
    """Scatter over the steps, relative to a moving mean, by quantity of SCATTER and by method, paired with GRPO's."""

    def scatter(runs: BySeed, what: str) -> dict[int, float]:
        return {seed: roughness(getattr(record, what)) for seed, record in runs.items()}

    reference = methods[REFERENCE]
    return {
        what: {name: compared(scatter(runs, what), scatter(reference, what)) for name, runs in methods.items()}
        for what in SCATTER
    }


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of a knob: entropy (nats) and reward at the end of its runs.   own: it is the method's own setting."""

    value: float
    own: bool
    entropy: Interval
    reward: Interval


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Settings by rising value, after `rollouts` rollouts; entropy, reward: of the largest value less the smallest's,
    paired.
    """

    settings: tuple[Setting, ...]
    rollouts: int
    entropy: Interval
    reward: Interval


def sensitivity(records: Sequence[Record]) -> dict[str, Sensitivity]:
    """By method; the own setting is read out of the comparison's runs with the same seeds, cut to the same length."""
    turned: dict[str, dict[float, dict[int, Record]]] = {}
    for record in records:
        if record.part == "knob":
            name, _, value = record.name.partition("=")
            turned.setdefault(name, {}).setdefault(float(value), {})[record.seed] = record
    return {name: _sensitivity(name, values, records) for name, values in turned.items()}


def _sensitivity(name: str, values: dict[float, dict[int, Record]], records: Sequence[Record]) -> Sensitivity:
    knob = METHODS[name].knob
    assert knob is not None
    seeds = {seed for runs in values.values() for seed in runs}
    rollouts = min(len(record.made) for runs in values.values() for record in runs.values())
    mine = {r.seed: r for r in records if r.part == "compare" and r.name == name and r.seed in seeds}
    if mine:
        values = {**values, knob.own: mine}
    ends = {
        value: (
            {seed: at(record.entropy[:rollouts], 1.0) for seed, record in runs.items()},
            {seed: late(record.reward[:rollouts]) for seed, record in runs.items()},
        )
        for value, runs in sorted(values.items())
    }
    settings = tuple(
        Setting(value, value == knob.own, *(interval(list(one.values())) for one in end))
        for value, end in ends.items()
    )
    lowest, *_, highest = ends.values()
    return Sensitivity(settings, rollouts, *(paired(high, low) for high, low in zip(highest, lowest, strict=True)))
