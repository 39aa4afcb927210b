"""Says when entropy has collapsed or exploded."""

import math
from dataclasses import dataclass
from typing import Literal

from rlvr.errors import RunError


class EntropyAlarmError(RunError):
    """Entropy has stayed outside the limits of an alarm whose action is `stop`."""


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
        times, rest = divmod(abs(outside), self.patience)
        if rest or not times or times & (times - 1):
            return None
        what, limit = ("collapsed", f"below {self.low:g}") if outside < 0 else ("exploded", f"above {self.high:g}")
        return f"entropy has {what}: {entropy:.4f} nats, {limit} for {abs(outside)} steps"


def steps_outside(before: int, entropy: float, low: float, high: float) -> int:
    """Steps in a row outside [low, high], negative below it; `before` counts those up to this one."""
    side = (entropy > high) - (entropy < low)
    return side * (1 + (abs(before) if before * side > 0 else 0))
