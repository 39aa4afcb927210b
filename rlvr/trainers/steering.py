"""The controls, surrogate and thermostat of a run as they stand now: what may change from step to step lives here."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rlvr.alarm import Alert, EntropyAlarm, EntropyAlarmError, MismatchAlarm, infinite_rewards, steps_outside
from rlvr.controls import Control, decide
from rlvr.controls.base import Outcome, Scope
from rlvr.errors import ConfigError, unknown
from rlvr.surrogates import Clipped, Surrogate
from rlvr.thermostat import Thermostat, ThermostatState
from rlvr.types import Coefficients, Metrics, Reduce, Tokens


@dataclass(frozen=True, slots=True)
class Lever:
    """A hyper-parameter that a thermostat moves: of the control `owner`, or of the surrogate."""

    owner: str
    field: str
    value: float
    direction: int
    moved: Any  # the control or surrogate


class Steering:
    """Holds the frozen controls, and replaces them by their successors after each optimizer step."""

    def __init__(
        self,
        controls: tuple[Control, ...],
        surrogate: Surrogate,
        thermostat: Thermostat | None = None,
        alarm: EntropyAlarm | None = None,
        mismatch_alarm: MismatchAlarm | None = None,
    ) -> None:
        self.controls = {control.name: control for control in controls}
        self.surrogate = surrogate
        self.thermostat = thermostat
        self.alarm, self.mismatch_alarm = alarm or EntropyAlarm(), mismatch_alarm or MismatchAlarm()
        self._outside = 0  # steps in a row beyond the alarm's limits
        self._apart = 0  # steps in a row with engine and trainer beyond the other alarm's
        self._infinite = 0  # steps with infinite rewards
        self._engaged = self.alarm.action != "thermostat"
        self.alerts: list[Alert] = []  # what a person should know of the step observed last
        self._started: dict[str, Control] = dict(self.controls)
        self._state: ThermostatState | None = None
        if thermostat is not None:
            lever = find_lever(thermostat, controls, surrogate)
            self._state = thermostat.start(lever.value, lever.direction)

    def scoped(self, scope: Scope) -> list[Control]:
        return [control for control in self.controls.values() if control.scope == scope]

    def needs(self, scope: Scope) -> set[str]:
        """Optional fields of Tokens that the controls of a scope read."""
        return {name for control in self.scoped(scope) for name in control.needs}

    def decide(self, scope: Scope, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> dict[str, Outcome]:
        """What each control of a scope decides, by its name."""
        return decide(self.scoped(scope), tokens, clipped, reduce)

    @property
    def observes(self) -> bool:
        """Whether something steers by the entropy of each step."""
        return self.thermostat is not None or any(
            type(control).observe is not Control.observe for control in self.controls.values()
        )

    def observe(self, entropy: float, mismatch: float = math.nan, infinite: int = 0) -> dict[str, float]:
        """Take in a finished step, over all ranks; returns what alarm and thermostat have to tell.

        entropy: its mean.   mismatch: KL from engine to trainer, nats. Either is NaN where it was not measured.
        infinite: rewards of the step that are infinite.
        Raises: EntropyAlarmError, of which `alerts` tells, too.
        """
        self.alerts = []
        self._infinite += infinite > 0
        if infinite and (said := infinite_rewards(self._infinite, infinite)):
            self.alerts.append(Alert("reward", said))
        self._watch_engine(mismatch)
        if not math.isfinite(entropy):
            return {}
        told = self._alarm(entropy)
        self.controls = {name: control.observe(entropy) for name, control in self.controls.items()}
        if self.thermostat is None or self._state is None or not self._engaged:
            return told
        self._state = self.thermostat.step(self._state, entropy)
        alarm = self.thermostat.alarm(self._state, entropy)
        if alarm:
            self.alerts.append(Alert("thermostat", alarm))
        return told | {
            "thermostat/value": self._move(self._state),
            "thermostat/position": self._state.position,
            "thermostat/outside": float(self._state.outside),
        }

    def _alarm(self, entropy: float) -> dict[str, float]:
        self._outside = steps_outside(self._outside, entropy, self.alarm.low, self.alarm.high)
        message = self.alarm.message(self._outside, entropy)
        if message is not None:
            begins = "; the thermostat begins to act" if not self._engaged else ""
            self.alerts.append(Alert("collapse" if self._outside < 0 else "explosion", message + begins))
            self._engaged = True
        if message is not None and self.alarm.action == "stop":
            raise EntropyAlarmError(f"{message}: entropy_alarm stops the run; start from an earlier checkpoint")
        return {"entropy/outside": float(self._outside)}

    def _watch_engine(self, mismatch: float) -> None:
        if math.isnan(mismatch):
            return
        self._apart = steps_outside(self._apart, mismatch, -math.inf, self.mismatch_alarm.limit)
        if message := self.mismatch_alarm.message(self._apart, mismatch):
            self.alerts.append(Alert("mismatch", message))

    def _move(self, state: ThermostatState) -> float:
        assert self.thermostat is not None
        lever = self._lever()
        value = self.thermostat.value(state, lever.direction)
        moved = replace(lever.moved, **{lever.field: value})
        if lever.owner == "surrogate":
            self.surrogate = moved
        else:
            self.controls[lever.owner] = moved
        return value

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the run has changed since it started, as plain JSON: by itself, or by the thermostat."""
        lever = "" if self.thermostat is None else self.thermostat.lever
        moved = {
            name: {f.name: x for f in fields(control) if (x := getattr(control, f.name)) != getattr(before, f.name)}  # type: ignore[arg-type]
            for name, control in self.controls.items()
            if control != (before := self._started[name]) and not lever.startswith(f"{name}.")
        }
        thermostat = None
        if self.thermostat is not None and self._state is not None:
            thermostat = {"settings": self._range(), "value": self._lever().value, "state": asdict(self._state)}
        set_off = self._engaged and self.alarm.action == "thermostat"
        alarm = {"outside": self._outside, "set_off": set_off, "apart": self._apart, "infinite": self._infinite}
        return {"controls": moved, "thermostat": thermostat, "alarm": alarm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. A control or thermostat that was not there, or moved another lever, starts afresh;
        with another range the lever goes on from its value, as far as the range allows.

        Raises: ConfigError if a control's new settings do not admit the value that it had reached.
        """
        alarm = state.get("alarm", {})
        self._outside, self._apart = alarm.get("outside", 0), alarm.get("apart", 0)
        self._infinite = alarm.get("infinite", 0)
        self._engaged = self._engaged or alarm.get("set_off", False)
        for name, changes in state.get("controls", {}).items():
            if name in self.controls:
                control: Any = self.controls[name]
                try:
                    self.controls[name] = replace(control, **changes)
                except ValueError as error:
                    raise ConfigError(f"controls {name} cannot go on from its checkpoint: {error}") from error
        saved = state.get("thermostat")
        lever = saved["settings"]["lever"] if saved else None
        if lever is not None and (self.thermostat is None or self.thermostat.lever != lever):
            warnings.warn(
                f"the checkpoint's thermostat moved {lever}, which starts afresh: nothing moves it now", stacklevel=2
            )
        if self.thermostat is None or not saved:
            return
        if saved["settings"] == self._range():
            self._state = ThermostatState(**saved["state"])
        elif saved["settings"]["lever"] == self.thermostat.lever:
            value = min(max(saved["value"], self.thermostat.lowest), self.thermostat.highest)
            self._state = self.thermostat.start(value, self._lever().direction)
        else:
            return
        self._move(self._state)

    def _range(self) -> dict[str, Any]:
        one = self.thermostat
        assert one is not None
        return {"lever": one.lever, "lowest": one.lowest, "highest": one.highest, "scale": one.scale}

    def _lever(self) -> Lever:
        assert self.thermostat is not None
        return find_lever(self.thermostat, tuple(self.controls.values()), self.surrogate)


def coefficients_of(outcomes: Mapping[str, Outcome]) -> dict[str, Coefficients]:
    return {name: outcome.coefficients for name, outcome in outcomes.items()}


def metrics_of(outcomes: Mapping[str, Outcome]) -> Metrics:
    return {key: mean for outcome in outcomes.values() for key, mean in outcome.metrics.items()}


def combined(by_control: Mapping[str, Coefficients], without: str | None = None) -> Coefficients:
    """All coefficients at once, but for those of one control."""
    result = Coefficients()
    for name, coefficients in by_control.items():
        if name != without:
            result = result.combine(coefficients)
    return result


def find_lever(thermostat: Thermostat, controls: tuple[Control, ...], surrogate: Surrogate) -> Lever:
    """What `thermostat.lever` names. Raises: ConfigError if the run has no such control or may not move it."""
    owner, _, field = thermostat.lever.partition(".")
    owners: dict[str, Any] = {**{control.name: control for control in controls}, "surrogate": surrogate}
    movable = {f"{name}.{f}" for name, one in owners.items() for f in getattr(one, "levers", {})}
    if not movable:
        raise ConfigError(f"thermostat lever={thermostat.lever!r}: the run has nothing to move; list a control")
    if thermostat.lever not in movable:
        raise unknown("thermostat lever", thermostat.lever, movable)
    value = getattr(owners[owner], field)
    if value is None or isinstance(value, bool):
        raise ConfigError(f"thermostat lever={thermostat.lever} has no value to start from: set it")
    return Lever(owner, field, float(value), owners[owner].levers[field], owners[owner])
