"""Histograms of a step's tokens against plain loops, cut into micro-batches and on two ranks that run side by side."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_diagnostics import SPLITS, on_ranks, values
from torch import Tensor

from rlvr.diagnostics import doubling_edges, histogram
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.trainers.instruments import TokenDiagnostics
from rlvr.types import Coefficients, LocalReduce, Reduce, Tokens


def counted(values: list[float], edges: tuple[float, ...]) -> list[int]:
    """One value after the other."""
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[sum(edge <= value for edge in edges)] += 1
    return counts


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histogram_is_a_loop_over_values(name: str) -> None:
    edges = HISTOGRAMS[name].edges
    x = torch.cat([values() * sign for sign in (1, -1)] + [torch.tensor(edges).double()])
    for scaled in (x, x.float(), 0.01 * x):
        got = histogram(scaled, edges)
        rounded = tuple(torch.tensor(edges, dtype=scaled.dtype).tolist())
        assert got.tolist() == counted(scaled.tolist(), rounded)
        assert got.dtype == torch.int64 and int(got.sum()) == len(scaled)


def test_histogram_puts_a_value_written_as_an_edge_on_it() -> None:
    """In float32, 0.35 is less than in float64, 0.1 more: both are their edges."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert histogram(torch.tensor([0.5, 0.25], dtype=dtype), (0.25, 0.5)).tolist() == [0, 1, 1]
    assert histogram(torch.tensor([0.1, 0.35, 0.9]), (0.1, 0.35, 0.9)).tolist() == [0, 1, 1, 1]


def test_histogram_counts_no_nan_and_all_else() -> None:
    x = torch.tensor([math.nan, -math.inf, math.inf, 0.0])
    assert histogram(x, (0.0, 1.0)).tolist() == [1, 1, 1]
    assert histogram(x[:0], (0.0, 1.0)).tolist() == [0, 0, 0]
    assert histogram(x, ()).tolist() == [3]
    with pytest.raises(ValueError, match="must increase"):
        histogram(x, (0.0, 1.0, 1.0))


@pytest.mark.parametrize("split", SPLITS)
def test_histogram_is_the_same_on_ranks(split: int) -> None:
    x, edges = values(), HISTOGRAMS["entropy"].edges
    for found in on_ranks([x[:split], x[split:]], lambda part, reduce: histogram(part, edges, reduce)):
        assert found.tolist() == histogram(x, edges).tolist()


def rollout(number: int = 1000) -> tuple[Tokens, Coefficients]:
    """Tokens with everything that is counted."""
    source = torch.Generator().manual_seed(7)
    logps, old, engine, advantages, weight, keep = torch.randn(6, number, generator=source)
    tokens = Tokens(
        logps=-logps.exp(),
        old_logps=-old.exp(),
        rollout_logps=-old.exp() + 0.01 * engine,
        advantages=advantages,
        sequence=torch.zeros(number, dtype=torch.int64),
        num_sequences=1,
        position=torch.arange(number),
        entropy=values(number).float(),
    )
    return tokens, Coefficients(weight=weight.exp(), keep=keep > -1)


def details(parts: list[Tensor], reduce: Reduce) -> dict[str, Any]:
    """Of a step whose micro-batches have the tokens of these numbers."""
    tokens, coefficients = rollout()
    diagnostics = TokenDiagnostics(True)
    for part in parts:
        mine = Coefficients(**{name: x[part] for name, x in coefficients.present().items()})
        diagnostics.add(tokens.select(part), mine)
    diagnostics.close(reduce)
    return diagnostics.details


def test_token_diagnostics_count_each_token_once() -> None:
    """Those that controls take out have weight 0, an entropy and a mismatch, and no part in anything else."""
    tokens, coefficients = rollout()
    keep, weight = coefficients.keep, coefficients.weight
    assert keep is not None and weight is not None and tokens.entropy is not None and tokens.rollout_logps is not None
    found = details([torch.arange(1000)], LocalReduce())
    counts = found["histograms"]
    logps, advantages = tokens.logps[keep].double(), tokens.advantages[keep].double()
    expected = {
        "entropy": tokens.entropy,
        "covariance": (logps - logps.mean()) * (advantages - advantages.mean()),
        "advantage": tokens.advantages[keep],
        "weight": weight * keep,
        "mismatch": (tokens.old_logps.double() - tokens.rollout_logps.double()).abs(),
    }
    assert counts == {name: counted(x.tolist(), HISTOGRAMS[name].edges) for name, x in expected.items()}
    assert {name: sum(x) for name, x in counts.items()} == {
        **dict.fromkeys(("covariance", "advantage"), int(keep.sum())),
        **dict.fromkeys(("entropy", "weight", "mismatch"), 1000),
    }
    assert counts["weight"][0] == int((~keep).sum()) > 0
    for name in ("entropy_by_position", "mismatch_by_position"):
        assert found[name]["edges"] == list(doubling_edges(4, 1000)) and sum(found[name]["count"]) == 1000
    bins = found["mismatch_by_position"]
    mean = sum(m * n for m, n in zip(bins["mean"], bins["count"], strict=True)) / 1000
    assert mean == pytest.approx(float(expected["mismatch"].mean()), rel=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_token_diagnostics_do_not_depend_on_micro_batches_or_ranks(split: int) -> None:
    whole = details([torch.arange(1000)], LocalReduce())
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    cut = details(list(order.split([split, 500 - split // 2, 500 - (split + 1) // 2])), LocalReduce())
    parts = [order[:split], order[split:]]
    ranks = on_ranks(parts, lambda part, reduce: details([part[:100], part[100:]], reduce))
    for found in (cut, *ranks):
        assert found["histograms"] == whole["histograms"]
        for name in ("entropy_by_position", "mismatch_by_position"):
            assert found[name]["count"] == whole[name]["count"]
            assert found[name]["mean"] == pytest.approx(whole[name]["mean"], rel=1e-12)


def test_token_diagnostics_leave_out_what_nobody_measures() -> None:
    tokens, coefficients = rollout()
    alone = replace(tokens, rollout_logps=None)
    diagnostics = TokenDiagnostics(True)
    diagnostics.add(alone, Coefficients(drift=torch.ones(1000)))
    diagnostics.close(LocalReduce())
    assert diagnostics.details.keys() == {"entropy_by_position", "histograms"}
    assert diagnostics.details["histograms"].keys() == {"entropy", "covariance", "advantage"}
    for weight in (Coefficients(weight=coefficients.weight), Coefficients(keep=coefficients.keep)):
        diagnostics.add(alone, Coefficients())
        diagnostics.add(alone, weight)
        diagnostics.close(LocalReduce())
        assert sum(diagnostics.details["histograms"]["weight"]) == 2000
    diagnostics.add(tokens, Coefficients(keep=torch.zeros(1000, dtype=torch.bool)))
    assert diagnostics.close(LocalReduce()) == diagnostics.details == {} and diagnostics.means is None
    off = TokenDiagnostics(False)
    off.add(tokens, coefficients)
    assert off.close(LocalReduce()) == off.details == {}
