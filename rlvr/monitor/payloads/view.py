"""What is known of a run at a moment: what the payloads are made of."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvr.monitor.status import Status
from rlvr.monitor.table import Table


@dataclass(frozen=True, slots=True)
class View:
    """id: how a page names the run.   name: how a person does.   run: of run.json.   table: of steps.jsonl.
    num_steps: records in steps.jsonl, also of those that `table` does not hold yet.   read: share of it that was read.
    token_steps: steps with a sample of rollouts.   version: another one whenever anything of this is.
    """

    id: str
    name: str
    run_dir: Path
    run: Mapping[str, Any]
    table: Table
    status: Status
    num_steps: int = 0
    read: float = 1.0
    evals: Sequence[dict[str, Any]] = ()
    token_steps: Sequence[int] = ()
    version: str = ""

    @property
    def started(self) -> float | None:
        """Unix seconds; of a run without run.json those of its first record."""
        if isinstance(self.run.get("started"), (int, float)):
            return float(self.run["started"])
        return float(self.table.time[0]) if self.table.count and math.isfinite(self.table.time[0]) else None


def without_nulls(run: Any) -> Any:
    """run.json without the entries that are null, and those of its resumptions: such an entry says nothing."""
    if not isinstance(run, dict):
        return run
    known = {name: value for name, value in run.items() if value is not None}
    if isinstance(known.get("resumed"), list):
        entries = [entry for entry in known["resumed"] if entry is not None]
        known["resumed"] = [
            {name: value for name, value in e.items() if value is not None} if isinstance(e, dict) else e
            for e in entries
        ]
    return known


def settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, with what the last resumption changed."""
    changed = [entry.get("changed_config", {}) for entry in run.get("resumed", ())[-1:]]
    return {**run.get("config", {}), **(changed[0] if changed else {})}


def parsed(value: Any) -> Any:
    """A setting that may be written as JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def control_names(config: Mapping[str, Any]) -> list[str]:
    """The entropy controls of a run."""
    return list(_names(parsed(config.get("controls")) or ()))


def _names(specs: Any) -> Iterator[str]:
    for spec in [specs] if isinstance(specs, (str, Mapping)) else specs:
        one = parsed(spec)
        name = one.get("name") if isinstance(one, Mapping) else one
        if name:
            yield str(name)


def last_time(table: Table, evals: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the last step or evaluation, Unix seconds."""
    times = [float(entry["time"]) for entry in evals[-1:] if isinstance(entry.get("time"), (int, float))]
    times += table.time[-1:].tolist()
    return max((time for time in times if math.isfinite(time)), default=None)


def usual_step_seconds(table: Table, window: int = 200) -> float | None:
    """What all but the slowest of the last steps stay below: those that make a rollout are slow, and usual."""
    seconds = table.column("time/step")[-window:]
    if not np.isfinite(seconds).any():
        seconds = np.diff(table.time[-window:])
    seconds = seconds[np.isfinite(seconds)]
    return float(np.quantile(seconds, 0.95)) if len(seconds) else None
