"""The entropy-change formulas against the update itself: worked cases, order of the error, identities between them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_vectors import EXACT, VECTORS
from torch import Tensor

from rlvr.theory import (
    ESTIMATORS,
    TokenStatistics,
    discriminator,
    entropy,
    entropy_bonus_step,
    exact_change,
    expected_own_logit_change,
    first_order_change,
    mean_discriminator,
    natural_gradient_step,
    own_logit_step,
    policy_gradient_step,
    single_logit_step,
    token_step,
)

SIZES = (0.1, 0.01, 0.001)


def cases(method: str) -> Any:
    found = [v for v in VECTORS.values() if v["method"] == method]
    return pytest.mark.parametrize("case", found, ids=lambda v: v["id"])


def tensor(x: Any) -> Tensor:
    """Nested lists of numbers, with 'nan' and 'inf' as text."""
    return torch.stack([tensor(v) for v in x]) if isinstance(x, list) else torch.tensor(float(x), dtype=torch.float64)


def same(got: Tensor, expected: Any) -> None:
    torch.testing.assert_close(got, tensor(expected) if not isinstance(expected, Tensor) else expected, **EXACT)


def states(vocabulary: int, number: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, advantages of mean 0 under the policy, a sampled token) of random states, sharp and flat ones."""
    g = torch.Generator().manual_seed(vocabulary)
    scale = 0.3 + 2.7 * torch.rand(number, 1, generator=g, dtype=torch.float64)
    logits = scale * torch.randn(number, vocabulary, generator=g, dtype=torch.float64)
    p = logits.softmax(-1)
    advantages = torch.randn(number, vocabulary, generator=g, dtype=torch.float64)
    advantages -= (p * advantages).sum(-1, keepdim=True)
    return logits, advantages, torch.multinomial(p, 1, generator=g).squeeze(1)


def statistics(logits: Tensor, token: Tensor, step: Tensor) -> TokenStatistics:
    logps = logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return TokenStatistics(
        logps=logps, entropy=entropy(logits), step=step, mean_discriminator=mean_discriminator(logits)
    )


# ------------------------------------------------------------------------------------------------------------- vectors


@cases("entropy")
def test_entropy_and_discriminator(case: dict[str, Any]) -> None:
    logits, expected = tensor(case["inputs"]["logits"]), case["expected"]
    same(entropy(logits), expected["entropy"])
    if "S" in expected:
        same(discriminator(logits), expected["S"])
        same(-discriminator(logits), expected["dH_dlogits"])
        same(mean_discriminator(logits), expected["E_S"])


@cases("entropy_change")
def test_change_by_one_token(case: dict[str, Any]) -> None:
    logits, token, eps = tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["token"]), case["params"]["eps"]
    expected = case["expected"]
    same(entropy(logits), expected["H"])
    same(discriminator(logits)[token], expected["S"])
    same(mean_discriminator(logits), expected["E_S"])
    stats = statistics(logits[None], token[None], torch.tensor([eps], dtype=torch.float64))
    for key, step, estimator in (
        ("single_logit", single_logit_step, "single_logit"),
        ("grpo", token_step, "discriminator"),
        ("steer", own_logit_step, "steer"),
    ):
        dz = step(logits, token, eps)
        same(first_order_change(logits, dz), expected[f"pred_{key}"])
        same(ESTIMATORS[estimator](stats)[0], expected[f"pred_{key}"])
        if f"actual_{key}" in expected:
            same(exact_change(logits, dz), expected[f"actual_{key}"])


@cases("entropy_change_expected")
def test_change_in_expectation(case: dict[str, Any]) -> None:
    logits, advantages = tensor(case["inputs"]["logits"]), tensor(case["inputs"]["adv"])
    eta, expected = case["params"]["eta"], case["expected"]
    for key, dz in (
        ("pg", policy_gradient_step(logits, advantages, eta)),
        ("npg", natural_gradient_step(advantages, eta)),
    ):
        same(first_order_change(logits, dz), expected[f"pred_{key}"])
        same(exact_change(logits, dz), expected[f"actual_{key}"])
    every = torch.arange(logits.numel())
    each = first_order_change(logits, token_step(logits.expand(len(every), -1), every, eta * advantages))
    same((logits.softmax(-1) * each).sum(), expected["identity_pg"])


# ------------------------------------------------------------------------------------------------- order of the error

Update = Callable[[Tensor, Tensor, Tensor, float], Tensor]
UPDATES: dict[str, Update] = {
    "any": lambda z, a, k, eta: eta * a.flip(-1),
    "policy_gradient": lambda z, a, k, eta: policy_gradient_step(z, a, eta),
    "natural_gradient": lambda z, a, k, eta: natural_gradient_step(a, eta),
    "single_logit": lambda z, a, k, eta: single_logit_step(z, k, eta * sampled(a, k)),
    "token": lambda z, a, k, eta: token_step(z, k, eta * sampled(a, k)),
    "own_logit": lambda z, a, k, eta: own_logit_step(z, k, eta * sampled(a, k)),
    "bonus": lambda z, a, k, eta: entropy_bonus_step(z, eta),
}


def sampled(x: Tensor, token: Tensor) -> Tensor:
    return x.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def order_of(error: Callable[[float], Tensor]) -> float:
    """Slope of the log of the mean absolute error over the log of the step size."""
    y = torch.tensor([error(eta).abs().mean().log10().item() for eta in SIZES])
    return ((y[0] - y[-1]) / 2).item()


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
@pytest.mark.parametrize("name", UPDATES)
def test_first_order_change_leaves_an_error_of_second_order(name: str, vocabulary: int) -> None:
    z, a, k = states(vocabulary)
    update = UPDATES[name]

    def error(eta: float) -> Tensor:
        dz = update(z, a, k, eta)
        return exact_change(z, dz) - first_order_change(z, dz)

    assert 1.9 < order_of(error) < 2.1


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
def test_steer_leaves_an_error_of_first_order_of_the_real_step(vocabulary: int) -> None:
    z, a, k = states(vocabulary)

    def error(eta: float) -> Tensor:
        alpha = eta * sampled(a, k)
        return exact_change(z, token_step(z, k, alpha)) - ESTIMATORS["steer"](statistics(z, k, alpha))

    assert 0.95 < order_of(error) < 1.05


# ---------------------------------------------------------------------------------------------------------- identities


def covariance(logits: Tensor, x: Tensor) -> Tensor:
    """Cov_{k~p}(log p_k, x_k), written out."""
    p, logp = logits.softmax(-1), logits.log_softmax(-1)
    mean_logp, mean_x = (p * logp).sum(-1, keepdim=True), (p * x).sum(-1, keepdim=True)
    return (p * (logp - mean_logp) * (x - mean_x)).sum(-1)


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
def test_theorems_are_covariances(vocabulary: int) -> None:
    z, a, _ = states(vocabulary)
    p, eta = z.softmax(-1), 0.3
    same(first_order_change(z, a.flip(-1)), -covariance(z, a.flip(-1)))
    same(first_order_change(z, policy_gradient_step(z, a, eta)), -eta * covariance(z, p * a))
    same(first_order_change(z, natural_gradient_step(a, eta)), -eta * covariance(z, a))


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
def test_policy_gradient_is_the_mean_of_token_steps(vocabulary: int) -> None:
    """Of the updates, and so of every first-order prediction."""
    z, a, _ = (x[:5] for x in states(vocabulary))
    p, total = z.softmax(-1), torch.zeros_like(z)
    for k in range(vocabulary):
        token = torch.full((5,), k)
        total += p[:, k, None] * token_step(z, token, 0.2 * a[:, k])
    same(total, policy_gradient_step(z, a, 0.2))


def test_discriminator_is_minus_the_gradient_of_entropy() -> None:
    z = states(16)[0].requires_grad_()
    (grad,) = torch.autograd.grad(entropy(z).sum(), z)
    same(discriminator(z.detach()), -grad)


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
def test_sign_of_the_discriminator_compares_p_with_exp_of_minus_entropy(vocabulary: int) -> None:
    z, _, _ = states(vocabulary)
    p, h = z.softmax(-1), entropy(z).unsqueeze(-1)
    assert torch.equal(discriminator(z).sign(), (p - torch.exp(-h)).sign())


@pytest.mark.parametrize("vocabulary", [4, 16, 128])
def test_unbiased_samples_do_not_drift(vocabulary: int) -> None:
    """E_{k~p}[S_k - E_S] = 0, and sum_k S_k = 0."""
    z, _, _ = states(vocabulary)
    s = discriminator(z)
    same((z.softmax(-1) * (s - mean_discriminator(z).unsqueeze(-1))).sum(-1), torch.zeros_like(z[:, 0]))
    same(s.sum(-1), torch.zeros_like(z[:, 0]))


def test_entropy_bonus_raises_entropy_by_the_sum_of_squares() -> None:
    z, _, _ = states(16)
    same(first_order_change(z, entropy_bonus_step(z, 0.7)), 0.7 * discriminator(z).square().sum(-1))


def test_expected_own_logit_change_sums_what_each_token_does() -> None:
    z, a, _ = (x[:5] for x in states(16))
    old = z + 0.1 * a
    total = torch.zeros(5, dtype=torch.float64)
    for k in range(16):
        token = torch.full((5,), k)
        ratio = z.softmax(-1)[:, k] / old.softmax(-1)[:, k]
        total += first_order_change(z, own_logit_step(z, token, 0.2 * ratio * a[:, k]))
    same(expected_own_logit_change(z, old, a, 0.2), total)


def test_expected_own_logit_change_is_the_mean_of_the_released_estimate() -> None:
    """Eq. 7 is an expectation: its integrand at the sampled token is the realized change divided by p."""
    z, a, _ = (x[:5] for x in states(4))
    total = torch.zeros(5, dtype=torch.float64)
    for k in range(4):
        stats = statistics(z, torch.full((5,), k), 0.2 * a[:, k])
        total += stats.p * ESTIMATORS["steer_released"](stats)
    same(expected_own_logit_change(z, z, a, 0.2), total)


# ------------------------------------------------------------------------------------------------ impossible tokens


def test_impossible_tokens_change_nothing() -> None:
    """A logit of -inf and no logit at all are the same, in every formula."""
    z, a, k = states(16)
    hole = torch.full_like(z[:, :1], -torch.inf)
    wide, wide_a = torch.cat([z, hole], -1), torch.cat([a, torch.ones_like(hole)], -1)
    same(entropy(wide), entropy(z))
    same(discriminator(wide), torch.cat([discriminator(z), torch.zeros_like(hole)], -1))
    same(mean_discriminator(wide), mean_discriminator(z))
    same(expected_own_logit_change(wide, wide, wide_a, 0.1), expected_own_logit_change(z, z, a, 0.1))
    for name in ("policy_gradient", "single_logit", "token", "own_logit", "bonus"):
        dz, wide_dz = UPDATES[name](z, a, k, 0.1), UPDATES[name](wide, wide_a, k, 0.1)
        same(first_order_change(wide, wide_dz), first_order_change(z, dz))
        same(exact_change(wide, wide_dz), exact_change(z, dz))
    stats = statistics(wide, torch.full_like(k, 16), torch.ones(len(k)))
    for name in ("single_logit", "steer", "steer_released"):
        assert torch.equal(ESTIMATORS[name](stats), torch.zeros_like(stats.p))


def test_a_certain_token_has_no_entropy_to_lose() -> None:
    z = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert torch.equal(entropy(z), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(discriminator(z), torch.zeros(1, 3, dtype=torch.float64))
