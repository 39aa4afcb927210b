"""Hold entropy inside a band by moving one hyper-parameter of one control: the only state that entropy control has."""

import math
from dataclasses import dataclass
from typing import Literal

from rlvr.alarm import steps_outside


@dataclass(frozen=True, slots=True)
class ThermostatState:
    """What a thermostat remembers between optimizer steps.

    position: of the lever, in [0, 1]; 0 leaves least entropy, 1 most.   integral: the part of the position that has
    been accumulated.   outside: steps in a row with entropy outside the band, negative below it.
    """

    position: float
    integral: float
    outside: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thermostat:
    """Proportional-integral control of a lever that leaves more entropy the higher it stands.

    Once per optimizer step, with e = low - H below the band, high - H above it, 0 inside:

        integral <- integral + integral_gain e,  but no further than the position can go (anti-windup)
        position <- integral + gain e,  within [0, 1] and at most `rate` from where it was

    and the lever's value lies at that position between `lowest` and `highest`. Inside the band nothing moves but the
    proportional part's return. Observed in one step, the value is used from the next one on; by a control of rollout
    scope, from the next rollout on.

    lever: control and hyper-parameter, such as "kl_cov.coef", or "surrogate.high" for clip-higher; the control's class
    says which of its hyper-parameters may be moved and in which direction they act.
    low, high: the band of the mean token entropy, in nats.   lowest, highest: range of the hyper-parameter.
    gain: position per nat.   integral_gain: position per nat and step.   rate: largest move per step.
    scale: "log" for a hyper-parameter that acts by its order of magnitude.
    patience: steps in a row outside the band after which `alarm` speaks.
    Raises: ValueError for an empty band or range, gains that are negative or both zero, a rate outside (0, 1].
    """

    lever: str
    low: float
    high: float
    lowest: float
    highest: float
    gain: float = 1.0
    integral_gain: float = 0.1
    rate: float = 0.1
    scale: Literal["linear", "log"] = "linear"
    patience: int = 50

    def __post_init__(self) -> None:
        if self.lever.count(".") != 1:
            raise ValueError(f"lever={self.lever!r}: write control.hyper_parameter, such as kl_cov.coef")
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"low={self.low}, high={self.high}: need 0 <= low < high, in nats")
        if not -math.inf < self.lowest < self.highest < math.inf:
            raise ValueError(f"lowest={self.lowest}, highest={self.highest}: lowest must be below highest")
        if self.scale not in ("linear", "log"):
            raise ValueError(f"scale={self.scale!r}: must be linear or log")
        if self.scale == "log" and not self.lowest > 0:
            raise ValueError(f"lowest={self.lowest}: must be positive on a log scale")
        if not (0 <= self.gain < math.inf and 0 <= self.integral_gain < math.inf and self.gain + self.integral_gain):
            raise ValueError(f"gain={self.gain}, integral_gain={self.integral_gain}: need >= 0, and one of them > 0")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate}: must lie in (0, 1], a share of the range per step")
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience={self.patience}: must be a whole number of steps, at least 1")

    def start(self, value: float, direction: int) -> ThermostatState:
        """The state at the lever's present value.   direction: +1 if a larger value leaves more entropy, else -1.

        Raises: ValueError if the value lies outside [lowest, highest].
        """
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"{self.lever}={value} lies outside [lowest={self.lowest}, highest={self.highest}]")
        if self.scale == "log":
            share = math.log(value / self.lowest) / math.log(self.highest / self.lowest)
        else:
            share = (value - self.lowest) / (self.highest - self.lowest)
        position = share if direction > 0 else 1 - share
        return ThermostatState(position, position)

    def value(self, state: ThermostatState, direction: int) -> float:
        """The hyper-parameter at the state's position."""
        share = state.position if direction > 0 else 1 - state.position
        if self.scale == "log":
            return self.lowest * (self.highest / self.lowest) ** share
        return self.lowest + (self.highest - self.lowest) * share

    def error(self, entropy: float) -> float:
        """Nats to the nearest edge of the band, positive when entropy is too low, 0 inside."""
        return max(self.low - entropy, 0.0) + min(self.high - entropy, 0.0)

    def step(self, state: ThermostatState, entropy: float) -> ThermostatState:
        """The state after an optimizer step with this entropy. Raises: ValueError if the entropy is not a number."""
        if not math.isfinite(entropy):
            raise ValueError(f"entropy={entropy}: a thermostat needs a finite number")
        error = self.error(entropy)
        lower, upper = max(0.0, state.position - self.rate), min(1.0, state.position + self.rate)
        integral = state.integral + self.integral_gain * error
        # What would push the position past a limit is not accumulated.
        if error > 0:
            integral = min(integral, max(state.integral, upper - self.gain * error))
        elif error < 0:
            integral = max(integral, min(state.integral, lower - self.gain * error))
        wanted = integral + self.gain * error
        outside = steps_outside(state.outside, entropy, self.low, self.high)
        return ThermostatState(min(max(wanted, lower), upper), integral, outside)

    def alarm(self, state: ThermostatState, entropy: float) -> str | None:
        """A sentence once entropy has been outside the band for `patience` steps, and again after as many more."""
        if not state.outside or state.outside % self.patience:
            return None
        side, limit = ("below", state.position >= 1) if state.outside < 0 else ("above", state.position <= 0)
        where = "at the end of its range: widen it" if limit else "still moving"
        return (
            f"entropy {entropy:.3f} has been {side} the band [{self.low:g}, {self.high:g}] for {abs(state.outside)} "
            f"steps; {self.lever} is {where}"
        )
