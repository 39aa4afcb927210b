"""What a batch of tokens or samples looks like beyond its mean: extremes, positions, concentration, coverage."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlvr.types import LocalReduce, Mean, Reduce

TOP_SHARES = (0.0002, 0.002, 0.02, 0.2)
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.99)


def top_share_means(
    values: Tensor, shares: Sequence[float] = TOP_SHARES, reduce: Reduce | None = None
) -> dict[float, Mean]:
    """Mean of the largest `share` of all tokens' values, by share; the same on every rank.

    values: [N] of this rank, such as the covariances of `rlvr.controls.covariance`.   shares: in (0, 1]; of n tokens
    over all ranks, max(int(share n), 1) are averaged. Without a token the mean is NaN.
    Raises: ValueError if a share lies outside (0, 1].   Ref: Cui et al. 2025, arXiv 2505.22617, Table 1.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must lie in (0, 1]")
    reduce = reduce or LocalReduce()
    total = _count(values, reduce)
    counts = [min(max(int(share * total), 1), total) for share in shares]
    sums = _largest_sums(values, counts, reduce)
    return {
        share: Mean(top, torch.tensor(float(count), dtype=torch.float64, device=values.device))
        for share, count, top in zip(shares, counts, sums, strict=True)
    }


def quantile_shares(
    entropy: Tensor, quantiles: Sequence[float] = QUANTILES, reduce: Reduce | None = None
) -> dict[float, Mean]:
    """Share of all entropy that sits in the tokens above a quantile, by quantile; the same on every rank.

    At quantile q of n tokens over all ranks: (sum over the n - ceil(q n) tokens of largest entropy) / (sum over all).
    1 - q if all tokens are alike, near 1 if few tokens carry it all. NaN if there is none.
    entropy: [N] of this rank, nats, >= 0.   quantiles: in [0, 1].
    Raises: ValueError if a quantile lies outside [0, 1].
    """
    for q in quantiles:
        if not 0 <= q <= 1:
            raise ValueError(f"quantile={q}: must lie in [0, 1]")
    reduce = reduce or LocalReduce()
    total = _count(entropy, reduce)
    counts = [total - math.ceil(q * total - 1e-9) for q in quantiles]  # 0.07 * 100 is 7.000000000000001
    everything = reduce.sum(entropy.detach().double().sum())
    sums = _largest_sums(entropy, counts, reduce)
    return {q: Mean(top, everything) for q, top in zip(quantiles, sums, strict=True)}


def doubling_edges(first: int, longest: int) -> tuple[int, ...]:
    """0, first, 3 first, 7 first, ... below `longest`: where bins that double in width begin.

    Raises: ValueError if first is below 1.
    """
    if first < 1:
        raise ValueError(f"first={first}: the first bin must hold at least 1 position")
    edges = [0]
    while edges[-1] * 2 + first < longest:
        edges.append(edges[-1] * 2 + first)
    return tuple(edges)


def mean_by_position(position: Tensor, values: Tensor, edges: Sequence[int]) -> tuple[Mean, ...]:
    """Mean value of the tokens in each bin of positions, as (sum, count).

    position: [N], int64, of the token in its response.   values: [N], such as entropies.   edges: where the bins
    begin, increasing from 0; the last bin has no end, so that every token is in one.
    Raises: ValueError if edges do not start at 0 or do not increase, or shapes differ.
    """
    if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges={tuple(edges)}: must start at 0 and increase")
    if position.shape != values.shape:
        raise ValueError(f"position has shape {tuple(position.shape)}, values have {tuple(values.shape)}")
    starts = torch.tensor(edges[1:], dtype=position.dtype, device=position.device)
    index = torch.bucketize(position, starts, right=True)
    return tuple(Mean.of(values[index == i]) for i in range(len(edges)))


def histogram(values: Tensor, edges: Sequence[float], reduce: Reduce | None = None) -> Tensor:
    """How many values over all ranks lie below the first edge, in each [edge, next edge), and from the last edge on.

    values: [N] of this rank; a NaN is in no bin.   edges: increasing; they are rounded to the precision of the values,
    at least float32, so that a value written as an edge is on it.
    Returns int64 [len(edges) + 1], which add over micro-batches. Raises: ValueError if edges do not increase.
    """
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges={tuple(edges)}: must increase")
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    starts = torch.tensor(edges, dtype=values.dtype, device=values.device)
    index = torch.bucketize(values[~values.isnan()], starts, right=True)
    return (reduce or LocalReduce()).sum(torch.bincount(index, minlength=len(edges) + 1))


def pass_at_k(num_samples: Tensor, num_correct: Tensor, k: int) -> Tensor:
    """1 - C(n - c, k) / C(n, k): the chance that k of a problem's n samples, drawn without replacement, have a hit.

    Unbiased for the chance that k fresh samples have one.   num_samples, num_correct: [P] whole numbers.
    Returns [P] float64. Raises: ValueError if a c lies outside [0, n] or k outside [1, n].
    Ref: Chen et al. 2021, arXiv 2107.03374, Eq. 1.
    """
    n, c = num_samples.double(), num_correct.double()
    if n.shape != c.shape or n.dim() != 1:
        raise ValueError(f"num_samples and num_correct must both be [P], got {tuple(n.shape)} and {tuple(c.shape)}")
    if not bool(((c >= 0) & (c <= n)).all()):
        raise ValueError("num_correct must lie in [0, num_samples] for every problem")
    fewest = int(n.min()) if n.numel() else max(k, 1)
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k}: must lie in [1, {fewest}], the smallest num_samples")
    drawn = torch.arange(k, dtype=torch.float64, device=n.device)
    missed = (n - c).unsqueeze(1) - drawn  # a product, not lgamma: 0 hits must give exactly 0
    return 1 - (missed.clamp(min=0) / (n.unsqueeze(1) - drawn)).prod(1)


def explained_variance(values: Tensor, returns: Tensor, reduce: Reduce | None = None) -> float:
    """1 - Var(returns - values) / Var(returns): what a critic knows of its returns; the same on every rank.

    1 is a perfect critic up to a constant, 0 is as good as a constant, below 0 is worse than none. NaN if the returns
    do not vary.   values, returns: [N] of this rank.   Raises: ValueError if shapes differ.
    """
    if values.shape != returns.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}, returns has {tuple(returns.shape)}")
    reduce = reduce or LocalReduce()
    count = _count(returns, reduce)
    if not count:
        return float("nan")
    target = returns.detach().double()
    first = reduce.gather(target[:1])[0]  # less one of them, equal returns are exactly 0
    both = torch.stack([target - first, target - values.detach().double()])
    mean = reduce.sum(both.sum(1, keepdim=True)) / count
    total, left = reduce.sum((both - mean).square().sum(1)).tolist()
    return 1 - left / total if total else float("nan")


def quantiles(values: Tensor, shares: Sequence[float], reduce: Reduce | None = None) -> list[float]:
    """Of n values over all ranks, the one that floor(share (n - 1)) others stand before in order, for each share; the
    same on every rank. NaN of nothing.

    By bisection on counts, so that no rank holds the values of another.   values: [N] of this rank, finite.   shares:
    in [0, 1].   Raises: ValueError if a share lies outside [0, 1].
    """
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: must lie in [0, 1]")
    reduce = reduce or LocalReduce()
    mine = values.detach().sort().values
    total = _count(mine, reduce)
    if not total:
        return [float("nan")] * len(shares)
    wanted = torch.tensor([int(share * (total - 1) + 1e-9) for share in shares], device=mine.device)
    ends = reduce.gather(mine[[0, -1]] if len(mine) else mine).double()
    low, high = (x.expand(len(shares)) for x in (ends.min(), ends.max()))
    for _ in range(100):  # each halves what is left between low, below the value sought, and high, not below it
        middle = (low + high) / 2
        enough = reduce.sum(torch.searchsorted(mine.double(), middle, right=True)) > wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    places = torch.searchsorted(mine.double(), high, right=True)
    padded = torch.cat([mine.new_full((1,), -math.inf), mine])
    nearest: list[float] = reduce.gather(padded[places].double().unsqueeze(0)).amax(0).tolist()
    return nearest


def _count(values: Tensor, reduce: Reduce) -> int:
    return int(reduce.sum(torch.tensor(values.numel(), dtype=torch.int64, device=values.device)))


def _largest_sums(values: Tensor, counts: Sequence[int], reduce: Reduce) -> list[Tensor]:
    """Sum of the k largest values over all ranks, float64, for each k of counts. No rank sends more than max(k)."""
    mine = values.detach().double()
    candidates = reduce.gather(mine.topk(min(max(counts, default=0), mine.numel())).values)
    sums = candidates.sort(descending=True).values.cumsum(0)
    return [sums[k - 1] if k else sums.new_zeros(()) for k in counts]
