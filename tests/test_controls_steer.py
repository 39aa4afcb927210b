"""STEER beyond the contract: what Omega estimates, how weights follow from it, and what they are for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from control_cases import CASES, batch
from test_controls import decide, pick
from test_controls_meaning import SEEDS, entropy_after
from torch import Tensor

from rlvr.controls import apply
from rlvr.controls.steer import Form, Steer, estimated_change
from rlvr.surrogates import SURROGATES, PpoClip
from rlvr.theory import discriminator, entropy, mean_discriminator
from rlvr.types import LocalReduce, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"form": "full"},
    {"form": "released"},
    {"form": "released", "floor": 0.02, "min_weight": 0.8},
    {"mapping": "linear", "min_weight": 0.8, "max_weight": 1.2},
)


def weight_of(control: Steer, tokens: Tokens) -> Tensor:
    weight = decide(control, tokens).coefficients.weight
    assert weight is not None
    return weight


def policies(seed: int, states: int = 50, actions: int = 6) -> tuple[Tensor, Tensor, Tokens]:
    """(logits [S, V], sampled actions [S], one token per state whose old policy is another one)"""
    generator = torch.Generator().manual_seed(seed)
    logits, moved = torch.randn(2, states, actions, generator=generator, dtype=torch.float64)
    old = logits + 0.1 * moved
    action = torch.multinomial(old.softmax(1), 1, generator=generator)
    tokens = Tokens(
        logps=logits.log_softmax(1).gather(1, action)[:, 0],
        old_logps=old.log_softmax(1).gather(1, action)[:, 0],
        advantages=torch.randn(states, generator=generator, dtype=torch.float64),
        sequence=torch.arange(states),
        num_sequences=states,
        entropy=entropy(logits),
        mean_discriminator=mean_discriminator(logits),
    )
    return logits, action[:, 0], tokens


def slope(logits: Tensor, step: Tensor) -> Tensor:
    """d/dh H(logits + h step) at h = 0, by differentiating the entropy itself, [S]."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(1)
    (grad,) = torch.autograd.grad(-(logp.exp() * logp).sum(), logits)
    return (grad * step).sum(1)


def test_full_form_is_the_entropy_slope_along_the_tokens_own_gradient_step() -> None:
    for seed in range(5):
        logits, action, tokens = policies(seed)
        leaf = logits.clone().requires_grad_()
        logps = leaf.log_softmax(1).gather(1, action[:, None])[:, 0]
        ratio = (logps - tokens.old_logps).exp()
        (step,) = torch.autograd.grad((ratio * tokens.advantages).sum(), leaf)
        torch.testing.assert_close(estimated_change(tokens, "full"), slope(logits, step), **EXACT)
        own = torch.zeros_like(step).scatter(1, action[:, None], step.gather(1, action[:, None]))
        torch.testing.assert_close(estimated_change(tokens, "theorem"), slope(logits, own), **EXACT)


def test_released_form_is_the_theorems_over_the_current_probability() -> None:
    tokens = policies(0)[2]
    expected = estimated_change(tokens, "theorem") / tokens.logps.exp()
    torch.testing.assert_close(estimated_change(tokens, "released"), expected, **EXACT)


@pytest.mark.parametrize("form", ("theorem", "released", "full"))
def test_omega_is_finite_for_tokens_that_are_certain_or_impossible(form: Form) -> None:
    logps = torch.tensor([0.0, -1e-12, -50.0, -800.0, -float("inf")], dtype=torch.float64)
    for old_logps in (logps, torch.full_like(logps, -60.0), torch.zeros_like(logps)):
        tokens = Tokens(
            logps=logps,
            old_logps=old_logps.clamp(min=-1e3),
            advantages=torch.ones_like(logps),
            sequence=torch.arange(5),
            num_sequences=5,
            entropy=torch.tensor([0.0, 1e-11, 1.0, 1.0, 1.0], dtype=torch.float64),
            mean_discriminator=torch.zeros_like(logps),
        )
        omega = estimated_change(tokens, form)
        assert omega.isfinite().all() and omega[4] == 0


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_weights_equal_a_plain_loop(setting: dict[str, Any]) -> None:
    control, surrogate = Steer(**setting), PpoClip()
    for seed in range(3):
        tokens = batch(seed)
        clipped = surrogate.clipped(surrogate.ratio(tokens), tokens).any.tolist()
        assert any(clipped)
        acts = [control.form == "released" or not c for c in clipped]
        omega = estimated_change(tokens, control.form).abs().tolist()
        acting = [x for x, a in zip(omega, acts, strict=True) if a]
        low, high = min(acting), max(acting)
        expected = []
        for x, a in zip(omega, acts, strict=True):
            if not a:
                expected.append(1.0)
            elif control.max_weight is None:
                expected.append(control.min_weight ** (x / max(high, control.floor or 0.0)))
            else:
                share = (x - low) / (high - low)
                expected.append(control.max_weight * (1 - share) + control.min_weight * share)
        torch.testing.assert_close(weight_of(control, tokens), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_largest_omega_gets_exactly_the_smallest_weight() -> None:
    for seed in range(5):
        tokens = batch(seed)
        on_policy = replace(tokens, old_logps=tokens.logps.detach())
        weight = weight_of(Steer(min_weight=0.7), on_policy)
        assert weight.min() == 0.7 and weight.max() <= 1
        assert weight.argmin() == estimated_change(on_policy, "theorem").abs().argmax()


@pytest.mark.parametrize("form", ("theorem", "full", "released"))
@pytest.mark.parametrize("mapping", ({}, {"mapping": "linear", "max_weight": 1.2}), ids=("exp", "linear"))
def test_nothing_to_compare_leaves_every_weight_at_exactly_1(form: Form, mapping: dict[str, Any]) -> None:
    tokens, control = batch(), Steer(form=form, **mapping)
    still = replace(tokens, advantages=torch.zeros_like(tokens.advantages))
    assert (weight_of(control, still) == 1).all()
    if mapping:
        assert (weight_of(control, pick(tokens, torch.tensor([3, 3, 3]))) == 1).all()


def test_clipped_tokens_set_no_maximum_and_keep_weight_1_except_in_the_released_form() -> None:
    """The clipped token has by far the largest Omega."""
    tokens = pick(policies(0)[2], torch.arange(4))
    logps = torch.tensor([0.5, 0.3, 0.2, 0.4], dtype=torch.float64).log()
    old = logps - torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)  # the first ratio is e^0.5 > 1.2
    tokens = replace(tokens, logps=logps, old_logps=old, advantages=torch.tensor([50.0, 1.0, -1.0, 2.0]).double())
    rest = pick(tokens, torch.arange(1, 4))
    for setting in ({}, {"form": "full"}, {"mapping": "linear", "max_weight": 1.2}):
        weight = weight_of(Steer(**setting), tokens)
        assert weight[0] == 1 and torch.equal(weight[1:], weight_of(Steer(**setting), rest))
    released = weight_of(Steer(form="released"), tokens)
    assert released[0] == 0.7 and not torch.equal(released[1:], weight_of(Steer(form="released"), rest))


def test_weights_do_not_depend_on_the_size_of_advantages_unless_a_floor_is_active() -> None:
    tokens = batch(2)
    small = replace(tokens, advantages=tokens.advantages / 1024)
    assert torch.equal(weight_of(Steer(), tokens), weight_of(Steer(), small))
    floored = weight_of(Steer(floor=0.5), small)
    assert floored.min() > 0.99 and torch.equal(floored == 1, weight_of(Steer(), small) == 1)


def test_a_surrogate_without_a_bound_excludes_no_token() -> None:
    tokens, surrogate = batch(1), SURROGATES["unclipped"]()
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
    weight = apply([Steer()], tokens, clipped, LocalReduce()).coefficients.weight
    omega = estimated_change(tokens, "theorem").detach().abs()
    torch.testing.assert_close(weight, 0.7 ** (omega / omega.max()), **EXACT)


@pytest.mark.parametrize(
    ("setting", "said"),
    (
        ({"max_weight": 1.2}, "max_weight=1.2: only mapping='linear'"),
        ({"mapping": "linear"}, "max_weight=None: mapping='linear' needs a number above min_weight=0.7"),
        ({"mapping": "linear", "max_weight": 0.5}, "max_weight=0.5: .* above min_weight=0.7"),
        ({"mapping": "linear", "max_weight": float("inf")}, "max_weight=inf"),
        ({"mapping": "linear", "max_weight": 1.2, "floor": 0.02}, "floor=0.02: only mapping='exp'"),
        ({"floor": 0.0}, "floor=0.0: must be a number above 0"),
        ({"min_weight": float("nan")}, "min_weight=nan"),
    ),
)
def test_settings_that_contradict_themselves_are_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Steer(**setting)


@pytest.mark.parametrize("form", ("theorem", "full", "released"))
def test_every_form_leaves_more_entropy(form: Form) -> None:
    case = replace(CASES["steer"], active=Steer(form=form))
    gained = [
        entropy_after(case, seed, controlled=True) - entropy_after(case, seed, controlled=False)
        for seed in range(SEEDS)
    ]
    assert sum(x > 0 for x in gained) >= 20, gained


def test_steer_steadies_entropy_more_than_a_smaller_step_does() -> None:
    """Mean |dH| of states after one token's update each, against the same mean weight on all tokens."""
    for seed in range(20):
        logits, action, tokens = policies(seed, states=400)
        tokens = replace(tokens, old_logps=tokens.logps)
        weight = weight_of(Steer(form="full"), tokens)
        one = torch.nn.functional.one_hot(action, logits.size(1)) - logits.softmax(1)

        def moved(weight: Tensor, one: Tensor = one, logits: Tensor = logits, tokens: Tokens = tokens) -> Tensor:
            step = 0.3 * (weight * tokens.advantages)[:, None] * one
            return (entropy(logits + step) - entropy(logits)).abs().mean()

        assert moved(weight) < moved(weight.mean().expand_as(weight)) < moved(torch.ones_like(weight))


def test_discriminator_of_the_token_is_what_the_forms_rest_on() -> None:
    """S (1 - pi) and S - E_S, from the distribution's own S."""
    logits, action, tokens = policies(3)
    s = discriminator(logits).gather(1, action[:, None])[:, 0]
    step = (tokens.logps - tokens.old_logps).exp() * tokens.advantages
    torch.testing.assert_close(estimated_change(tokens, "theorem"), -step * (1 - tokens.logps.exp()) * s, **EXACT)
    torch.testing.assert_close(estimated_change(tokens, "full"), -step * (s - mean_discriminator(logits)), **EXACT)


def test_steer_leaves_tokens_beyond_the_dual_clip_alone() -> None:
    """Such a token has no gradient: it neither sets the maximum nor gets a weight."""
    logps = torch.tensor([-0.2, -1.0, -1.5], dtype=torch.float64)
    old = torch.tensor([-0.2 - math.log(15), -1.1, -1.4], dtype=torch.float64)
    tokens = Tokens(
        logps=logps,
        old_logps=old,
        advantages=torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64),
        sequence=torch.arange(3),
        num_sequences=3,
        entropy=torch.tensor([0.8, 1.2, 0.9], dtype=torch.float64),
    )
    surrogate = PpoClip(low=0.2, high=0.28, dual_clip=10.0)
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
    assert clipped.dead.tolist() == [True, False, False] and not clipped.any.any()
    weight = apply([Steer()], tokens, clipped, LocalReduce()).coefficients.weight
    assert weight is not None and weight[0] == 1 and weight.min() == 0.7
