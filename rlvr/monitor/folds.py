"""Sums of neighboring records in a bounded number of columns: what a run of any length costs is the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Fold:
    """Rows of numbers, summed over `per` neighboring records each; `per` doubles when there are `most` columns.

    sums [columns, ...], step [columns]: of the last record in each.   records: how many came in.
    """

    most: int
    shape: tuple[int, ...]
    per: int = 1
    records: int = 0
    sums: np.ndarray = field(init=False)
    step: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((0, *self.shape))
        self.step = np.zeros(0, np.int64)

    def add(self, steps: Sequence[int], rows: np.ndarray) -> None:
        """steps [n], rows [n, ...]: the next records, in order."""
        if not len(rows):
            return
        self.widen(rows.shape[1:])
        rows = _padded(rows, self.shape)
        total = self.records + len(rows)
        while -(-total // self.per) > self.most:
            self._halve()
        columns = -(-total // self.per)
        at = (self.records + np.arange(len(rows))) // self.per
        self.sums = _padded_columns(self.sums, columns)
        starts = np.flatnonzero(np.diff(at, prepend=-1))
        self.sums[at[starts]] += np.add.reduceat(rows, starts, axis=0)
        step = np.zeros(columns, np.int64)
        step[: len(self.step)] = self.step
        step[at] = steps  # the last of those that share a column stays
        self.step, self.records = step, total

    def widen(self, shape: tuple[int, ...]) -> None:
        """Room for rows of this shape, too; what came before has zeros there."""
        self.shape = tuple(np.maximum(self.shape, shape).tolist())
        self.sums = _padded(self.sums, self.shape)

    def _halve(self) -> None:
        self.per *= 2
        pairs = _padded_columns(self.sums, len(self.sums) + len(self.sums) % 2)
        self.sums = pairs[0::2] + pairs[1::2]
        self.step = np.append(self.step[1::2], self.step[-1:] if len(self.step) % 2 else [])


def _padded(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if rows.shape[1:] == shape:
        return rows
    return np.pad(rows, [(0, 0), *((0, new - old) for new, old in zip(shape, rows.shape[1:], strict=True))])


def _padded_columns(sums: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(sums, [(0, columns - len(sums)), *((0, 0) for _ in sums.shape[1:])])


def ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means, NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
