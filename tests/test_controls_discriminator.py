"""Clip_B and Clip_V beyond the contract: exactly which tokens leave the loss, and what these would have done."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from control_cases import batch
from test_controls import decide, pick
from torch import Tensor

from rlvr.controls import Control
from rlvr.controls.discriminator import ClipB, ClipV, discriminator, spread
from rlvr.controls.steer import estimated_change
from rlvr.objective import policy_loss
from rlvr.surrogates import PpoClip
from rlvr.types import Coefficients, LocalReduce, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}


def dropped(control: Control, tokens: Tokens) -> Tensor:
    keep = decide(control, tokens).coefficients.keep
    assert keep is not None
    return ~keep


def centered(tokens: Tokens) -> Tensor:
    """D = E_S - S."""
    assert tokens.mean_discriminator is not None
    return (tokens.mean_discriminator - discriminator(tokens)).detach()


def flat(s: list[float], advantages: list[float], key: list[int] | None = None) -> Tokens:
    """Tokens with these S (E_S = 0), by certain tokens: pi = 1, so that S = H."""
    n = len(s)
    zeros = torch.zeros(n, dtype=torch.float64)
    return Tokens(
        logps=zeros,
        old_logps=zeros,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sequence=torch.arange(n),
        num_sequences=n,
        entropy=torch.tensor(s, dtype=torch.float64),
        mean_discriminator=zeros,
        key=torch.tensor(range(n) if key is None else key),
    )


def test_spread_is_accurate_far_from_zero() -> None:
    """float64 keeps 2^-53 of a value: the sum of squares minus the squared mean would lose the spread altogether."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-1000, 1001, (5000,), generator=generator).double() / 1024
    mean, std, count = spread(noise + 2.0**30, LocalReduce())
    assert count == 5000
    torch.testing.assert_close(mean - 2.0**30, noise.mean(), rtol=0.0, atol=1e-6)  # 2^30 leaves 2e-7
    torch.testing.assert_close(std, noise.std(correction=0), **EXACT)


@pytest.mark.parametrize("mu", (0.0, 0.5, 1.0, 2.5))
def test_clip_b_drops_the_punished_tokens_of_the_lower_tail(mu: float) -> None:
    for seed in range(3):
        tokens = batch(seed)
        p = tokens.logps.detach().exp().tolist()
        s = [
            x * (h + lp)
            for x, h, lp in zip(p, tokens.entropy.tolist(), tokens.logps.tolist(), strict=True)  # type: ignore[union-attr]
        ]
        mean = sum(s) / len(s)
        std = (sum((x - mean) ** 2 for x in s) / len(s)) ** 0.5
        expected = [a < 0 and x - mean < -mu * std for x, a in zip(s, tokens.advantages.tolist(), strict=True)]
        assert dropped(ClipB(mu=mu), tokens).tolist() == expected
        assert mu > 1 or any(expected)


@pytest.mark.parametrize(("mu", "fraction"), ((0.5, 1.0), (0.5, 0.1), (0.0, 0.013), (0.3, 0.0), (30.0, 1.0)))
def test_clip_v_drops_the_worst_candidates(mu: float, fraction: float) -> None:
    for seed in range(3):
        tokens = batch(seed)
        d = centered(tokens)
        std = float((d - d.mean()).square().mean().sqrt())
        candidates = [i for i in range(len(d)) if tokens.advantages[i] < 0 and d[i] > mu * std]
        most = max(int(fraction * len(d)), 1)
        worst = sorted(candidates, key=lambda i, d=d: float(d[i]), reverse=True)[:most]
        found = dropped(ClipV(mu=mu, max_fraction=fraction), tokens)
        assert sorted(worst) == found.nonzero().flatten().tolist()
        assert (len(worst) > 0) == (mu < 30)


def test_clip_v_threshold_is_not_centered() -> None:
    """D = (-1, -1, -1, -3): the last is 2 below and the others 2/3 above their mean of -1.5, yet none is above 0."""
    tokens = flat([1.0, 1.0, 1.0, 3.0], [-1.0] * 4)
    assert not dropped(ClipV(mu=0.0, max_fraction=1.0), tokens).any()
    shifted = replace(tokens, mean_discriminator=torch.full((4,), 2.0, dtype=torch.float64))  # D = (1, 1, 1, -1)
    assert dropped(ClipV(mu=0.0, max_fraction=1.0), shifted).tolist() == [True, True, True, False]


def test_every_token_that_clip_v_drops_would_have_lowered_entropy() -> None:
    for seed in range(5):
        tokens = batch(seed)
        lost = dropped(ClipV(mu=0.0, max_fraction=1.0), tokens)
        change = estimated_change(tokens, "full").detach()
        assert lost.any() and (change[lost] < 0).all()
        assert torch.equal(lost, (change < 0) & (tokens.advantages < 0))


@pytest.mark.parametrize("control", (ClipB(mu=0.0), ClipV(mu=0.0, max_fraction=1.0)), ids=lambda c: c.name)
def test_only_punished_tokens_are_dropped(control: Control) -> None:
    for seed in range(5):
        tokens = batch(seed)
        advantages = tokens.advantages.clone()
        advantages[::3] = 0.0
        lost = dropped(control, replace(tokens, advantages=advantages))
        assert lost.any() and (advantages[lost] < 0).all()
        assert not dropped(control, replace(tokens, advantages=advantages.abs())).any()


@pytest.mark.parametrize("control", (ClipB(mu=0.0), ClipV(mu=0.0, max_fraction=1.0)), ids=lambda c: c.name)
def test_no_spread_drops_nothing(control: Control) -> None:
    """0.1 + 0.2 and 0.3 differ by rounding alone: a standard deviation of 3e-17."""
    tokens = flat([0.1 + 0.2, 0.3, 0.3, 0.3], [-1.0] * 4)
    tokens = replace(tokens, mean_discriminator=torch.ones(4, dtype=torch.float64))
    assert discriminator(tokens).unique().numel() == 2
    assert not dropped(control, tokens).any()


def test_clip_b_keeps_a_token_exactly_at_the_threshold() -> None:
    """S = (0, 2): mean 1, standard deviation 1, so that S - mean = -1 is not below -mu std for mu = 1."""
    tokens = flat([0.0, 2.0], [-1.0, -1.0])
    assert not dropped(ClipB(mu=1.0), tokens).any()
    assert dropped(ClipB(mu=1.0 - 2**-40), tokens).tolist() == [True, False]


def test_larger_mu_drops_a_part_of_what_a_smaller_one_drops() -> None:
    tokens = batch()
    for make in (lambda mu: ClipB(mu=mu), lambda mu: ClipV(mu=mu, max_fraction=1.0)):
        sets = [dropped(make(mu), tokens) for mu in (0.0, 0.3, 0.8, 1.5)]
        assert all((big | ~small).all() for big, small in pairwise(sets))
        assert sets[0].sum() > sets[-1].sum()


def test_clip_v_cap_counts_all_tokens_and_ties_go_to_the_larger_key() -> None:
    """A cap of int(0.25 * 12) = 3 of four equal candidates: the smallest key stays."""
    s, advantages = [0.0] * 4 + [5.0] * 8, [-1.0] * 4 + [1.0] * 8
    tokens = flat(s, advantages, key=[7, 2, 9, 4, *range(20, 28)])
    tokens = replace(tokens, mean_discriminator=torch.tensor([9.0] * 4 + [0.0] * 8, dtype=torch.float64))
    lost = dropped(ClipV(mu=0.5, max_fraction=0.25), tokens)
    assert lost.tolist() == [True, False, True, True] + [False] * 8
    few = pick(tokens, torch.arange(4))
    assert dropped(ClipV(mu=0.0, max_fraction=1e-4), replace(few, entropy=few.entropy + few.key)).sum() == 1  # type: ignore[operator]


@pytest.mark.parametrize("control", (ClipB(mu=0.5), ClipV(mu=0.5, max_fraction=0.1)), ids=lambda c: c.name)
def test_dropped_tokens_leave_the_denominator(control: Control) -> None:
    tokens, surrogate = batch(), PpoClip()
    coefficients = decide(control, tokens).coefficients
    assert coefficients.keep is not None
    rest = pick(tokens, coefficients.keep.nonzero().flatten())
    loss = policy_loss(tokens, surrogate, coefficients, mode="token_mean")
    assert torch.equal(loss, policy_loss(rest, surrogate, Coefficients(), mode="token_mean"))
