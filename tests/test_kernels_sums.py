"""rlvr_kernels.sums: merging parts, the statistics, and the gradient by the logits, against definitions in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ALL, INF, SMOOTH, Case, brute_force, check_stats, coefficients

from rlvr_kernels import TokenStats, logit_stats
from rlvr_kernels.sums import Q0, S0, S1, S2, U_TARGET, M, empty, finish, live_tokens, merge, rescale_, slope

DOUBLE = torch.float64


def sums_of(z: torch.Tensor, targets: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Sums [8, N] of logits [N, V] that are a vocabulary's from number `start` on, by definition."""
    n, v = z.shape
    m = z.amax(-1) if v else z.new_full((n,), -INF)
    u = z - m.masked_fill(m == -INF, 0.0)[:, None]
    e, u = u.exp(), u.masked_fill(u == -INF, 0.0)
    moments = [(u**k * e**j).sum(-1) for j in (1, 2) for k in (0, 1, 2)]
    inside = (targets >= start) & (targets < start + v)
    padded = torch.cat([z - m.masked_fill(m == -INF, 0.0)[:, None], z.new_full((n, 1), -INF)], 1)
    at_target = padded.gather(1, (targets - start).where(inside, v)[:, None]).squeeze(1)
    return torch.stack([m, *moments, at_target])


def random_logits(n: int = 7, v: int = 31, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, v, generator=g, dtype=DOUBLE)
    targets = torch.randint(v, (n,), generator=g)
    z[:, :5] = -INF
    return z, targets


def check_sums(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(0, 31), max_size=6), st.integers(0, 1000))
def test_merge_of_any_split_is_the_whole(cuts, seed):
    """Parts may be empty, or hold nothing but impossible tokens."""
    z, targets = random_logits(seed=seed)
    edges = [0, *sorted(cuts), 31]
    parts = [sums_of(z[:, i:j], targets, i) for i, j in pairwise(edges)]
    check_sums(merge(torch.stack(parts, 1)), sums_of(z, targets))
    check_sums(merge(torch.stack(parts[::-1], 1)), sums_of(z, targets))


def test_merge_with_sums_over_nothing_changes_no_bit():
    z, targets = random_logits()
    whole = sums_of(z, targets)
    assert torch.equal(merge(torch.stack([empty(7, z), whole, empty(7, z)], 1)), whole)


def test_merge_leaves_its_parts_alone():
    z, targets = random_logits()
    parts = torch.stack([sums_of(z[:, :20], targets), sums_of(z[:, 20:], targets, 20)], 1)
    before = parts.clone()
    merge(parts)
    assert torch.equal(parts, before)


def test_rescale_in_two_steps_is_one_step():
    sums = sums_of(*random_logits())
    once, twice = sums.clone(), sums.clone()
    rescale_(once, sums[M] + 3.0)
    rescale_(twice, sums[M] + 1.0)
    rescale_(twice, sums[M] + 3.0)
    check_sums(twice, once)


def test_rescale_keeps_the_statistics():
    """All but p_max and is_greedy, which take the sums to be relative to the largest logit."""
    sums = sums_of(*random_logits())
    moved = sums.clone()
    rescale_(moved, sums[M] + 2.5)
    torch.testing.assert_close(finish(moved, SMOOTH), finish(sums, SMOOTH), rtol=1e-12, atol=1e-12)


def test_finish_equals_brute_force():
    z, targets = random_logits()
    case = Case(z.nan_to_num(neginf=0.0), torch.eye(31), targets, torch.zeros(31).index_fill(0, torch.arange(5), -INF))
    check_stats(TokenStats(**finish(sums_of(z, targets), ALL)), brute_force(case), tolerance=1e-12)


def test_finish_worked_numbers():
    """p = (1/2, 1/4, 1/4): m = ln 2, u = (0, -ln 2, -ln 2), e = (1, 1/2, 1/2), so s0 = 2 and s1 = -ln 2."""
    ln2 = math.log(2)
    sums = sums_of(torch.tensor([[ln2, 0.0, 0.0]], dtype=DOUBLE), torch.tensor([2]))
    assert sums[[M, S0, S1, S2, Q0, U_TARGET], 0].tolist() == pytest.approx([ln2, 2, -ln2, ln2**2, 1.5, -ln2])
    stats = finish(sums, ["logps", "entropy", "lse", "p_max", "sum_p2"])
    assert {k: x.item() for k, x in stats.items()} == pytest.approx(
        {"logps": -2 * ln2, "entropy": 1.5 * ln2, "lse": 2 * ln2, "p_max": 0.5, "sum_p2": 0.375}
    )


@given(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-INF), min_size=1, max_size=40), st.integers(0, 39))
def test_signs_hold_exactly_in_float32(row, cut):
    z = torch.tensor([[0.0, *row]])
    for y in range(z.size(1)):
        targets = torch.tensor([y])
        parts = [sums_of(z[:, :cut], targets), sums_of(z[:, cut:], targets, cut)]
        stats = finish(merge(torch.stack(parts, 1)), ["logps", "entropy", "p_max"])
        assert stats["logps"].item() <= 0
        assert stats["entropy"].item() >= 0
        assert 0 < stats["p_max"].item() <= 1


def gradient(sums: torch.Tensor, z: torch.Tensor, targets: torch.Tensor, grads: dict) -> torch.Tensor:
    """The gradient by the logits that slope's numbers stand for."""
    target, a0, a1, a2, b0, b1, b2 = slope(sums, grads).numbers[:, :, None]
    logp = z.log_softmax(-1)
    p, logp = logp.exp(), logp.masked_fill(logp == -INF, 0.0)
    of_p = p * (a0 + a1 * logp + a2 * logp**2 + p * (b0 + b1 * logp + b2 * logp**2))
    return of_p.scatter_add(1, targets[:, None], target)


@pytest.mark.parametrize("fields", [*([name] for name in SMOOTH), SMOOTH], ids=lambda x: "+".join(x))
def test_slope_is_the_gradient_by_the_logits(fields):
    z, targets = random_logits()
    coef = coefficients(7, fields)
    leaf = z.clone().requires_grad_()
    stats = logit_stats(leaf, targets, want=fields)
    (want,) = torch.autograd.grad([getattr(stats, name) for name in fields], leaf, list(coef.values()))
    got = gradient(sums_of(z, targets), z, targets, coef)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not got[:, :5].any()  # the impossible


@pytest.mark.parametrize(
    ("fields", "degree"),
    [(["logps"], 0), (["lse"], 0), (["logps", "entropy"], 1), (["entropy"], 1), *(([x], 2) for x in SMOOTH[3:])],
)
def test_slope_degree_bounds_what_is_not_zero(fields, degree):
    found = slope(sums_of(*random_logits()), coefficients(7, fields))
    assert found.degree == degree
    last = {0: 2, 1: 3, 2: 7}[degree]
    assert not found.numbers[last:].any()


def test_slope_live_tokens_are_those_with_a_coefficient():
    coef = coefficients(7)
    for g in coef.values():
        g[[1, 4]] = 0.0
    sums = sums_of(*random_logits()).float()
    sums[:, 4] = math.nan  # what is known of a token that nobody asks about does not matter
    assert live_tokens(coef, sums[0]).tolist() == [True, False, True, True, False, True, True]
    assert live_tokens({}, sums[0]).tolist() == [False] * 7


def test_parts_far_apart_keep_the_moments_finite():
    """The largest logit rises by more than its square can be in float32."""
    low, high = sums_of(torch.zeros(1, 5), torch.tensor([9])), sums_of(torch.full((1, 1), 1e30), torch.tensor([0]))
    found = finish(merge(torch.stack([low, high], 1)), ALL)
    assert found["sum_p2"].item() == 1
    assert found["sum_p_logp2"].item() == found["sum_p2_logp2"].item() == found["entropy"].item() == 0
