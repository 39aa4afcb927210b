"""Instruments against plain loops, on one rank and on two that run side by side."""

import math
import random
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr.diagnostics import (
    doubling_edges,
    explained_variance,
    mean_by_position,
    pass_at_k,
    quantile_shares,
    quantiles,
    top_share_means,
)
from rlvr.types import Mean, Reduce

Result = TypeVar("Result")


class Rank:
    """`Reduce` of one of several threads, which meet in every collective."""

    def __init__(self, meeting: threading.Barrier, slots: list[Tensor], number: int) -> None:
        self.meeting, self.slots, self.number = meeting, slots, number

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.number] = x
        self.meeting.wait(timeout=10)
        every = list(self.slots)
        self.meeting.wait(timeout=10)
        return every

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x))


def on_ranks(parts: list[Tensor], run: Callable[[Tensor, Reduce], Result]) -> list[Result]:
    """What `run` returns on each rank."""
    meeting, slots = threading.Barrier(len(parts)), [torch.empty(0)] * len(parts)
    results: dict[int, Result] = {}

    def work(number: int) -> None:
        results[number] = run(parts[number], Rank(meeting, slots, number))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(parts))]


def values(number: int = 1000) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(5), dtype=torch.float64).exp()


def numbers(means: dict[float, Mean]) -> dict[float, float]:
    return {key: mean.value() for key, mean in means.items()}


SPLITS = [1, 0, 1000, 997]


# ---------------------------------------------------------------------------------------------------------- top shares


def test_top_share_means_is_the_sorted_list_cut_off() -> None:
    x = values()
    ordered = sorted(x.tolist(), reverse=True)
    expected = {s: sum(ordered[:k]) / k for s, k in ((0.0002, 1), (0.002, 2), (0.02, 20), (0.2, 200))}
    assert numbers(top_share_means(x)) == pytest.approx(expected, abs=1e-10)
    assert numbers(top_share_means(x, shares=(1.0,))) == pytest.approx({1.0: sum(ordered) / 1000}, abs=1e-10)


@pytest.mark.parametrize("split", SPLITS)
def test_top_share_means_is_the_same_on_ranks(split: int) -> None:
    x = values()
    for found in on_ranks([x[:split], x[split:]], lambda part, reduce: numbers(top_share_means(part, reduce=reduce))):
        assert found == pytest.approx(numbers(top_share_means(x)), abs=1e-10)


def test_top_share_means_of_nothing_is_nan() -> None:
    assert all(math.isnan(v) for v in numbers(top_share_means(torch.zeros(0))).values())
    with pytest.raises(ValueError, match=r"share=0: must lie in \(0, 1\]"):
        top_share_means(values(), shares=(0,))


# ----------------------------------------------------------------------------------------------------- quantile shares


def test_quantile_shares_by_hand() -> None:
    """0..9, sum 45: above the median sit 5..9 = 35, above the 80 % quantile 8 + 9 = 17, above the 90 % quantile 9."""
    got = numbers(quantile_shares(torch.arange(10.0).flip(0), quantiles=(0.0, 0.5, 0.8, 0.9, 1.0)))
    assert got == pytest.approx({0.0: 1.0, 0.5: 35 / 45, 0.8: 17 / 45, 0.9: 9 / 45, 1.0: 0.0}, abs=1e-12)


@pytest.mark.parametrize("number", [10, 100, 1000])
def test_quantile_shares_of_equal_tokens_are_what_is_left(number: int) -> None:
    """No rounding of q n moves a token, and ties split as they must."""
    quantiles = [i / 10 for i in range(11)] + ([0.07, 0.29, 0.57] if number > 10 else [])
    got = numbers(quantile_shares(torch.full((number,), 0.3), quantiles))
    assert got == pytest.approx({q: 1 - q for q in quantiles}, abs=1e-10)


def test_quantile_shares_of_one_loud_token_are_one() -> None:
    x = torch.zeros(200)
    x[17] = 2.0
    assert set(numbers(quantile_shares(x)).values()) == {1.0}


@pytest.mark.parametrize("split", SPLITS)
def test_quantile_shares_are_the_same_on_ranks(split: int) -> None:
    x = values()
    for found in on_ranks([x[:split], x[split:]], lambda part, reduce: numbers(quantile_shares(part, reduce=reduce))):
        assert found == pytest.approx(numbers(quantile_shares(x)), abs=1e-10)


def test_quantile_shares_of_nothing_are_nan() -> None:
    assert all(math.isnan(v) for v in numbers(quantile_shares(torch.zeros(0))).values())
    assert all(math.isnan(v) for v in numbers(quantile_shares(torch.zeros(9))).values())
    with pytest.raises(ValueError, match=r"quantile=1\.5: must lie in \[0, 1\]"):
        quantile_shares(values(), quantiles=(1.5,))


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("first", "longest", "edges"),
    [(1, 1, (0,)), (1, 8, (0, 1, 3, 7)), (16, 100, (0, 16, 48)), (16, 113, (0, 16, 48, 112)), (16, 112, (0, 16, 48))],
)
def test_doubling_edges(first: int, longest: int, edges: tuple[int, ...]) -> None:
    assert doubling_edges(first, longest) == edges


def test_mean_by_position_is_a_loop_over_tokens() -> None:
    rng = random.Random(1)
    position = torch.tensor([rng.randrange(200) for _ in range(500)])
    entropy = values(500)
    edges = doubling_edges(4, 150)
    sums, counts = [0.0] * len(edges), [0] * len(edges)
    for t, h in zip(position.tolist(), entropy.tolist(), strict=True):
        index = max(i for i, edge in enumerate(edges) if edge <= t)
        sums[index] += h
        counts[index] += 1
    got = mean_by_position(position, entropy, edges)
    assert [float(m.total) for m in got] == pytest.approx(sums, abs=1e-10)
    assert [float(m.count) for m in got] == counts
    assert sum(counts) == 500


def test_mean_by_position_adds_over_micro_batches() -> None:
    position, entropy, edges = torch.arange(60) % 20, values(60), (0, 4, 12)
    whole = mean_by_position(position, entropy, edges)
    halves = [mean_by_position(position[part], entropy[part], edges) for part in (slice(0, 7), slice(7, None))]
    for a, b, both in zip(*halves, whole, strict=True):
        assert (a + b).value() == pytest.approx(both.value(), abs=1e-12)


@pytest.mark.parametrize("edges", [(), (1, 2), (0, 4, 4), (0, 4, 3)])
def test_mean_by_position_refuses_edges_that_lose_tokens(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must start at 0 and increase"):
        mean_by_position(torch.zeros(1, dtype=torch.int64), torch.zeros(1), edges)


# ----------------------------------------------------------------------------------------------------------- pass at k


@given(st.lists(st.tuples(st.integers(8, 300), st.floats(0, 1)), min_size=1, max_size=6), st.integers(1, 8))
def test_pass_at_k_is_the_ratio_of_binomials(problems: list[tuple[int, float]], k: int) -> None:
    n = [size for size, _ in problems]
    c = [round(size * share) for size, share in problems]
    expected = [1 - math.comb(size - hits, k) / math.comb(size, k) for size, hits in zip(n, c, strict=True)]
    assert pass_at_k(torch.tensor(n), torch.tensor(c), k).tolist() == pytest.approx(expected, abs=1e-10)


def test_pass_at_k_ends_exactly() -> None:
    """No hit is 0, fewer misses than draws is 1, and one draw is the share of hits."""
    n, c = torch.tensor([1000, 1000, 8]), torch.tensor([0, 501, 3])
    assert pass_at_k(n[:1], c[:1], 700).tolist() == [0.0]
    assert pass_at_k(n[1:2], c[1:2], 500).tolist() == [1.0]
    assert pass_at_k(n[2:], c[2:], 1).tolist() == [3 / 8]
    assert pass_at_k(n[:0], c[:0], 4).numel() == 0


@pytest.mark.parametrize(
    ("n", "c", "k", "said"),
    [
        ([8, 4], [1, 1], 8, r"k=8: must lie in \[1, 4\], the smallest num_samples"),
        ([8, 4], [1, 1], 0, r"k=0: must lie in \[1, 4\]"),
        ([8, 4], [9, 1], 1, "num_correct must lie in"),
        ([8, 4], [1], 1, r"must both be \[P\], got \(2,\) and \(1,\)"),
    ],
)
def test_pass_at_k_refuses(n: list[int], c: list[int], k: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pass_at_k(torch.tensor(n), torch.tensor(c), k)


# -------------------------------------------------------------------------------------------------- explained variance


def test_explained_variance_by_hand() -> None:
    """Returns 0, 0, 4, 4 have variance 4; errors -1, 1, -1, 1 have variance 1, and errors 0, 0, -8, -8 have 16."""
    returns = torch.tensor([0.0, 0.0, 4.0, 4.0])
    assert explained_variance(torch.tensor([1.0, -1.0, 5.0, 3.0]), returns) == 1 - 1 / 4
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns - 7, returns) == 1.0
    assert explained_variance(torch.full((4,), 3.0), returns) == 0.0
    assert explained_variance(torch.tensor([0.0, 0.0, 12.0, 12.0]), returns) == 1 - 16 / 4


def test_explained_variance_is_that_of_torch() -> None:
    returns = values()
    guess = returns.sqrt()
    expected = float(1 - (returns - guess).var() / returns.var())
    assert explained_variance(guess, returns) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (-0.5, 2.0), (1.0, 1000.0)])
def test_explained_variance_ignores_the_units_of_reward(scale: float, shift: float) -> None:
    returns = values()
    guess = returns.sqrt()
    got = explained_variance(scale * guess + shift, scale * returns + shift)
    assert got == pytest.approx(explained_variance(guess, returns), abs=1e-10)


@pytest.mark.parametrize("split", SPLITS)
def test_explained_variance_is_the_same_on_ranks(split: int) -> None:
    both = torch.stack([values().sqrt(), values()], 1)
    for found in on_ranks(
        [both[:split], both[split:]], lambda x, reduce: explained_variance(x[:, 0], x[:, 1], reduce)
    ):
        assert found == pytest.approx(explained_variance(both[:, 0], both[:, 1]), abs=1e-10)


def test_explained_variance_of_returns_that_do_not_vary_is_nan() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for number in (0, 1, 1000):
            assert math.isnan(explained_variance(values(number).to(dtype), torch.full((number,), 0.1, dtype=dtype)))
    constant = torch.stack([values(), torch.full((1000,), 0.1, dtype=torch.float64)], 1)
    ranks = on_ranks([constant[:3], constant[3:]], lambda x, reduce: explained_variance(x[:, 0], x[:, 1], reduce))
    assert all(math.isnan(found) for found in ranks)
    with pytest.raises(ValueError, match=r"values has shape \(3,\), returns has \(1,\)"):
        explained_variance(torch.zeros(3), torch.zeros(1))


@pytest.mark.parametrize("number", [1, 2, 7, 1000])
def test_quantiles_are_values_in_order(number: int) -> None:
    values = torch.randn(number, generator=torch.Generator().manual_seed(number))
    ordered = values.sort().values.tolist()
    shares = (0.0, 0.05, 0.5, 0.95, 1.0)
    assert quantiles(values, shares) == [ordered[int(share * (number - 1) + 1e-9)] for share in shares]


def test_quantiles_of_equal_values_and_of_none() -> None:
    assert quantiles(torch.full((5,), -0.1), [0.0, 0.5, 1.0]) == [pytest.approx(-0.1)] * 3
    assert all(math.isnan(x) for x in quantiles(torch.empty(0), [0.5]))
    with pytest.raises(ValueError, match=r"share=1.5: must lie in \[0, 1\]"):
        quantiles(torch.ones(1), [1.5])
