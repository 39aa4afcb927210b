"""What lengths do to steps, and how far a method hangs on its knob. Pure: records in, dataclasses out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .comparison import Compared, compared
from .intervals import Interval, interval, roughness
from .methods import METHODS
from .questions import REFERENCE, BySeed, at, late
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
    """A value of a knob: entropy (nats) and reward after `rollouts` rollouts; own: it is the method's own setting."""

    value: float
    own: bool
    rollouts: int
    entropy: Interval
    reward: Interval
    low_entropy: float
    high_entropy: float


def sensitivity(records: Sequence[Record]) -> dict[str, list[Setting]]:
    """By method; the own setting is read out of the comparison's runs with the same seeds, cut to the same length."""
    turned: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        if record.part == "knob":
            name, _, value = record.name.partition("=")
            turned.setdefault(name, {}).setdefault(float(value), []).append(record)
    found = {}
    for name, values in turned.items():
        seeds = {record.seed for runs in values.values() for record in runs}
        rollouts = min(len(record.made) for runs in values.values() for record in runs)
        knob = METHODS[name].knob
        assert knob is not None
        mine = [r for r in records if r.part == "compare" and r.name == name and r.seed in seeds]
        settings = [_setting(value, runs, rollouts, False) for value, runs in values.items()]
        if mine:
            settings.append(_setting(knob.own, mine, rollouts, True))
        found[name] = sorted(settings, key=lambda one: one.value)
    return found


def _setting(value: float, runs: Sequence[Record], rollouts: int, own: bool) -> Setting:
    entropy = [at(record.entropy[:rollouts], 1.0) for record in runs]
    reward = interval([late(record.reward[:rollouts]) for record in runs])
    return Setting(value, own, rollouts, interval(entropy), reward, min(entropy), max(entropy))
