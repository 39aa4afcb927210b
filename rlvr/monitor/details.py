"""What step records hold beside metrics: histograms, means by position, routers; summed over neighboring steps."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from rlvr.monitor.folds import Fold
from rlvr.monitor.histograms import HISTOGRAMS

COLUMNS = 200  # over the training, at most
ROUTER_COLUMNS = 100  # these are wide
WIDTHS = {name: len(one.edges) + 1 for name, one in HISTOGRAMS.items()}
POSITIONS = ("entropy_by_position", "mismatch_by_position")

Record = dict[str, Any]


class Details:
    """Sums over neighboring records, None where nothing was recorded.

    histograms [bins of all of HISTOGRAMS].   positions [4, bins]: sum and count of the tokens' entropy, of their
    mismatch.   routers [2, n]: sum and count of entropy, soft and load of all layers, one after the other.
    edges: of the bins of positions.   layers: name and number of experts of each router.   by_position: what the last
    record of routers says by position in the text.   last_load: its loads of all layers, one after the other.
    """

    def __init__(self) -> None:
        self.histograms: Fold | None = None
        self.positions: Fold | None = None
        self.routers: Fold | None = None
        self.edges: list[float] = []
        self.layers: list[tuple[str, int]] = []
        self.by_position: Record | None = None
        self.last_load = np.zeros(0)

    def extend(self, records: Sequence[Record]) -> None:
        """Add records of `table.parse_step`; what is malformed in one is left out."""
        self._add_histograms([r for r in records if isinstance(r.get("histograms"), dict)])
        self._add_positions([r for r in records if r.get(POSITIONS[0]) or r.get(POSITIONS[1])])
        self._add_routers([r for r in records if r.get("routers")])

    def _add_histograms(self, records: Sequence[Record]) -> None:
        if records:
            self.histograms = self.histograms or Fold(COLUMNS, (sum(WIDTHS.values()),))
            rows = floats([_counts(record["histograms"]) for record in records])
            self.histograms.add(_steps(records), np.nan_to_num(rows, posinf=0, neginf=0))

    def _add_positions(self, records: Sequence[Record]) -> None:
        found = [tuple(_bins(record.get(name)) for name in POSITIONS) for record in records]
        widths = [tuple(len(bins[0]) for bins in both) for both in found]
        widest = max((width for both in widths for width in both), default=0)
        if not widest:
            return
        rows = np.zeros((len(records), 4, widest))
        for width in set(widths):
            at = [number for number, other in enumerate(widths) if other == width]
            for kind in (0, 1):
                bins = floats([list(chain(*found[number][kind][1:])) for number in at]).reshape(
                    len(at), 2, width[kind]
                )
                known = np.isfinite(bins).all(axis=1)
                mean, count = (np.where(known, part, 0) for part in (bins[:, 0], bins[:, 1]))
                rows[at, 2 * kind, : width[kind]] = mean * count
                rows[at, 2 * kind + 1, : width[kind]] = count
        self.edges = max(self.edges, *(bins[0] for both in found for bins in both), key=len)
        self.positions = self.positions or Fold(COLUMNS, (4, widest))
        self.positions.add(_steps(records), rows)

    def _add_routers(self, records: Sequence[Record]) -> None:
        """Only those records count that are laid out as the last one: a resumed run may have other experts."""
        laid_out = [(record, layers) for record in records if (layers := _layers(record["routers"]))]
        if not laid_out:
            return
        layers = laid_out[-1][1]
        records = [record for record, other in laid_out if other == layers]
        if layers != self.layers or self.routers is None:
            self.layers, self.routers = layers, Fold(ROUTER_COLUMNS, (2, sum(2 + experts for _, experts in layers)))
        values = floats([_router_row(record["routers"]) for record in records])
        known = np.isfinite(values)
        self.routers.add(_steps(records), np.stack([np.where(known, values, 0), known], axis=1))
        self.last_load = values[-1, 2 * len(layers) :].copy()
        last = records[-1]["routers"]
        self.by_position = {name: value for name, value in last.items() if name.startswith("position_")} or None


def _steps(records: Sequence[Record]) -> list[int]:
    return [record["step"] for record in records]


def _counts(histograms: Record) -> list[Any]:
    """All counts one after the other; zeros for a histogram that is not there, or has other bins."""
    row: list[Any] = []
    for name, width in WIDTHS.items():
        counts = histograms.get(name)
        row += counts if isinstance(counts, list) and len(counts) == width else [0] * width
    return row


def _bins(found: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Edges, means and counts, empty if they are not there or do not fit."""
    try:
        edges, mean, count = (list(found[name]) for name in ("edges", "mean", "count"))
    except (TypeError, KeyError):
        return [], [], []
    return (edges, mean, count) if len(edges) == len(mean) == len(count) else ([], [], [])


def _layers(routers: Any) -> list[tuple[str, int]]:
    try:
        layers = [(str(name), len(load)) for name, load in zip(routers["layers"], routers["load"], strict=True)]
        fit = len(layers) == len(routers["entropy"]) == len(routers["soft"])
    except (TypeError, KeyError, ValueError):
        return []
    return layers if fit else []


def _router_row(routers: Record) -> list[Any]:
    return [*routers["entropy"], *routers["soft"], *chain(*routers["load"])]


def floats(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """[n, m] of rows of one length: strings such as "NaN" as what they say, what is no number as NaN."""
    try:
        return np.array(rows, np.float64)
    except (ValueError, TypeError):
        return np.array([[_float(value) for value in row] for row in rows], np.float64)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan
