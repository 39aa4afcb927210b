"""Laws of the advantage estimators, over random groups of random sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_diagnostics import on_ranks
from torch import Tensor

from rlvr.advantages import Scale, group_relative, leave_one_out, whiten

EXACT = {"rtol": 0.0, "atol": 1e-10}
SCALES: tuple[Scale, ...] = ("group", "batch", "none")
# Eighths: as verifiable rewards do, they repeat, and equal rewards are equal exactly.
grid = st.integers(-40, 40).map(lambda n: n / 8)


@st.composite
def rollouts(draw: st.DrawFn, *, unscored: bool = False) -> tuple[Tensor, Tensor]:
    """(rewards [R] float64, group [R]) of 1 to 4 groups of 1 to 5 responses, in any order; labels are any integers."""
    labels = draw(st.lists(st.integers(-100, 100), min_size=1, max_size=4, unique=True))
    group = [label for label in labels for _ in range(draw(st.integers(1, 5)))]
    reward = st.one_of(grid, grid, st.just(math.nan)) if unscored else grid
    rewards = [draw(reward) for _ in group]
    order = draw(st.permutations(range(len(group))))
    return torch.tensor([rewards[i] for i in order], dtype=torch.float64), torch.tensor([group[i] for i in order])


def members(group: Tensor) -> list[Tensor]:
    return [(group == label).nonzero()[:, 0] for label in group.unique()]


@pytest.mark.parametrize("scale", SCALES)
@given(rollout=rollouts(unscored=True), seed=st.integers(0, 2**31))
def test_group_relative_permutes_with_its_input(scale: Scale, rollout: tuple[Tensor, Tensor], seed: int) -> None:
    rewards, group = rollout
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    permuted = group_relative(rewards[order], group[order], scale=scale)
    torch.testing.assert_close(permuted, group_relative(rewards, group, scale=scale)[order], **EXACT)


@pytest.mark.parametrize("scale", ("group", "none"))
@given(rollout=rollouts(unscored=True), shift=grid)
def test_group_relative_ignores_a_shift_of_a_groups_rewards(
    scale: Scale, rollout: tuple[Tensor, Tensor], shift: float
) -> None:
    rewards, group = rollout
    large = torch.stack([(group == label).sum() > 1 for label in group])  # a single response has no baseline
    shifted = torch.where(large, rewards + shift, rewards)
    got, expected = group_relative(shifted, group, scale=scale), group_relative(rewards, group, scale=scale)
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("scale", SCALES)
@given(rollout=rollouts(unscored=True))
def test_group_relative_sums_to_zero_in_each_group(scale: Scale, rollout: tuple[Tensor, Tensor]) -> None:
    rewards, group = rollout
    advantages = group_relative(rewards, group, scale=scale)
    for rows in members(group):
        if len(rows) > 1:
            # eps = 1e-6 may divide the rounding of a zero, about 1e-15, when all rewards are equal
            assert abs(float(advantages[rows].sum())) < 1e-8


@pytest.mark.parametrize("scale", SCALES)
@given(rollout=rollouts(unscored=True))
def test_group_relative_treats_unscored_as_absent(scale: Scale, rollout: tuple[Tensor, Tensor]) -> None:
    rewards, group = rollout
    scored = ~rewards.isnan()
    advantages = group_relative(rewards, group, scale=scale)
    assert torch.equal(advantages[~scored], torch.zeros(int((~scored).sum()), dtype=torch.float64))
    assert advantages.isfinite().all()
    without = torch.zeros_like(rewards)
    without[scored] = group_relative(rewards[scored], group[scored], scale=scale)
    for rows in members(group):
        left = int(scored[rows].sum())
        if left == 1 and len(rows) > 1:  # its baseline is itself: not the same as having been alone
            without[rows] = 0
    torch.testing.assert_close(advantages, without, **EXACT)


@given(reward=grid)
def test_group_relative_of_one_response(reward: float) -> None:
    rewards, group = torch.tensor([reward, 1.0, 3.0], dtype=torch.float64), torch.tensor([4, 7, 7])
    assert float(group_relative(rewards, group)[0]) == pytest.approx(reward / (1 + 1e-6), abs=1e-12)
    assert float(group_relative(rewards, group, scale="none")[0]) == reward
    spread = float(rewards.std()) + 1e-6
    assert float(group_relative(rewards, group, scale="batch")[0]) == pytest.approx(reward / spread, abs=1e-12)


@pytest.mark.parametrize("ddof", (0, 1))
@given(rollout=rollouts())
def test_group_relative_equals_the_loop(ddof: int, rollout: tuple[Tensor, Tensor]) -> None:
    rewards, group = rollout
    batch_std = float(rewards.std(correction=ddof)) if len(rewards) > ddof else 0.0
    by_batch = group_relative(rewards, group, scale="batch", ddof=ddof)
    by_group = group_relative(rewards, group, scale="group", ddof=ddof)
    for rows in members(group):
        mean, std = (rewards[rows].mean(), rewards[rows].std(correction=ddof)) if len(rows) > 1 else (0.0, 1.0)
        torch.testing.assert_close(by_batch[rows], (rewards[rows] - mean) / (batch_std + 1e-6), rtol=0, atol=1e-8)
        torch.testing.assert_close(by_group[rows], (rewards[rows] - mean) / (std + 1e-6), rtol=0, atol=1e-8)


def test_group_relative_of_equal_rewards_is_zero_in_float32() -> None:
    """Rounding of the mean, divided by a std that is rounding too, must not become an advantage."""
    for reward in (0.1, 0.7, 1000.1):
        for size in (3, 7, 13):
            rewards = torch.full((size,), reward)
            assert group_relative(rewards, torch.zeros(size, dtype=torch.int64)).abs().max() < 1e-6


def test_group_relative_refuses_what_it_cannot_mean() -> None:
    rewards, group = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="scale='std'"):
        group_relative(rewards, group, scale="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\)"):
        group_relative(rewards, group[:3])
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        leave_one_out(rewards.view(2, 2), group.view(2, 2))


@given(rollout=rollouts(unscored=True))
def test_leave_one_out_equals_the_loop(rollout: tuple[Tensor, Tensor]) -> None:
    rewards, group = rollout
    got = leave_one_out(rewards, group)
    for i, (reward, label) in enumerate(zip(rewards.tolist(), group.tolist(), strict=True)):
        others = [r for j, r in enumerate(rewards.tolist()) if group[j] == label and j != i]
        scored = [r for r in others if not math.isnan(r)]
        if math.isnan(reward) or (others and not scored):
            expected = 0.0
        else:
            expected = reward - (sum(scored) / len(scored) if scored else 0.0)
        assert float(got[i]) == pytest.approx(expected, abs=1e-10)


@given(rollout=rollouts(unscored=True), shift=grid, seed=st.integers(0, 2**31))
def test_leave_one_out_symmetries(rollout: tuple[Tensor, Tensor], shift: float, seed: int) -> None:
    rewards, group = rollout
    advantages = leave_one_out(rewards, group)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(leave_one_out(rewards[order], group[order]), advantages[order], **EXACT)
    for rows in members(group):
        if len(rows) > 1:
            assert abs(float(advantages[rows].sum())) < 1e-10
            torch.testing.assert_close(leave_one_out(rewards[rows] + shift, group[rows]), advantages[rows], **EXACT)
        elif not rewards[rows].isnan():
            assert torch.equal(advantages[rows], rewards[rows])


def test_leave_one_out_is_the_centered_reward_times_n_over_n_minus_one() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    # mean 3/5; 1 - 2/4 = 1/2 = (1 - 3/5) 5/4 and 0 - 3/4 = (0 - 3/5) 5/4
    expected = torch.tensor([0.5, -0.75, -0.75, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards, torch.zeros(5, dtype=torch.int64)), expected, **EXACT)


@st.composite
def masked_values(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(values [n], mask [n]) with at least two different valid values; what is masked out may be NaN or huge."""
    valid = draw(st.lists(grid, min_size=2, max_size=8).filter(lambda x: len(set(x)) > 1))
    masked = draw(st.lists(st.sampled_from([math.nan, math.inf, 1e30, 0.0]), max_size=4))
    order = draw(st.permutations(range(len(valid) + len(masked))))
    values, mask = valid + masked, [True] * len(valid) + [False] * len(masked)
    return torch.tensor([values[i] for i in order], dtype=torch.float64), torch.tensor([mask[i] for i in order])


@given(case=masked_values())
def test_whiten_has_mean_0_and_variance_1(case: tuple[Tensor, Tensor]) -> None:
    values, mask = case
    white = whiten(values, mask)
    variance = float(values[mask].var())
    assert abs(float(white[mask].mean())) < 1e-10
    assert float(white[mask].var()) == pytest.approx(variance / (variance + 1e-8), abs=1e-10)
    assert torch.equal(white[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


@given(case=masked_values(), shift=grid, seed=st.integers(0, 2**31))
def test_whiten_symmetries(case: tuple[Tensor, Tensor], shift: float, seed: int) -> None:
    values, mask = case
    white = whiten(values, mask)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(whiten(values[order], mask[order]), white[order], **EXACT)
    torch.testing.assert_close(whiten(values + shift, mask), white, **EXACT)
    torch.testing.assert_close(whiten(values[mask]), white[mask], **EXACT)
    scaled = whiten(values, mask, center=False)
    assert float(scaled[mask].mean()) == pytest.approx(float(values[mask].mean()), abs=1e-10)
    assert float(scaled[mask].var()) == pytest.approx(float(white[mask].var()), abs=1e-10)


def test_whiten_of_fewer_than_two_values_only_centers() -> None:
    values, mask = torch.tensor([[3.0, 5.0]]), torch.tensor([[True, False]])
    assert torch.equal(whiten(values, mask), torch.zeros(1, 2))
    assert torch.equal(whiten(values, mask, center=False), torch.tensor([[3.0, 0.0]]))
    assert torch.equal(whiten(values, torch.zeros_like(mask)), torch.zeros(1, 2))
    assert whiten(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("center", (True, False))
@given(case=masked_values(), split=st.integers(0, 12))
def test_whiten_over_ranks_is_that_of_the_whole(center: bool, case: tuple[Tensor, Tensor], split: int) -> None:
    values, mask = case
    packed = torch.stack([values, mask.double()])
    parts = on_ranks(
        [packed[:, :split], packed[:, split:]], lambda x, reduce: whiten(x[0], x[1], center=center, reduce=reduce)
    )
    torch.testing.assert_close(torch.cat(parts), whiten(values, mask, center=center), **EXACT)


@pytest.mark.parametrize("eps", (1e-8, 1e-30))
@pytest.mark.parametrize("value", (0.1, -0.7, 1000.1, 1e20))
def test_whiten_of_equal_values_is_zero_in_float32(value: float, eps: float) -> None:
    """Rounding of the mean must not be blown up by 1 / sqrt(eps)."""
    for size in (3, 7, 1001):
        assert torch.equal(whiten(torch.full((size,), value), eps=eps), torch.zeros(size))


def test_whiten_survives_a_large_mean_in_float32() -> None:
    values = 4096 + torch.arange(-8.0, 9.0) / 8  # exact in float32
    torch.testing.assert_close(whiten(values), whiten(values - 4096), rtol=0, atol=1e-6)
