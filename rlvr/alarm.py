"""Alerts, and the alarms that give them: of entropy that has left its limits, of an engine that is not the trainer."""

import math
from dataclasses import dataclass
from typing import Literal

from rlvr.errors import RunError


class EntropyAlarmError(RunError):
    """Entropy has stayed outside the limits of an alarm whose action is `stop`."""


KINDS = ("collapse", "explosion", "mismatch", "stall", "thermostat", "skipped", "reward", "other")


@dataclass(frozen=True, slots=True)
class Alert:
    """What a person should know of an optimizer step.

    kind: one of KINDS.   message: a sentence.   Raises: ValueError for another kind.
    """

    kind: str
    message: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyAlarm:
    """Speaks once entropy has been outside its limits for `patience` optimizer steps in a row.

    low, high: limits of the mean token entropy, nats. Below the default low a policy picks its tokens with
        probabilities around .999: it has stopped exploring.
    action: "warn"; "stop", before the weights move again; "thermostat", until then the run's thermostat waits.
    Raises: ValueError for limits that do not bound anything, an unknown action, a patience below 1.
    """

    low: float = 0.01
    high: float = math.inf
    patience: int = 10
    action: Literal["warn", "stop", "thermostat"] = "warn"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: need 0 <= low < high, in nats")
        if self.action not in ("warn", "stop", "thermostat"):
            raise ValueError(f"action={self.action!r}: must be warn, stop or thermostat")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience={self.patience}: must be a whole number of steps, at least 1")

    def message(self, outside: int, entropy: float) -> str | None:
        """A sentence after `patience` steps outside, and again after twice, four times, ... as many.

        outside: of `steps_outside`, this step included.
        """
        if not _due(abs(outside), self.patience):
            return None
        what, limit = ("collapsed", f"below {self.low:g}") if outside < 0 else ("exploded", f"above {self.high:g}")
        return f"entropy has {what}: {entropy:.4f} nats, {limit} for {abs(outside)} steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchAlarm:
    """Speaks once engine and trainer have been too far apart for `patience` optimizer steps in a row.

    limit: of the KL from engine to trainer, nats; infinite: never.   Raises: ValueError.
    """

    limit: float = 0.01
    patience: int = 5

    def __post_init__(self) -> None:
        if not self.limit > 0 or self.patience < 1:
            raise ValueError(f"limit={self.limit}, patience={self.patience}: need limit > 0 nats, patience >= 1 step")

    def message(self, above: int, kl: float) -> str | None:
        """A sentence after `patience` steps above the limit, and again after twice, four times, ... as many.

        above: steps in a row, this one included.
        """
        if not _due(above, self.patience):
            return None
        return (
            f"engine and trainer drift apart: KL {kl:.4g} nats, above {self.limit:g} for {above} steps; "
            "correct for it (controls tis, icepop, mis) or let both compute in one dtype"
        )


def infinite_rewards(steps: int, count: int) -> str | None:
    """A sentence about infinite rewards in the first step that has any, and in the second, fourth, ... such step.

    steps: with infinite rewards so far, this one included.   count: infinite rewards of this one.
    """
    if not _due(steps, 1):
        return None
    before = f"; so it was in {steps} steps so far" if steps > 1 else ""
    return f"{count} rewards of a step are infinite: such completions count as not scored{before}"


def _due(steps: int, patience: int) -> bool:
    """Whether what has lasted so many steps is to be said: after `patience`, and twice, four times, ... as many."""
    times, rest = divmod(steps, patience)
    return not rest and times > 0 and not times & (times - 1)


def steps_outside(before: int, value: float, low: float, high: float) -> int:
    """Steps in a row outside [low, high], negative below it; `before` counts those up to this one."""
    side = (value > high) - (value < low)
    return side * (1 + (abs(before) if before * side > 0 else 0))
