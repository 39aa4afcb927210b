"""Laws of the corrections for the engine's mismatch, beyond the contract of every control."""

import math
from dataclasses import replace

import pytest
import torch
from control_cases import batch
from test_controls import assert_same, decide
from torch import Tensor

from rlvr.controls import Control
from rlvr.controls.mismatch import GeometricGate, IcePop, Mis, OffPolicyMask, Tis
from rlvr.objective import policy_loss
from rlvr.surrogates import PpoClip, Unclipped
from rlvr.types import Coefficients, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
BANDS: tuple[Control, ...] = (
    Tis(high=1.01),
    Tis(high=1.01, level="sequence"),
    IcePop(low=0.99, high=1.01),
    Mis(high=1.01),
    GeometricGate(low=0.999, high=1.001),
    OffPolicyMask(delta=0.01),
)
every_correction = pytest.mark.parametrize("control", BANDS, ids=repr)


def weights(control: Control, tokens: Tokens) -> Tensor:
    weight = decide(control, tokens).coefficients.weight
    assert weight is not None
    return weight


def sequence_of(gaps: list[float], advantage: float = 1.0) -> Tokens:
    """One sequence whose log-probs are above the engine's by `gaps`."""
    gap = torch.tensor(gaps, dtype=torch.float64)
    zeros = torch.zeros_like(gap)
    return Tokens(
        logps=gap - 2,
        old_logps=gap - 2,
        rollout_logps=zeros - 2,
        advantages=zeros + advantage,
        sequence=zeros.long(),
        num_sequences=1,
    )


# -------------------------------------------------------------------------------------------------- formulas


def test_corrections_equal_padded_formulas() -> None:
    """On (B, T) with a mask, as the releases write them: sums over a row, one weight per token."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(30, 12, generator=generator) < 0.7
    old = -torch.rand(30, 12, generator=generator, dtype=torch.float64)
    engine = old + 0.3 * torch.randn(30, 12, generator=generator, dtype=torch.float64)
    tokens = Tokens.from_padded(mask, logps=old, old_logps=old, rollout_logps=engine, advantages=old)
    gap = (old - engine) * mask
    token, product = gap.exp(), gap.sum(1, keepdim=True).exp().expand_as(gap)
    mean = (gap.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp().expand_as(gap)
    expected = {
        Tis(high=1.3): token.clamp(max=1.3),
        Tis(high=1.3, level="sequence"): product.clamp(max=1.3),
        IcePop(low=0.8, high=1.2): token.masked_fill((token < 0.8) | (token > 1.2), 0.0),
        Mis(high=1.3): product.masked_fill(product > 1.3, 0.0),
        GeometricGate(low=0.9, high=1.1): token.masked_fill((mean < 0.9) | (mean > 1.1), 0.0),
    }
    for control, weight in expected.items():
        torch.testing.assert_close(weights(control, tokens), weight[mask], **EXACT)
        assert (weight != token)[mask].double().mean() > 0.05, control  # the bound is there to act


def test_off_policy_mask_equals_trl() -> None:
    from trl import GRPOTrainer

    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(40, 9, generator=generator) < 0.7
    logps = -torch.rand(40, 9, generator=generator, dtype=torch.float64)
    engine = logps + 0.3 * torch.randn(40, 9, generator=generator, dtype=torch.float64)
    engine[3, 4] = math.nan
    advantages = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    tokens = Tokens.from_padded(mask, logps=logps, old_logps=logps, rollout_logps=engine, advantages=advantages)
    for delta in (0.0, 0.1, 0.5):
        expected = GRPOTrainer.get_off_policy_mask(advantages, logps, engine, mask.double(), delta)
        assert torch.equal(weights(OffPolicyMask(delta=delta), tokens), expected.expand_as(mask)[mask])


def test_metrics_count_what_a_bound_touches() -> None:
    tokens = sequence_of([math.log(x) for x in (0.25, 1.0, 1.5, 4.0)])
    metrics = decide(Tis(high=2.0), tokens).metrics
    assert metrics["tis/capped"].value() == 1 / 4
    assert metrics["tis/weight"].value() == pytest.approx((0.25 + 1.0 + 1.5 + 2.0) / 4, abs=1e-12)
    metrics = decide(IcePop(low=0.5, high=3.0), tokens).metrics
    assert metrics["icepop/masked"].value() == 2 / 4
    assert metrics["icepop/weight"].value() == pytest.approx((1.0 + 1.5) / 4, abs=1e-12)
    assert decide(Mis(high=1.4), tokens).metrics["mis/masked"].value() == 1.0  # 0.25 * 1.5 * 4 = 1.5
    assert decide(GeometricGate(low=0.5, high=2.0), tokens).metrics["geometric_gate/masked"].value() == 0.0
    metrics = decide(OffPolicyMask(delta=0.0), sequence_of([-0.3, -0.1], advantage=-1.0)).metrics
    assert metrics["off_policy_mask/masked"].value() == 1.0
    assert metrics["off_policy_mask/kl"].value() == pytest.approx(0.2, abs=1e-12)


# -------------------------------------------------------------------------------------------------- laws


@every_correction
def test_correction_judges_each_sequence_alone(control: Control) -> None:
    tokens = batch(3)
    together = weights(control, tokens)
    for row in range(tokens.num_sequences):
        mine = tokens.sequence == row
        torch.testing.assert_close(weights(control, tokens.select(mine)), together[mine], **EXACT)


@every_correction
def test_token_without_an_engine_log_prob_counts_as_agreement(control: Control) -> None:
    tokens = batch(4)
    assert tokens.rollout_logps is not None
    unknown = torch.arange(len(tokens)) % 3 == 0
    trainer = tokens.logps.detach() if isinstance(control, OffPolicyMask) else tokens.old_logps
    missing = replace(tokens, rollout_logps=tokens.rollout_logps.masked_fill(unknown, math.nan))
    agreeing = replace(tokens, rollout_logps=torch.where(unknown, trainer, tokens.rollout_logps))
    assert_same(decide(control, missing).coefficients, decide(control, agreeing).coefficients)


@every_correction
@pytest.mark.parametrize("gap", (5.0, -5.0, math.inf, -math.inf))
def test_correction_of_a_long_response_stays_finite(control: Control, gap: float) -> None:
    """A product of 10 000 ratios of e^5 is no number; its log is clamped to 20."""
    for gaps in ([gap] * 10_000, [gap, -gap] * 5_000):
        weight = weights(control, sequence_of(gaps, advantage=-1.0))
        assert weight.isfinite().all() and (weight >= 0).all() and (weight <= math.exp(20)).all()


def test_sequence_weight_does_not_overflow() -> None:
    assert (weights(Tis(high=math.inf, level="sequence"), sequence_of([1.0] * 1000)) == math.exp(20)).all()
    assert (weights(Mis(high=3.0), sequence_of([1.0] * 1000)) == 0).all()


def test_geometric_gate_does_not_depend_on_length() -> None:
    """A hundred times as long with the same gaps: the mean stays inside the band, the product leaves every bound."""
    gaps = [0.02, -0.01, 0.05, -0.02]
    for control, kept in ((GeometricGate(low=0.98, high=1.02), [True, True]), (Mis(high=1.5), [True, False])):
        assert [bool(weights(control, sequence_of(gaps * n)).all()) for n in (1, 100)] == kept


def test_off_policy_mask_follows_the_current_policy() -> None:
    """The other corrections know the policy of the rollout alone, so they are computed once per rollout."""
    tokens = sequence_of([0.0, 0.0, 0.0], advantage=-1.0)
    moved = replace(tokens, logps=tokens.logps - 1)
    for control in BANDS:
        drops = bool((weights(control, moved) == 0).all())
        assert drops == (control.scope == "micro_batch") == isinstance(control, OffPolicyMask)
        assert (weights(control, tokens) == 1).all()


def test_off_policy_mask_never_drops_a_good_sequence() -> None:
    tokens = batch(5)
    weight = weights(OffPolicyMask(delta=0.0), tokens)
    assert (weight[tokens.advantages >= 0] == 1).all()
    assert (weight == 0).any() and ((weight == 0) | (weight == 1)).all()


def test_masked_tokens_stay_in_the_denominator() -> None:
    tokens = sequence_of([0.0, 0.0, 9.0, 9.0])
    coefficients = decide(IcePop(), tokens).coefficients
    assert float(policy_loss(tokens, PpoClip(), coefficients, mode="token_mean")) == -2 / 4


# -------------------------------------------------------------------------------------------------- meaning


def expected_gradient(engine: Tensor, policy: Tensor, worth: Tensor, control: Control | None) -> Tensor:
    """Of the loss of a one-token policy [states, actions], in expectation over actions that `engine` draws."""
    states, actions = policy.shape
    logits = policy.clone().requires_grad_()
    logps, rollout = logits.log_softmax(dim=1).flatten(), engine.log_softmax(dim=1).flatten()
    tokens = Tokens(
        logps=logps,
        old_logps=logps.detach(),
        rollout_logps=rollout,
        advantages=worth.flatten(),
        sequence=torch.arange(states * actions),
        num_sequences=states * actions,
    )
    drawn = Coefficients(weight=rollout.exp())
    coefficients = drawn if control is None else drawn.combine(decide(control, tokens).coefficients)
    loss = policy_loss(tokens, Unclipped(), coefficients, mode="token_mean")
    return torch.autograd.grad(loss, logits)[0]


def test_importance_weights_give_the_on_policy_gradient() -> None:
    """Exactly where nothing is cut, and nearer than without a correction where the defaults cut."""
    generator = torch.Generator().manual_seed(0)
    policy, noise, worth = torch.randn(3, 200, 8, generator=generator, dtype=torch.float64)
    engine = policy + 0.3 * noise
    on_policy = expected_gradient(policy, policy, worth, None)
    off = float((expected_gradient(engine, policy, worth, None) - on_policy).norm())
    wide = (
        Tis(high=math.inf),
        Tis(high=math.inf, level="sequence"),
        IcePop(low=0.0, high=math.inf),
        Mis(high=math.inf),
        GeometricGate(low=0.0, high=math.inf),
    )
    for control in wide:
        torch.testing.assert_close(expected_gradient(engine, policy, worth, control), on_policy, **EXACT)
    for cut in (Tis(), IcePop(), Mis(), Tis(high=1.2)):
        error = float((expected_gradient(engine, policy, worth, cut) - on_policy).norm())
        assert 0 < error < 0.5 * off, (cut, error, off)
