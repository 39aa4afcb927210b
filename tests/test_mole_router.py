"""Laws of routing: what every rule does with every token, and what each is for."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr.mole.router import (
    Routing,
    hybrid_route,
    load_balance,
    masked_mean,
    soft_route,
    switch_route,
    top_k_route,
    top_p_route,
    tsallis_entropy,
    z_loss,
)
from rlvr.mole.routers import ROUTERS, Router, auxiliary_loss, build_router, options

RULES: dict[str, Callable[[Tensor], Routing]] = {
    "release": lambda p: hybrid_route(p, min_k=1),
    "reach": lambda p: hybrid_route(p, min_k=1, rule="reach"),
    "top_k": lambda p: top_k_route(p, 1),
    "top_p": lambda p: top_p_route(p, 0.8),
    "switch": switch_route,
    "soft": soft_route,
}
RENORMALIZED = ("reach", "top_k")
every_rule = pytest.mark.parametrize("name", RULES)
some_logits = st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=6)


def drawn(seed: int = 0, tokens: int = 50, experts: int = 6, scale: float = 2.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, experts, generator=g, dtype=torch.float64)).softmax(-1)


@every_rule
@given(logits=some_logits)
def test_weights_are_probabilities_of_what_is_selected(name: str, logits: list[list[float]]) -> None:
    probs = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    routing = RULES[name](probs)
    assert (routing.weight >= 0).all() and (routing.weight[~routing.selected] == 0).all()
    assert routing.selected.any(-1).all()
    assert torch.equal(probs.masked_fill(~routing.selected, -1.0).amax(-1), probs.amax(-1))  # the likeliest is in
    total = routing.weight.sum(-1)
    if name in RENORMALIZED:
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert torch.equal(routing.weight[routing.selected], probs[routing.selected])


@every_rule
def test_a_token_is_routed_alike_in_any_batch(name: str) -> None:
    probs = drawn()
    whole = RULES[name](probs).weight
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(1))
    assert torch.equal(RULES[name](probs[order]).weight, whole[order])
    assert torch.equal(torch.cat([RULES[name](row.unsqueeze(0)).weight for row in probs]), whole)
    assert torch.equal(RULES[name](probs.view(5, 10, 6)).weight, whole.view(5, 10, 6))


@every_rule
def test_gradients_reach_the_router_through_what_is_selected_alone(name: str) -> None:
    probs = drawn().requires_grad_()
    routing = RULES[name](probs)
    (grad,) = torch.autograd.grad((routing.weight * torch.arange(1.0, 7.0)).sum(), probs)
    assert grad.isfinite().all() and (grad[~routing.selected] == 0).all()
    assert (grad.abs() > 1e-9).any() == (name != "top_k")  # one renormalized expert always weighs 1


def test_release_keeps_what_stays_within_top_p_and_reach_what_reaches_it() -> None:
    """.5 + .3 = .8 > .75: the release leaves the second out, but for min_k; reach takes it in."""
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64)
    release = hybrid_route(probs, threshold=1.0, min_k=1)
    assert release.weight.tolist() == [[0.5, 0.0, 0.0, 0.0]]
    assert hybrid_route(probs, threshold=1.0, min_k=2).weight.tolist() == [[0.5, 0.3, 0.0, 0.0]]
    reach = hybrid_route(probs, threshold=1.0, min_k=1, rule="reach")
    torch.testing.assert_close(reach.weight, torch.tensor([[0.625, 0.375, 0.0, 0.0]], dtype=torch.float64))


def test_uncertain_tokens_go_to_all_experts() -> None:
    probs = torch.tensor([[0.3, 0.25, 0.25, 0.2], [0.7, 0.1, 0.1, 0.1]])
    entropy = tsallis_entropy(probs, 1.1, normalized=True)
    assert entropy[0] > 0.9 > entropy[1]
    assert hybrid_route(probs).selected.sum(-1).tolist() == [4, 2]
    assert hybrid_route(probs, threshold=1.0).selected.sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("experts", [6, 8])
def test_threshold_1_is_never_soft(experts: int) -> None:
    """In float32 the normalized entropy of an even choice may round to more than 1."""
    probs = (1e-4 * torch.randn(1000, experts, generator=torch.Generator().manual_seed(0))).softmax(-1)
    for p in (probs, torch.full_like(probs, 1 / experts)):
        assert not hybrid_route(p, threshold=1.0, min_k=2).selected.all(-1).any()


def test_ties_are_broken_by_the_number_of_the_expert() -> None:
    assert top_k_route(torch.full((2, 4), 0.25), 2).selected.tolist() == [[True, True, False, False]] * 2


# ------------------------------------------------------------------------------------------------ entropy


@pytest.mark.parametrize("q", [0.3, 1.0, 1.1, 2.0, 5.0])
@pytest.mark.parametrize("experts", [2, 6, 64])
def test_entropy_lies_between_a_certain_and_an_even_choice(q: float, experts: int) -> None:
    certain = torch.eye(experts, dtype=torch.float64)[:1]
    even = torch.full((1, experts), 1 / experts, dtype=torch.float64)
    assert tsallis_entropy(certain, q).item() == 0
    assert tsallis_entropy(even, q, normalized=True).item() == pytest.approx(1, abs=1e-12)
    most = math.log(experts) if q == 1 else (1 - experts ** (1 - q)) / (q - 1)
    assert tsallis_entropy(even, q).item() == pytest.approx(most, rel=1e-12)
    inside = tsallis_entropy(drawn(experts=experts), q, normalized=True)
    assert ((inside > 0) & (inside < 1)).all()


def test_entropy_is_shannons_at_1_and_near_it() -> None:
    probs = drawn()
    shannon = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(tsallis_entropy(probs, 1.0), shannon, rtol=1e-14, atol=0)
    torch.testing.assert_close(tsallis_entropy(probs, 1.0 + 1e-9), shannon, rtol=1e-7, atol=0)


def test_entropy_has_the_releases_eps() -> None:
    probs, n, q = drawn(), 6, 1.1
    release = (1 - ((probs + 1e-5) ** q).sum(-1)) / (q - 1) / ((1 - n ** (1 - q)) / (q - 1))
    torch.testing.assert_close(tsallis_entropy(probs, q, normalized=True, eps=1e-5), release, rtol=0, atol=1e-12)


def test_impossible_experts_have_no_entropy_and_finite_gradients() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2000.0, 0.0, -2000.0]], requires_grad=True)
    for q in (0.05, 0.5, 1.0, 1.1, 2.0):
        entropy = tsallis_entropy(logits.softmax(-1), q)
        assert entropy[0].item() == pytest.approx(tsallis_entropy(logits[:1, :2].softmax(-1), q).item(), rel=1e-6)
        (grad,) = torch.autograd.grad(entropy.sum(), logits)
        assert grad.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_entropy_has_the_right_gradient(q: float) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tsallis_entropy(z.softmax(-1), q, True), logits)


def test_a_single_expert_has_no_entropy() -> None:
    assert tsallis_entropy(torch.ones(3, 1), 1.1, normalized=True).tolist() == [0.0] * 3


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_is_in_no_statistic(name: str) -> None:
    router = type(build_router(name))(entropy_coef=0.01, balance_coef=0.001, z_coef=0.1)
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(20) % 3 > 0
    loss, terms = auxiliary_loss(router, logits, mask)
    changed, _ = auxiliary_loss(router, logits.masked_fill(~mask[:, None], 77.0), mask)
    alone, terms_alone = auxiliary_loss(router, logits[mask])
    assert torch.equal(loss, changed) and torch.equal(loss, alone) and terms == terms_alone


def test_without_a_token_there_is_a_zero_with_a_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss, _ = auxiliary_loss(build_router("dynmole"), logits, torch.zeros(3, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and (grad == 0).all()


def test_the_balance_is_least_for_even_routing_and_large_logits_have_a_finite_z_loss() -> None:
    even, one = torch.full((8, 4), 0.25), torch.eye(4)[[0] * 8]
    assert load_balance(even, even).item() == pytest.approx(1) and load_balance(one, one).item() == pytest.approx(4)
    assert z_loss(torch.full((2, 3), 1e4)).item() == pytest.approx(1e8, rel=1e-3)
    assert masked_mean(torch.arange(4.0), torch.tensor([True, False, False, True])).item() == 1.5


def test_dynmoles_loss_makes_routers_certain() -> None:
    """beta mean T_q is minimized: gradient steps on the auxiliary loss lower the entropy."""
    logits = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    router = build_router({"name": "dynmole", "balance_coef": 0.0})
    before = router.entropy(logits.softmax(-1)).mean()
    (grad,) = torch.autograd.grad(auxiliary_loss(router, logits)[0], logits)
    assert router.entropy((logits - 1e4 * grad).softmax(-1)).mean() < before - 0.05


# ------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_built_from_what_they_say_of_themselves(name: str) -> None:
    router: Router = build_router(name)
    assert build_router(options(router)) == router
    assert isinstance(router(drawn(experts=8)), Routing)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("dinmole", ("router='dinmole'", "dynmole")),
        ({"name": "dynmole", "treshold": 1}, ("treshold", "threshold")),
        ({"name": "dynmole", "top_p": 0.0}, ("top_p=0.0", "(0, 1]")),
        ({"name": "top_p", "top_p": 1.5}, ("top_p=1.5", "(0, 1]")),
        ({"name": "dynmole", "q": 0.0}, ("q=0.0", "> 0")),
        ({"name": "dynmole", "min_k": 0}, ("min_k=0", "experts")),
        ({"name": "dynmole", "rule": "reech"}, ("rule='reech'", "'reach'")),
        ({"name": "top_k", "k": 0}, ("k=0", "experts")),
        ({"name": "soft", "balance_coef": -1.0}, ("balance_coef=-1.0", ">= 0")),
        ({"name": "dynmole", "q": float("inf")}, ("q=inf", "finite")),
        ({"name": "dynmole", "threshold": float("nan")}, ("threshold=nan",)),
        ({"name": "top_k", "k": 2.0}, ("k=2.0", "whole number")),
        ({"name": "top_k", "k": 10**9}, ("k=1000000000", "4096")),
    ],
)
def test_bad_routers_are_refused_in_one_line(spec: object, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        build_router(spec)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_more_experts_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"k=7: must lie in \[1, 6\]"):
        top_k_route(drawn(), 7)
