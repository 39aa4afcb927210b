"""What a run says by itself, and to whom: fields of every configuration of a policy."""

import copy
import math
import os
from dataclasses import dataclass, field
from typing import Any, Self

from rlvr.alarm import MismatchAlarm
from rlvr.errors import ConfigError
from rlvr.monitor.webhook import check_webhook

WEBHOOK = "RLVR_ALERT_WEBHOOK"  # environment variable
HIDDEN = "<ALERT_WEBHOOK>"  # as transformers hides tokens


@dataclass
class AlertFields:
    """A mix-in of PolicyConfig, which calls `check_alerts`. The webhook's address is a secret: it is in no text and no
    pickle of the configuration. A help that formats its default to nothing does not show it.
    """

    mismatch_alarm: float | None = field(
        default=0.01,
        metadata={
            "help": "An alert when the KL from engine to trainer (mismatch/kl) is above this for 5 steps in a row, in "
            "nats; 0: never."
        },
    )
    stall_alarm: float | None = field(
        default=600.0,
        metadata={
            "help": "An alert when no optimizer step is completed for so many seconds, or for 10 times the usual time "
            "of a step where that is longer; 0: never."
        },
    )
    alert_webhook: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "An http or https address to which alerts, and the failure of a run, are sent as JSON that Slack "
            "and Discord show. Default: the environment variable RLVR_ALERT_WEBHOOK, if it is set.%(default).0s"
        },
    )

    def check_alerts(self) -> None:
        """Raises: ConfigError."""
        for name, unit in (("mismatch_alarm", "nats"), ("stall_alarm", "seconds")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value < math.inf):
                raise ConfigError(f"{name}={value!r}: must be a number of {unit}, or 0 for no such alert")
        if self.alert_webhook is not None:
            check_webhook(self.alert_webhook)
        elif os.environ.get(WEBHOOK):
            self.alert_webhook = os.environ[WEBHOOK]
            check_webhook(self.alert_webhook, WEBHOOK)

    @property
    def mismatch_limit(self) -> MismatchAlarm:
        """What `mismatch_alarm` says."""
        return MismatchAlarm(limit=self.mismatch_alarm or math.inf)

    @property
    def stall_seconds(self) -> float:
        """What `stall_alarm` says; infinite: never."""
        return self.stall_alarm or math.inf

    def to_dict(self) -> dict[str, Any]:
        """transformers' own, which run records and trackers read."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return found | ({"alert_webhook": HIDDEN} if self.alert_webhook else {})

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(self.alert_webhook, HIDDEN) if self.alert_webhook else text

    def __getstate__(self) -> dict[str, Any]:
        """Of training_args.bin, which goes wherever the weights go."""
        return {**self.__dict__, "alert_webhook": None}

    def __copy__(self) -> Self:
        """With the webhook, which `__getstate__` takes away."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = other = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other
