"""What a run records beside its metrics, summed over neighboring steps: nothing is lost, nor spoils the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from dashboard_cases import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dashboard_reading import record

from rlvr.monitor import read_steps
from rlvr.monitor.details import WIDTHS
from rlvr.monitor.folds import Fold
from rlvr.monitor.table import Table, parse_step


@settings(max_examples=60)
@given(
    batches=st.lists(st.integers(0, 40), max_size=8),
    most=st.integers(1, 12),
    width=st.integers(1, 3),
)
def test_fold_is_a_sum_over_neighbors_however_it_was_fed(batches: list[int], most: int, width: int) -> None:
    total = sum(batches)
    rows = np.random.default_rng(0).integers(0, 100, (total, width)).astype(float)
    steps = np.arange(1, total + 1) * 3
    fold, begin = Fold(most, (width,)), 0
    for size in batches:
        fold.add(steps[begin : begin + size].tolist(), rows[begin : begin + size])
        begin += size
    assert len(fold.sums) == -(-total // fold.per) <= most
    parts = [slice(at, at + fold.per) for at in range(0, total, fold.per)]
    assert fold.sums.tolist() == [rows[part].sum(axis=0).tolist() for part in parts]
    assert fold.step.tolist() == [int(steps[part][-1]) for part in parts]


def test_fold_grows_wider_with_zeros_before() -> None:
    fold = Fold(4, (1, 2))
    fold.add([1], np.ones((1, 1, 2)))
    fold.add([2], np.ones((1, 1, 4)))
    assert fold.sums.tolist() == [[[1, 1, 0, 0]], [[1, 1, 1, 1]]]


def table_of(records: list[dict[str, Any]], batch: int = 7) -> Table:
    table = Table()
    whole = [parse_step(json.dumps(r).encode()) for r in records]
    for begin in range(0, len(whole), batch):
        table.extend(whole[begin : begin + batch])
    return table


def test_histograms_lose_no_count(tmp_path: Path) -> None:
    records = read_steps(write_run(tmp_path / "run", 30, features={"histograms"}))
    records *= 20  # 600 records fold three times
    sums = table_of(records).details.histograms
    assert sums is not None and sums.per == 4
    expected = np.concatenate([np.sum([r["histograms"][name] for r in records], axis=0) for name in WIDTHS])
    assert sums.sums.sum(axis=0).tolist() == expected.tolist()


def test_histograms_with_other_bins_count_as_absent() -> None:
    bins = {"entropy": [1] * WIDTHS["entropy"], "covariance": [1, 2], "unheard": [3], "weight": None}
    sums = table_of([record(1) | {"histograms": bins}, record(2) | {"histograms": "none"}]).details.histograms
    assert sums is not None and sums.records == 1 and sums.sums.sum() == WIDTHS["entropy"]


def test_positions_are_means_over_tokens(tmp_path: Path) -> None:
    """Bins that some steps lack, that are empty or not finite: only tokens that were measured count."""

    def bins(mean: list[Any], count: list[int]) -> dict[str, Any]:
        return {"edges": [0, 16, 48, 112][: len(mean)], "mean": mean, "count": count}

    records = [
        record(1) | {"entropy_by_position": bins([1.0, 2.0], [4, 1])},
        record(2)
        | {"entropy_by_position": bins([4.0, "NaN", 0.5], [1, 0, 2]), "mismatch_by_position": bins([0.25], [2])},
        record(3) | {"entropy_by_position": {"edges": [0], "mean": []}},
        record(4),
    ]
    details = table_of(records, batch=10).details
    assert details.edges == [0, 16, 48] and details.positions is not None
    first, second, third = details.positions.sums
    assert first.tolist() == [[4, 2, 0], [4, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert second.tolist() == [[4, 0, 1], [1, 0, 2], [0.5, 0, 0], [2, 0, 0]]
    assert not third.any() and details.positions.step.tolist() == [1, 2, 3]


def test_routers_are_those_of_the_last_layout(tmp_path: Path) -> None:
    def one(layers: list[str], value: Any) -> dict[str, Any]:
        load = [[0.25, 0.75]] * (len(layers) - 1) + [[value, 0.5, 0.5]]
        same = [value] * len(layers)
        return {"layers": layers, "entropy": same, "soft": same, "load": load, "position_edges": [0.0, value]}

    records = [record(1) | {"routers": one(["a"], 0.9)}]
    records += [record(n) | {"routers": one(["a", "b"], value)} for n, value in ((2, 0.5), (3, "NaN"), (4, 1.0))]
    details = table_of([*records, record(5) | {"routers": {"layers": ["c"]}}], batch=3).details
    assert details.layers == [("a", 2), ("b", 3)] and details.by_position == {"position_edges": [0.0, 1.0]}
    assert details.routers is not None and details.routers.step.tolist() == [2, 3, 4]
    assert details.last_load.tolist() == [0.25, 0.75, 1, 0.5, 0.5]
    sums, counts = details.routers.sums[:, 0], details.routers.sums[:, 1]
    assert sums[:, 0].tolist() == [0.5, 0, 1] and counts[:, 0].tolist() == [1, 0, 1]
    assert sums[:, 4:].tolist() == [[0.25, 0.75, 0.5, 0.5, 0.5], [0.25, 0.75, 0, 0.5, 0.5], [0.25, 0.75, 1, 0.5, 0.5]]
