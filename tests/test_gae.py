"""Laws of the generalized advantages, over ragged responses with holes, against a loop over tokens."""

import math

import pytest
import torch
from torch import Tensor

from rlvr.advantages import at_last_token, gae, length_adaptive_lam

EXACT = {"rtol": 0.0, "atol": 1e-10}
GRID = [(gamma, lam) for gamma in (0.0, 0.9, 1.0) for lam in (0.0, 0.95, 1.0)]


def rollout(length: int = 37, rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, values, mask) of ragged rows with holes: row 1 is empty, row 2 has one token, row 3 has all."""
    draw = torch.Generator().manual_seed(length)
    rewards, values = torch.randn(2, rows, length, generator=draw, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
    mask = (torch.rand(rows, length, generator=draw) < 0.8) & (torch.arange(length) < lengths)
    mask[1], mask[2], mask[3] = False, False, True
    mask[2, length // 2] = True
    return rewards, values, mask


def loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: list[float]) -> tuple[Tensor, Tensor]:
    """Token by token from the end, in float64."""
    advantages, returns = torch.zeros_like(values, dtype=torch.float64), torch.zeros_like(values, dtype=torch.float64)
    for i in range(len(mask)):
        following = advantage = 0.0
        for t in reversed(mask[i].nonzero()[:, 0].tolist()):
            value = float(values[i, t])
            delta = float(rewards[i, t]) + gamma * following - value
            advantage = delta + gamma * lam[i] * advantage
            following = value
            advantages[i, t], returns[i, t] = advantage, advantage + value
    return advantages, returns


@pytest.mark.parametrize("length", (1, 2, 37, 64, 65))
@pytest.mark.parametrize(("gamma", "lam"), GRID)
def test_gae_is_the_loop(gamma: float, lam: float, length: int) -> None:
    case = rollout(length)
    for got, expected in zip(gae(*case, gamma=gamma, lam=lam), loop(*case, gamma, [lam] * 7), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("lam", (0.99, 1.0))
def test_gae_is_the_loop_for_long_responses(lam: float) -> None:
    case = rollout(4096, rows=4)
    for got, expected in zip(gae(*case, lam=lam), loop(*case, 1.0, [lam] * 4), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


def test_gae_takes_a_lam_for_each_response() -> None:
    case, lam = rollout(), torch.linspace(0, 1, 7, dtype=torch.float64)
    for got, expected in zip(gae(*case, gamma=0.9, lam=lam), loop(*case, 0.9, lam.tolist()), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    for got, expected in zip(gae(*case, lam=torch.full((7,), 0.5)), gae(*case, lam=0.5), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("rewards_type", "values_type", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.int64, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_gae_is_rounded_once(rewards_type: torch.dtype, values_type: torch.dtype, expected: torch.dtype) -> None:
    """Half an ulp from float64, however long the response."""
    rewards, values, mask = rollout(4096, rows=4)
    rewards, values = rewards.to(rewards_type), values.to(values_type)
    exact = gae(rewards.double(), values.double(), mask, lam=0.999)
    for got, reference in zip(gae(rewards, values, mask, lam=0.999), exact, strict=True):
        assert got.dtype == expected
        assert torch.equal(got, reference.to(expected))


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -1e30))
def test_gae_never_reads_masked_places(garbage: float) -> None:
    rewards, values, mask = rollout()
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    dirty = gae(rewards.where(mask, garbage), values.where(mask, -garbage), mask.float(), gamma=0.9, lam=0.9)
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


def test_gae_of_the_valid_tokens_alone_is_the_same() -> None:
    """Masked positions, wherever they are, only move the others; nor does one response touch another, bit for bit."""
    rewards, values, mask = rollout()
    advantages, returns = gae(rewards, values, mask, lam=0.95)
    for i in range(len(mask)):
        packed = (rewards[i][mask[i]][None], values[i][mask[i]][None], torch.ones(1, int(mask[i].sum())))
        alone = gae(*packed, lam=0.95)
        assert torch.equal(alone[0][0], advantages[i][mask[i]])
        assert torch.equal(alone[1][0], returns[i][mask[i]])


def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    kept = rewards.where(mask, 0.0)
    return kept.flip(1).cumsum(1).flip(1).where(mask, 0.0)


def test_gae_at_lam_1_is_the_reward_to_go_less_the_value() -> None:
    rewards, values, mask = rollout()
    advantages, returns = gae(rewards, values, mask)
    torch.testing.assert_close(returns, reward_to_go(rewards, mask), **EXACT)
    torch.testing.assert_close(advantages, (reward_to_go(rewards, mask) - values).where(mask, 0.0), **EXACT)
    torch.testing.assert_close(gae(rewards, torch.zeros_like(values), mask)[0], returns, **EXACT)


def test_gae_at_lam_0_is_the_one_step_error() -> None:
    # A hole at t = 1: t = 0 bootstraps from the value 3 at t = 2. 1 + 0.5 * 3 - 2 = 0.5; 4 + 0.5 * 5 - 3 = 3.5; 6 - 5
    rewards, values = torch.tensor([[1.0, 9.0, 4.0, 6.0]]), torch.tensor([[2.0, 9.0, 3.0, 5.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 0, 1, 1]]), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[0.5, 0.0, 3.5, 1.0]]
    assert returns.tolist() == [[2.5, 0.0, 6.5, 6.0]]


@pytest.mark.parametrize("lam", (0.0, 0.5, 1.0))
def test_gae_of_a_perfect_critic_is_zero(lam: float) -> None:
    rewards, _, mask = rollout()
    values = reward_to_go(rewards, mask)
    advantages, returns = gae(rewards, values, mask, lam=lam)
    torch.testing.assert_close(advantages, torch.zeros_like(rewards), **EXACT)
    torch.testing.assert_close(returns, values, **EXACT)


@pytest.mark.parametrize(("gamma", "lam"), GRID)
def test_gae_is_linear_in_the_rewards(gamma: float, lam: float) -> None:
    rewards, values, mask = rollout()
    more = rewards.flip(0)
    both, _ = gae(rewards + 2 * more, values, mask, gamma=gamma, lam=lam)
    first, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    second, _ = gae(more, torch.zeros_like(values), mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(both, first + 2 * second, **EXACT)


def test_gae_is_a_target_without_gradient() -> None:
    rewards, values, mask = rollout()
    assert not any(x.requires_grad for x in gae(rewards, values.requires_grad_(), mask))


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0), (3, 5)))
def test_gae_of_nothing_is_zero(shape: tuple[int, int]) -> None:
    blank = torch.full(shape, math.nan)
    for got in gae(blank, blank, torch.zeros(shape), lam=0.9):
        assert torch.equal(got, torch.zeros(shape))


def test_gae_refuses_what_it_cannot_mean() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"must all be \(B, T\), got \(2, 3\), \(2, 2\), \(2, 3\)"):
        gae(x, x[:, :2], mask)
    with pytest.raises(ValueError, match=r"must all be \(B, T\)"):
        gae(x[0], x[0], mask[0])
    with pytest.raises(ValueError, match=r"gamma=1\.5: must lie in \[0, 1\]"):
        gae(x, x, mask, gamma=1.5)
    with pytest.raises(ValueError, match=r"lam=-0\.5: must lie in \[0, 1\]"):
        gae(x, x, mask, lam=torch.tensor([0.5, -0.5]))
    with pytest.raises(ValueError, match="lam=nan"):
        gae(x, x, mask, lam=math.nan)
    with pytest.raises(ValueError, match=r"lam has shape \(3,\): must be a number or \(2,\)"):
        gae(x, x, mask, lam=torch.ones(3))
    bad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.inf]])
    with pytest.raises(ValueError, match=r"rewards\[1, 2\]=inf: must be finite"):
        gae(bad, x, mask)
    with pytest.raises(ValueError, match=r"values\[1, 2\]=inf: must be finite"):
        gae(x, bad, mask)


def test_at_last_token_rewards_the_last_valid_token() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    placed = at_last_token(torch.tensor([2.0, -3.0, math.nan, 0.5], dtype=torch.float64), mask)
    expected = [[0, 0, 0, 2, 0], [0, 0, 0, 0, -3], [0, 0, 0, 0, 0], [0.5, 0, 0, 0, 0]]
    assert torch.equal(placed, torch.tensor(expected, dtype=torch.float64))
    assert at_last_token(torch.zeros(2), torch.zeros(2, 0)).shape == (2, 0)
    for scores in (torch.zeros(1), torch.zeros(4, 1)):
        with pytest.raises(ValueError, match=r"scores must be \(B,\) and mask \(B, T\)"):
            at_last_token(scores, mask)


def test_length_adaptive_lam_by_hand() -> None:
    mask = torch.arange(400) < torch.tensor([[0], [1], [20], [40], [400]])
    got = length_adaptive_lam(mask, alpha=0.05)
    # 1 - 1 / 0, 1 - 1 / 0.05 and 1 - 1 / 1 are at most 0; 1 - 1 / 2; 1 - 1 / 20
    torch.testing.assert_close(got, torch.tensor([0, 0, 0, 0.5, 0.95], dtype=torch.float64), **EXACT)
    assert torch.equal(length_adaptive_lam(mask.flip(1).float(), alpha=0.05), got)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"alpha={alpha}: must be > 0"):
            length_adaptive_lam(mask, alpha)
