"""Laws of the objective: aggregation, surrogates, and where each coefficient's gradient goes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlvr.objective import AGGREGATIONS, Aggregation, aggregate, policy_loss, reference_kl
from rlvr.surrogates import Cispo, Dppo, Gmpo, Gpg, Gspo, PpoClip, Sapo, Surrogate, Unclipped
from rlvr.types import Coefficients, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-12}
SURROGATES: dict[str, Surrogate] = {
    "ppo_clip": PpoClip(high=0.28, dual_clip=3.0),
    "unclipped": Unclipped(),
    "cispo": Cispo(ratio_low=0.5, ratio_high=1.5),
    "gspo": Gspo(low=0.1, high=0.1),
    "gmpo": Gmpo(low=0.1, high=0.2),
    "sapo": Sapo(),
    "gpg": Gpg(),
    "dppo": Dppo(low=0.05, high=0.05, kl_coef=0.1),
}
B, T, L_MAX, BUDGET = 7, 9, 16, 40.0


def padded(seed: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """((B, T) fields, of which logps and entropy carry gradients; mask, whose row 2 is empty)"""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    old = -draw(B, T).abs() - 0.1
    values = {
        "logps": (old + 0.3 * draw(B, T)).requires_grad_(),
        "old_logps": old,
        "advantages": draw(B),
        "entropy": draw(B, T).abs().requires_grad_(),
        "ref_logps": old + 0.3 * draw(B, T),
    }
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[2] = False
    mask[0, 0] = True
    return values, mask


def all_coefficients(seed: int, mask: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every coefficient as (B, T)."""
    draw = torch.rand(6, *mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return {
        "weight": 2 * draw[0],
        "keep": draw[1] < 0.8,
        "advantage": draw[2] - 0.5,
        "drift": draw[3],
        "entropy": 0.1 * draw[4],
        "reference": 0.2 * draw[5],
    }


def tokens_and_coefficients(
    values: dict[str, Tensor], mask: Tensor, coefficients: dict[str, Tensor]
) -> tuple[Tokens, Coefficients]:
    return Tokens.from_padded(mask, **values), Coefficients(**{k: x[mask] for k, x in coefficients.items()})


def global_denominator(mode: Aggregation, mask: Tensor) -> float:
    sequences = float(mask.any(dim=1).sum())
    per_mode: dict[Aggregation, float] = {
        "token_mean": float(mask.sum()),
        "seq_mean_token_mean": sequences,
        "seq_mean_token_sum": sequences,
        "dr_grpo": B * L_MAX,
        "token_budget": BUDGET,
    }
    return per_mode[mode]


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_policy_loss_adds_up_over_micro_batches(mode: Aggregation, name: str) -> None:
    for seed, parts in itertools.product(range(3), (1, 2, 3, B)):
        values, mask = padded(seed)
        coefficients = all_coefficients(seed, mask)
        counted = mask & coefficients["keep"]
        denominator = global_denominator(mode, counted)

        def loss_of(
            rows: Tensor, values: dict[str, Tensor] = values, mask: Tensor = mask, c: dict[str, Tensor] = coefficients
        ) -> Tensor:
            part = {k: x[rows] for k, x in values.items()}
            tokens, mine = tokens_and_coefficients(part, mask[rows], {k: x[rows] for k, x in c.items()})
            return policy_loss(tokens, SURROGATES[name], mine, mode=mode, denominator=denominator)  # noqa: B023

        order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
        cuts = torch.randperm(B - 1, generator=torch.Generator().manual_seed(seed))[: parts - 1].sort().values + 1
        whole = loss_of(torch.arange(B))
        pieces = torch.stack([loss_of(rows) for rows in order.tensor_split(cuts)]).sum()
        torch.testing.assert_close(pieces, whole, **EXACT)
        leaves = [values["logps"], values["entropy"]]
        for got, expected in zip(torch.autograd.grad(pieces, leaves), torch.autograd.grad(whole, leaves), strict=True):
            torch.testing.assert_close(got, expected, **EXACT)
        if mode in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum"):
            tokens, c = tokens_and_coefficients(values, mask, coefficients)
            torch.testing.assert_close(policy_loss(tokens, SURROGATES[name], c, mode=mode), whole, **EXACT)


@pytest.mark.parametrize("mode", ("token_mean", "seq_mean_token_sum", "dr_grpo", "token_budget"))
def test_aggregate_of_sums_may_cut_through_a_sequence(mode: Aggregation) -> None:
    values, mask = padded(0)
    tokens = Tokens.from_padded(mask, **values)
    first = torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)) < 0.5
    denominator = global_denominator(mode, mask)
    losses = tokens.logps * tokens.advantages
    whole = aggregate(losses, tokens, mode=mode, denominator=denominator)
    halves = [
        aggregate(losses[part], tokens.select(part), mode=mode, denominator=denominator) for part in (first, ~first)
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole, **EXACT)


@pytest.mark.parametrize("mode", ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum"))
def test_aggregate_leaves_out_masked_sequences(mode: Aggregation) -> None:
    values, mask = padded(3)
    used = mask.any(dim=1)
    assert not used.all()
    with_empty = Tokens.from_padded(mask, **values)
    without = Tokens.from_padded(mask[used], **{k: x[used] for k, x in values.items()})
    got = aggregate(with_empty.logps, with_empty, mode=mode)
    assert torch.equal(got, aggregate(without.logps, without, mode=mode))


def test_aggregate_hand_computed() -> None:
    loss, mask = torch.tensor([[1.0, 2.0, 9.0], [9.0, 9.0, 9.0], [6.0, 9.0, 9.0]]), torch.zeros(3, 3)
    mask[0, :2] = mask[2, 0] = 1
    tokens = Tokens.from_padded(mask, logps=loss, old_logps=loss, advantages=loss)
    assert aggregate(tokens.logps, tokens, mode="token_mean") == 3.0  # (1 + 2 + 6) / 3
    assert aggregate(tokens.logps, tokens, mode="seq_mean_token_mean") == 3.75  # (1.5 + 6) / 2
    assert aggregate(tokens.logps, tokens, mode="seq_mean_token_sum") == 4.5  # (3 + 6) / 2
    assert aggregate(tokens.logps, tokens, mode="dr_grpo", denominator=3 * 6) == 0.5  # 9 / (3 * 6)
    assert aggregate(tokens.logps, tokens, mode="token_budget", denominator=12.0) == 0.75  # 9 / 12


def test_aggregate_refuses_what_it_cannot_divide_by() -> None:
    values, mask = padded(0)
    tokens = Tokens.from_padded(mask, **values)
    with pytest.raises(ValueError, match="mode='mean'"):
        aggregate(tokens.logps, tokens, mode="mean")  # type: ignore[arg-type]
    for mode in ("dr_grpo", "token_budget"):
        with pytest.raises(ValueError, match=f"mode='{mode}' needs a denominator"):
            aggregate(tokens.logps, tokens, mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", SURROGATES)
def test_policy_loss_of_half_precision_is_that_of_float32(name: str, dtype: torch.dtype) -> None:
    """3000 tokens: more than bfloat16 (256) or float16 (2048) can count, and a sum beyond float16's 65504."""
    generator = torch.Generator().manual_seed(0)
    old = (-torch.rand(3000, generator=generator) * 5).to(dtype)
    new = old + (0.3 * torch.randn(3000, generator=generator)).to(dtype)
    advantages, drift = torch.full((3000,), 30.0, dtype=dtype), torch.full((3000,), 8.0, dtype=dtype)
    half = flat_tokens(logps=new, old_logps=old, advantages=advantages)
    single = flat_tokens(logps=new.float(), old_logps=old.float(), advantages=advantages.float())
    for mode in AGGREGATIONS:
        denominator = None if "mean" in mode else 3000.0
        got, expected = (
            policy_loss(tokens, SURROGATES[name], Coefficients(drift=c), mode=mode, denominator=denominator)
            for tokens, c in ((half, drift), (single, drift.float()))
        )
        assert torch.equal(got, expected)


def flat_tokens(*, rows: int = 1, **values: Tensor) -> Tokens:
    """Tokens of `rows` equally long sequences."""
    n = values["logps"].numel()
    return Tokens(sequence=torch.arange(n) // (n // rows), num_sequences=rows, **values)  # type: ignore[arg-type]


def test_dual_clip_equals_the_formula() -> None:
    """A < 0: min(max(-A r, -A clip(r)), -A c); elsewhere PPO's max(-A r, -A clip(r))."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = 2 * torch.randn(500, generator=generator, dtype=torch.float64)
    advantages = torch.randn(500, generator=generator, dtype=torch.float64)
    low, high, c = 0.2, 0.28, 3.0
    tokens = flat_tokens(logps=log_ratio, old_logps=torch.zeros_like(log_ratio), advantages=advantages)
    surrogate = PpoClip(low=low, high=high, dual_clip=c)
    got = surrogate.loss(surrogate.ratio(tokens), tokens)
    for x, r, a in zip(got.tolist(), log_ratio.exp().tolist(), advantages.tolist(), strict=True):
        expected = max(-a * r, -a * min(max(r, 1 - low), 1 + high))
        assert x == pytest.approx(min(expected, -a * c) if a < 0 else expected, rel=1e-12)
    assert ((log_ratio.exp() > c) & (advantages < 0)).sum() > 20


def test_gspo_gives_each_token_s_a_over_length() -> None:
    values, mask = padded(4)
    tokens = Tokens.from_padded(mask, **values)
    loss = policy_loss(tokens, Gspo(low=1e3, high=1e3), Coefficients(), mode="seq_mean_token_mean")
    (grad,) = torch.autograd.grad(loss, values["logps"])
    rows = int(mask.any(dim=1).sum())
    for i in range(B):
        length = int(mask[i].sum())
        if not length:
            assert torch.equal(grad[i], torch.zeros_like(grad[i]))
            continue
        s = (values["logps"] - values["old_logps"])[i][mask[i]].mean().exp()
        expected = -(s * values["advantages"][i] / length / rows) * mask[i]
        torch.testing.assert_close(grad[i], expected.detach(), **EXACT)


def test_cispo_keeps_every_tokens_gradient() -> None:
    log_ratio = torch.tensor([-3.0, -0.1, 0.0, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0, 3.0], dtype=torch.float64)
    tokens = flat_tokens(logps=log_ratio, old_logps=torch.zeros(5, dtype=torch.float64), advantages=advantages)
    surrogate = Cispo(ratio_low=0.5, ratio_high=1.2)
    (grad,) = torch.autograd.grad(policy_loss(tokens, surrogate, Coefficients(), mode="token_mean"), log_ratio)
    weights = torch.tensor([0.5, math.exp(-0.1), 1.0, 1.2, 1.2], dtype=torch.float64)
    torch.testing.assert_close(grad, -weights * advantages / 5, **EXACT)
    assert (grad != 0).all()


def gradients(tokens: Tokens, coefficients: Coefficients, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of the loss with the coefficients minus the loss without."""
    losses = [
        policy_loss(tokens, Unclipped(), c, mode="token_mean", denominator=1.0) for c in (coefficients, Coefficients())
    ]
    found = torch.autograd.grad(losses[0] - losses[1], leaves, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


def test_coefficients_send_their_gradient_where_they_act() -> None:
    values, mask = padded(5)
    tokens = Tokens.from_padded(mask, **values)
    logps, entropy, c = tokens.logps, tokens.entropy, torch.linspace(0.1, 1.0, len(tokens), dtype=torch.float64)
    assert entropy is not None and tokens.ref_logps is not None
    zero = torch.zeros_like(c)
    ratio = (logps - tokens.old_logps).exp().detach()
    expected = {
        "entropy": (zero, -c),
        "drift": (c * (logps - tokens.old_logps).sign(), zero),
        "reference": (c * (1 - (tokens.ref_logps - logps).exp()), zero),
        "weight": (-(c - 1) * ratio * tokens.advantages, zero),
        "advantage": (-c * ratio, zero),
    }
    for name, (to_logps, to_entropy) in expected.items():
        got = gradients(tokens, Coefficients(**{name: c}), logps, entropy)
        torch.testing.assert_close(got, (to_logps.detach(), to_entropy), **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    kept = torch.arange(len(tokens)) % 3 > 0
    got = gradients(tokens, Coefficients(keep=kept), logps, entropy)
    torch.testing.assert_close(got, ((~kept * ratio * tokens.advantages), zero), **EXACT)


def test_reference_kl_may_be_corrected_by_the_ratio() -> None:
    values, mask = padded(6)
    tokens = Tokens.from_padded(mask, **values)
    c = Coefficients(reference=torch.ones(len(tokens), dtype=torch.float64))
    losses = [policy_loss(tokens, Unclipped(), c, mode="token_mean", corrected_kl=x) for x in (False, True)]
    ratio = Unclipped().ratio(tokens)
    torch.testing.assert_close(losses[1] - losses[0], ((ratio - 1) * reference_kl(tokens)).mean(), **EXACT)


def test_policy_loss_names_the_field_that_is_missing() -> None:
    values, mask = padded(0)
    tokens = replace(Tokens.from_padded(mask, **values), entropy=None, ref_logps=None)
    c = torch.ones(len(tokens), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tokens\.entropy"):
        policy_loss(tokens, PpoClip(), Coefficients(entropy=c), mode="token_mean")
    with pytest.raises(ValueError, match=r"tokens\.ref_logps"):
        policy_loss(tokens, PpoClip(), Coefficients(reference=c), mode="token_mean")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", SURROGATES)
def test_policy_loss_of_extreme_ratios_is_finite(name: str, dtype: torch.dtype) -> None:
    new = torch.tensor([-1e4, -0.1, -60.0, -1.0, -0.5], dtype=dtype).requires_grad_()
    old = torch.tensor([-0.1, -1e4, -1.0, -60.0, -torch.inf], dtype=dtype)
    for sign in (-1, 1):
        tokens = flat_tokens(rows=5, logps=new, old_logps=old, advantages=torch.full((5,), sign, dtype=dtype))
        loss = policy_loss(tokens, SURROGATES[name], Coefficients(), mode="seq_mean_token_mean")
        (grad,) = torch.autograd.grad(loss, new)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", SURROGATES)
def test_policy_loss_without_tokens_is_a_differentiable_zero(mode: Aggregation, name: str) -> None:
    values, mask = padded(0)
    coefficients = all_coefficients(0, mask)
    tokens, c = tokens_and_coefficients(values, torch.zeros_like(mask), coefficients)
    loss = policy_loss(tokens, SURROGATES[name], c, mode=mode, denominator=None if "mean" in mode else 1.0)
    (grad,) = torch.autograd.grad(loss, values["logps"])
    assert loss.item() == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))
