"""The step records of a run as columns of numbers, whose memory does not grow with what a record holds besides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlvr.alarm import Alert
from rlvr.monitor.details import Details, floats
from rlvr.monitor.records import alerts_of
from rlvr.monitor.tail import parse_json


@dataclass(frozen=True, slots=True)
class Told:
    """An alert, with the step of which the run told it.   time: Unix seconds, NaN if the record has none."""

    step: int
    time: float
    alert: Alert


def parse_step(line: bytes) -> dict[str, Any]:
    """A line of steps.jsonl. Raises: ValueError, KeyError or TypeError if it is no record of a step."""
    record = parse_json(line)
    if not isinstance(record["metrics"], dict) or not isinstance(record["step"], int):
        raise ValueError("no record of a step")
    return record


class Table:
    """Columns of the records given so far, in their order.

    A record that does not tell how many tokens were trained on has as many as the one before.
    names: metrics in the order in which they were first recorded.   not_finite: how often a metric was recorded as
    something that is no finite number.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.not_finite: dict[str, int] = {}
        self.alerts: list[Told] = []
        self.count = 0
        self.details = Details()
        self._values = np.zeros((0, 0))
        self._axes = np.zeros((3, 0))

    @property
    def step(self) -> np.ndarray:
        """[count], int64."""
        return self._axes[0, : self.count].astype(np.int64)

    @property
    def time(self) -> np.ndarray:
        """Unix seconds [count]."""
        return self._axes[1, : self.count]

    @property
    def tokens(self) -> np.ndarray:
        """Trained on since the start of the run [count]."""
        return self._axes[2, : self.count]

    def column(self, name: str) -> np.ndarray:
        """A metric at each record [count], NaN where it was not recorded."""
        row = self.names.get(name)
        return np.full(self.count, np.nan) if row is None else self._values[row, : self.count]

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """[len(names), count]: recorded metrics."""
        return self._values[[self.names[name] for name in names], : self.count]

    def last(self, name: str) -> float | None:
        """The latest finite value."""
        values = self.column(name)
        finite = np.flatnonzero(np.isfinite(values))
        return float(values[finite[-1]]) if len(finite) else None

    def extend(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records of `parse_step`."""
        begin, end = self.count, self.count + len(records)
        for record in records:
            for name in record["metrics"]:
                if name not in self.names:
                    self.names[name] = len(self.names)
        self._reserve(end)
        axes = [(r["step"], r.get("time", math.nan), r.get("tokens", math.nan)) for r in records]
        self._axes[:, begin:end] = floats(axes).T
        self._carry_tokens(begin, end)
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, record in enumerate(records):
            groups.setdefault(tuple(record["metrics"]), []).append(number)
        for keys, numbers in groups.items():
            self._store(keys, begin + np.array(numbers), [list(records[n]["metrics"].values()) for n in numbers])
        self.count = end
        self._add_alerts(records)
        self.details.extend(records)

    def fit(self) -> None:
        """Give back the memory that was reserved for more records."""
        self._values = self._values[:, : self.count].copy()
        self._axes = self._axes[:, : self.count].copy()

    def _reserve(self, count: int) -> None:
        rows, room = self._values.shape
        if count > room or len(self.names) > rows:
            room = max(room, count + count // 2) if count > room else room
            values = np.full((len(self.names), room), np.nan)
            values[:rows, : self.count] = self._values[:, : self.count]
            axes = np.zeros((3, room))
            axes[:, : self.count] = self._axes[:, : self.count]
            self._values, self._axes = values, axes

    def _carry_tokens(self, begin: int, end: int) -> None:
        tokens = self._axes[2, begin:end]
        known = np.isfinite(tokens)
        if not known.all():
            before = self._axes[2, begin - 1] if begin else 0.0
            last = np.maximum.accumulate(np.where(known, np.arange(1, end - begin + 1), 0))
            self._axes[2, begin:end] = np.append(before, tokens)[last]

    def _store(self, keys: tuple[str, ...], at: np.ndarray, rows: list[list[Any]]) -> None:
        if not keys:
            return
        values = floats(rows).T
        self._values[np.array([self.names[name] for name in keys])[:, None], at] = values
        odd = (~np.isfinite(values)).sum(axis=1)
        for number in np.flatnonzero(odd):
            self.not_finite[keys[number]] = self.not_finite.get(keys[number], 0) + int(odd[number])

    def _add_alerts(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            if record.get("alerts"):
                when = floats([[record.get("time", math.nan)]]).item()
                self.alerts += [Told(record["step"], when, alert) for alert in alerts_of(record)]
