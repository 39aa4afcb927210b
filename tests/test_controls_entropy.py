"""Laws of the controls that read entropy, and of the KL to a reference, beyond the contract of every control."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from control_cases import CASES, batch
from hypothesis import given
from hypothesis import strategies as st
from test_controls import decide
from test_controls_meaning import SEEDS, entropy_after, true_entropy
from torch import Tensor

from rlvr.controls.entropy import AdaptiveEntropy, EntropyAdvantage, EntropyBonus, HighEntropyTokens, upper_quantile
from rlvr.controls.reference import ReferenceKl
from rlvr.objective import policy_loss
from rlvr.surrogates import PpoClip
from rlvr.types import Coefficients, LocalReduce, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}


def tokens_with(entropy: Tensor) -> Tokens:
    """One sequence of tokens that differ in entropy alone."""
    n = entropy.numel()
    zeros = torch.zeros(n, dtype=torch.float64)
    return Tokens(
        logps=zeros.clone().requires_grad_(),
        old_logps=zeros,
        advantages=zeros + 1,
        sequence=torch.zeros(n, dtype=torch.int64),
        num_sequences=1,
        entropy=entropy,
    )


def kept_by(control: HighEntropyTokens, entropy: Tensor) -> Tensor:
    weight = decide(control, tokens_with(entropy)).coefficients.weight
    assert weight is not None
    return weight == 1


# -------------------------------------------------------------------------------------------------- high entropy


def test_upper_quantile_is_the_linear_quantile() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 10, 101):
        for ties in (False, True):
            values = torch.rand(n, generator=generator, dtype=torch.float64)
            values = (values * 4).round() if ties else values
            for fraction in (0.0, 0.01, 0.2, 1 / 3, 0.5, 0.77, 1.0):
                got = upper_quantile(values, fraction, LocalReduce())
                torch.testing.assert_close(got, values.quantile(1 - fraction), **EXACT)


def test_upper_quantile_hits_the_token_that_the_decimal_names() -> None:
    """0.29 of 100 steps between 101 values is the value 29 from the top: 30 tokens reach it, although in floats
    0.29 * 100 < 29, and 1 - 0.29 is no exact number either."""
    entropy = torch.linspace(0.1, 1.3, 101, dtype=torch.float64)
    for percent in range(101):
        kept = kept_by(HighEntropyTokens(fraction=percent / 100), entropy)
        assert int(kept.sum()) == percent + 1


def test_upper_quantile_of_more_values_than_torch_takes() -> None:
    n = 2**24 + 1
    values = torch.arange(n, dtype=torch.float32)  # 0 to 2^24, all exact
    assert upper_quantile(values, 0.0625, LocalReduce()) == 2**24 - 2**20


def test_upper_quantile_sends_only_what_can_decide() -> None:
    class Counting(LocalReduce):
        sent = 0

        def gather(self, x: Tensor) -> Tensor:
            self.sent += x.numel()
            return x

    reduce = Counting()
    upper_quantile(torch.rand(1001, dtype=torch.float64), 0.2, reduce)
    assert reduce.sent == 201


def test_high_entropy_keeps_ties_and_the_denominator() -> None:
    entropy = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.2], dtype=torch.float64)
    control = HighEntropyTokens(fraction=0.2)  # 0.2 * 4 = 0.8 of the way from 0.5 to 0.5
    assert kept_by(control, entropy).tolist() == [True, True, True, False, False]
    assert kept_by(control, torch.full_like(entropy, 0.3)).all()
    tokens = tokens_with(entropy)
    loss = policy_loss(tokens, PpoClip(), decide(control, tokens).coefficients, mode="token_mean")
    assert loss == -3 / 5


def test_high_entropy_equals_trl() -> None:
    from trl import GRPOTrainer

    alone = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    generator = torch.Generator().manual_seed(0)
    for fraction in (0.05, 0.2, 0.5, 1.0):
        entropy = torch.rand(6, 40, generator=generator)
        mask = torch.rand(6, 40, generator=generator) < 0.7
        expected = GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=alone), entropy, mask, 1 - fraction)
        assert torch.equal(kept_by(HighEntropyTokens(fraction=fraction), entropy[mask].double()), expected[mask])


# -------------------------------------------------------------------------------------------------- bonus


def test_entropy_bonus_is_the_mean_entropy_with_its_gradient() -> None:
    tokens = batch()
    coefficients = decide(EntropyBonus(coef=0.03), tokens).coefficients
    without = policy_loss(tokens, PpoClip(), Coefficients(), mode="token_mean")
    with_bonus = policy_loss(tokens, PpoClip(), coefficients, mode="token_mean")
    assert tokens.entropy is not None
    torch.testing.assert_close(with_bonus, without - 0.03 * tokens.entropy.mean(), **EXACT)
    (grad,) = torch.autograd.grad(with_bonus, tokens.entropy)
    torch.testing.assert_close(grad, torch.full_like(grad, -0.03 / len(tokens)), **EXACT)


@pytest.mark.parametrize(
    "control", (EntropyBonus(coef=0.0), AdaptiveEntropy(coef=0.004), AdaptiveEntropy(enabled=True))
)
def test_no_bonus_is_no_term_in_the_loss(control: EntropyBonus | AdaptiveEntropy) -> None:
    """A coefficient of 0 times an entropy of NaN would be NaN."""
    tokens = batch()
    tokens = replace(tokens, entropy=torch.full_like(tokens.old_logps, math.nan))
    outcome = decide(control, tokens)
    assert not outcome.coefficients.present()
    assert policy_loss(tokens, PpoClip(), outcome.coefficients, mode="token_mean").isfinite()
    assert all(math.isfinite(mean.value()) for mean in outcome.metrics.values())


def test_adaptive_entropy_reports_and_applies_what_it_holds() -> None:
    for enabled, applied in ((False, 0.0), (True, 0.003)):
        coefficients, metrics = decide(AdaptiveEntropy(coef=0.003, enabled=enabled), batch())
        assert metrics["adaptive_entropy/coef"].value() == pytest.approx(0.003, abs=1e-15)
        assert metrics["adaptive_entropy/applied"].value() == pytest.approx(applied, abs=1e-15)
        assert coefficients.entropy is None if not enabled else (coefficients.entropy == applied).all()


@given(trace=st.lists(st.floats(0, 1), max_size=40), inclusive=st.booleans())
def test_adaptive_entropy_moves_against_the_error_within_its_range(trace: list[float], inclusive: bool) -> None:
    start = AdaptiveEntropy(coef=0.002, target=0.5, delta=7e-4, min_coef=1e-3, max_coef=0.004, inclusive=inclusive)
    control = start
    for entropy in trace:
        following = control.observe(entropy)
        below = entropy <= 0.5 if inclusive else entropy < 0.5
        assert following.enabled == below
        expected = min(control.coef + 7e-4, 0.004) if below else max(control.coef - 7e-4, 1e-3)
        assert following.coef == pytest.approx(expected, abs=1e-15)
        assert replace(following, coef=start.coef, enabled=start.enabled) == start
        control = following


def test_adaptive_entropy_refuses_an_entropy_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="entropy=nan"):
        AdaptiveEntropy().observe(math.nan)


def test_adaptive_entropy_brings_entropy_back_to_its_target() -> None:
    """Where the reward always pulls to the first of 8 actions, entropy collapses without it and returns with it."""
    final = {}
    for delta in (0.0, 0.02):
        control = AdaptiveEntropy(target=0.8, delta=delta, max_coef=5.0)
        logits = torch.zeros(1, 8, dtype=torch.float64)
        for _ in range(1500):
            logits = logits.requires_grad_()
            logps = logits.log_softmax(dim=1)
            entropy = -(logps.exp() * logps).sum()
            loss = -logps[0, 0].exp() - control.applied * entropy
            (grad,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.1 * grad).detach()
            control = control.observe(entropy.item())
        final[delta] = true_entropy(logits)
    assert final[0.0] < 0.2
    assert final[0.02] == pytest.approx(0.8, abs=0.1)


# -------------------------------------------------------------------------------------------------- advantage


@given(
    advantage=st.floats(-5, 5),
    entropy=st.floats(0, 12),
    alpha=st.floats(0, 3, exclude_min=True),
    kappa=st.floats(1, 9),
)
def test_entropy_advantage_never_flips_a_sign(advantage: float, entropy: float, alpha: float, kappa: float) -> None:
    tokens = tokens_with(torch.tensor([entropy], dtype=torch.float64))
    tokens = replace(tokens, advantages=torch.tensor([advantage], dtype=torch.float64))
    bonus = decide(EntropyAdvantage(alpha=alpha, kappa=kappa), tokens).coefficients.advantage
    assert bonus is not None
    assert 0 <= float(bonus) <= abs(advantage) / kappa and float(bonus) <= alpha * entropy
    shaped = advantage + float(bonus)
    assert shaped >= 0 if advantage >= 0 else shaped <= 0
    assert shaped == 0 or advantage != 0


def test_entropy_advantage_favors_uncertain_tokens() -> None:
    """An uncertain token's gradient is larger than a certain one's where A > 0, and smaller where A < 0."""
    entropy = torch.tensor([0.0, 0.5, 4.0, 0.0, 0.5, 4.0], dtype=torch.float64)
    tokens = replace(tokens_with(entropy), advantages=torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64))
    coefficients = decide(EntropyAdvantage(alpha=0.4, kappa=2.0), tokens).coefficients
    loss = policy_loss(tokens, PpoClip(), coefficients, mode="seq_mean_token_sum")
    (grad,) = torch.autograd.grad(loss, tokens.logps)
    # 1 + min(0.4 H, 1/2): H = 0.5 gives 1.2, H = 4 is bounded at 1.5; -1 + the same for the bad tokens.
    expected = torch.tensor([1.0, 1.2, 1.5, -1.0, -0.8, -0.5], dtype=torch.float64)
    torch.testing.assert_close(-grad, expected, **EXACT)


def test_entropy_advantage_promises_no_direction() -> None:
    """Small steps leave more entropy with it than without, large steps less: why it is not a lever."""

    def times_higher(learning_rate: float) -> int:
        case = replace(CASES["entropy_advantage"], learning_rate=learning_rate)
        return sum(
            entropy_after(case, seed, controlled=True) > entropy_after(case, seed, controlled=False)
            for seed in range(SEEDS)
        )

    assert times_higher(10.0) >= 20
    assert times_higher(1000.0) <= 4


# -------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(("sharpness", "direction"), ((0.5, -1), (2.0, +1)))
def test_reference_kl_pulls_entropy_toward_the_references(sharpness: float, direction: int) -> None:
    """From a policy flatter than the reference entropy falls, from a sharper one it rises; there is no reward here."""
    moved = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        reference = torch.randn(200, 8, generator=generator, dtype=torch.float64)
        logits = (sharpness * reference).requires_grad_()
        state = torch.arange(200).repeat_interleave(8)
        action = torch.multinomial(logits.softmax(dim=1).detach(), 8, replacement=True, generator=generator).flatten()
        logps = logits.log_softmax(dim=1)[state, action]
        tokens = Tokens(
            logps=logps,
            old_logps=logps.detach(),
            advantages=torch.zeros_like(logps.detach()),
            sequence=torch.arange(1600),
            num_sequences=1600,
            ref_logps=reference.log_softmax(dim=1)[state, action],
        )
        coefficients = decide(ReferenceKl(coef=0.5), tokens).coefficients
        (grad,) = torch.autograd.grad(policy_loss(tokens, PpoClip(), coefficients, mode="token_mean"), logits)
        moved.append(true_entropy((logits - 100 * grad).detach()) - true_entropy(logits.detach()))
    assert sum(direction * x > 0 for x in moved) >= 20, moved


def test_reference_kl_of_zero_needs_no_reference() -> None:
    assert ReferenceKl(coef=0.0).needs == frozenset()
    assert not decide(ReferenceKl(coef=0.0), replace(batch(), ref_logps=None)).coefficients.present()
