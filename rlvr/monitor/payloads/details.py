"""What a run recorded beside its metrics: histograms, means by position, routers."""

from itertools import accumulate
from typing import Any

import numpy as np

from rlvr.monitor.details import WIDTHS, Details
from rlvr.monitor.folds import ratio
from rlvr.monitor.payloads.numbers import significant, whole
from rlvr.monitor.payloads.view import View


def histograms_payload(view: View) -> dict[str, Any]:
    """Counts of neighboring steps; a histogram in which nothing was ever counted is left out."""
    fold = view.table.details.histograms
    if fold is None:
        return {"step": [], "counts": {}}
    parts = dict(zip(WIDTHS, np.split(fold.sums, np.cumsum(list(WIDTHS.values()))[:-1], axis=1), strict=True))
    return {
        "step": fold.step,
        "counts": {name: np.ascontiguousarray(whole(p)) for name, p in parts.items() if p.any()},
    }


def positions_payload(view: View) -> dict[str, Any]:
    """Means over the tokens of neighboring steps in bins of positions."""
    details = view.table.details
    fold = details.positions
    if fold is None:
        return {"step": [], "edges": [], "entropy": [], "mismatch": []}
    entropy, mismatch = (ratio(fold.sums[:, kind], fold.sums[:, kind + 1]) for kind in (0, 2))
    return {
        "step": fold.step,
        "edges": whole(np.array(details.edges, float)),
        "entropy": significant(entropy),
        "mismatch": significant(mismatch) if np.isfinite(mismatch).any() else [],
    }


def router_payload(view: View) -> dict[str, Any]:
    """Means over neighboring steps of what the routers of a mixture of experts did, layer by layer.

    load_last, position: of the last record alone.
    """
    details = view.table.details
    fold = details.routers
    if fold is None:
        return {"step": [], "layers": [], "entropy": [], "soft": [], "load": [], "load_last": [], "position": None}
    means = significant(ratio(fold.sums[:, 0], fold.sums[:, 1]))
    layers = len(details.layers)
    return {
        "step": fold.step,
        "layers": [name for name, _ in details.layers],
        "entropy": np.ascontiguousarray(means[:, :layers]),
        "soft": np.ascontiguousarray(means[:, layers : 2 * layers]),
        "load": _loads(means[:, 2 * layers :], details),
        "load_last": _loads(significant(details.last_load)[None], details)[0],
        "position": details.by_position,
    }


def _loads(means: np.ndarray, details: Details) -> list[list[list[float]]]:
    """[columns, layers, experts], which differ between layers."""
    ends = list(accumulate(experts for _, experts in details.layers))
    begins = [0, *ends[:-1]]
    return [[row[begin:end] for begin, end in zip(begins, ends, strict=True)] for row in means.tolist()]
