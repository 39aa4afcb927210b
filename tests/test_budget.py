"""The token budget: which tokens an optimizer step trains on, and why their number is fixed."""

import math

import pytest
import torch
from control_cases import batch
from hypothesis import given
from hypothesis import strategies as st
from test_controls import decide, pick
from torch import Tensor

from rlvr.budget import kept_tokens
from rlvr.controls.budget import TokenBudget
from rlvr.objective import policy_loss
from rlvr.surrogates import Unclipped
from rlvr.types import Coefficients, Tokens, token_keys

LENGTHS = st.lists(st.integers(0, 30), max_size=20)
BUDGET = st.integers(1, 300)


@given(LENGTHS, BUDGET)
def test_cut_selection_has_exactly_the_budget_or_everything(lengths: list[int], budget: int) -> None:
    kept = kept_tokens(torch.tensor(lengths, dtype=torch.int64), budget, whole_responses=False).tolist()
    assert sum(kept) == min(sum(lengths), budget)
    assert all(0 <= k <= n for k, n in zip(kept, lengths, strict=True))
    assert sum(0 < k < n for k, n in zip(kept, lengths, strict=True)) <= 1


@given(LENGTHS, BUDGET)
def test_selection_is_a_prefix_of_the_order(lengths: list[int], budget: int) -> None:
    for whole in (False, True):
        kept = kept_tokens(torch.tensor(lengths, dtype=torch.int64), budget, whole_responses=whole).tolist()
        used = 0
        for k, n in zip(kept, lengths, strict=True):
            left = max(budget - used, 0)
            assert k == (n if whole and left else min(n, left))
            used += k


@given(LENGTHS, BUDGET)
def test_whole_responses_overshoot_by_less_than_one(lengths: list[int], budget: int) -> None:
    kept = kept_tokens(torch.tensor(lengths, dtype=torch.int64), budget, whole_responses=True).tolist()
    assert all(k in (0, n) for k, n in zip(kept, lengths, strict=True))
    assert sum(kept) >= min(sum(lengths), budget)
    last = max((i for i, k in enumerate(kept) if k), default=None)
    assert last is None or sum(kept) - kept[last] < budget


def kept_of(control: TokenBudget, tokens: Tokens) -> Tensor:
    keep = decide(control, tokens).coefficients.keep
    assert keep is not None
    return keep


@pytest.mark.parametrize("whole", (False, True))
@pytest.mark.parametrize("budget", (1, 7, 100, 150, 10_000))
def test_token_budget_takes_responses_in_the_order_of_their_first_keys(budget: int, whole: bool) -> None:
    for seed in range(3):
        tokens = batch(seed, key_seed=seed)
        assert tokens.key is not None and tokens.position is not None
        rows = tokens.sequence.unique().tolist()
        first = {row: int(tokens.key[tokens.sequence == row][0]) for row in rows}
        expected, used = torch.zeros(len(tokens), dtype=torch.bool), 0
        for row in sorted(rows, key=first.__getitem__):
            mine = (tokens.sequence == row).nonzero().flatten()
            mine = (mine if whole else mine[: budget - used]) if used < budget else mine[:0]
            expected[mine] = True
            used += len(mine)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(tokens), generator=generator)
        control = TokenBudget(tokens=budget, whole_responses=whole)
        assert torch.equal(kept_of(control, pick(tokens, order)), expected[order])
        assert decide(control, tokens).metrics["token_budget/filled"].value() == pytest.approx(
            used / budget, abs=1e-12
        )


def test_token_budget_cuts_by_position_where_tokens_are_missing() -> None:
    """A response whose trained tokens are at positions 2, 5, 6 and 9 keeps the first three for a budget of 3."""
    zeros = torch.zeros(4, dtype=torch.float64)
    position = torch.tensor([9, 2, 6, 5])
    tokens = Tokens(
        logps=zeros,
        old_logps=zeros,
        advantages=zeros,
        sequence=torch.full((4,), 3),
        num_sequences=5,
        position=position,
        key=token_keys(0, 0, torch.zeros_like(position), position),
    )
    assert kept_of(TokenBudget(tokens=3), tokens).tolist() == [False, True, True, True]


def test_token_budget_prefers_neither_long_nor_short_responses() -> None:
    sequence, position = torch.tensor([0] + [1] * 40), torch.cat([torch.zeros(1), torch.arange(40)]).long()
    zeros, rounds, short_first = torch.zeros(41, dtype=torch.float64), 1000, 0
    for step in range(rounds):
        tokens = Tokens(
            logps=zeros,
            old_logps=zeros,
            advantages=zeros,
            sequence=sequence,
            num_sequences=2,
            position=position,
            key=token_keys(0, step, sequence, position),
        )
        short_first += int(kept_of(TokenBudget(tokens=1), tokens)[0])
    assert abs(short_first - rounds / 2) < 5 * math.sqrt(rounds / 4)


@pytest.mark.parametrize("tokens", (0, -5, 1.5, float("nan")))
def test_token_budget_is_a_whole_number(tokens: float) -> None:
    with pytest.raises(ValueError, match=f"tokens={tokens}: must be a whole number >= 1"):
        TokenBudget(tokens=tokens)  # type: ignore[arg-type]


def test_loss_divides_by_the_budget_whatever_the_batch_holds() -> None:
    tokens, surrogate = batch(), Unclipped()
    for budget in (50, 10_000):
        coefficients = decide(TokenBudget(tokens=budget), tokens).coefficients
        assert coefficients.keep is not None
        loss = policy_loss(tokens, surrogate, coefficients, mode="token_budget", denominator=budget)
        kept = pick(tokens, coefficients.keep.nonzero().flatten())
        total = policy_loss(kept, surrogate, Coefficients(), mode="token_mean") * len(kept)
        torch.testing.assert_close(loss, total / budget, rtol=0.0, atol=1e-10)


def test_token_budget_steadies_the_gradient_norm() -> None:
    """Steps of 200 to 4,000 tokens: the noise of a token mean falls with their number, that of a budget does not."""
    generator = torch.Generator().manual_seed(0)
    norms: dict[bool, list[float]] = {False: [], True: []}
    for step in range(60):
        lengths = torch.randint(10, (20, 200)[step % 2], (20,), generator=generator)
        sequence = torch.arange(20).repeat_interleave(lengths)
        position = torch.cat([torch.arange(n) for n in lengths])
        features = torch.randn(len(sequence), 64, generator=generator, dtype=torch.float64)
        theta = torch.zeros(64, dtype=torch.float64, requires_grad=True)
        tokens = Tokens(
            logps=features @ theta,
            old_logps=torch.zeros(len(sequence), dtype=torch.float64),
            advantages=torch.randn(len(sequence), generator=generator, dtype=torch.float64),
            sequence=sequence,
            num_sequences=20,
            position=position,
            key=token_keys(0, step, sequence, position),
        )
        budget = TokenBudget(tokens=200)
        for controlled in (False, True):
            coefficients = decide(budget, tokens).coefficients if controlled else Coefficients()
            denominator = budget.tokens if controlled else len(tokens)
            loss = policy_loss(tokens, Unclipped(), coefficients, mode="token_budget", denominator=denominator)
            (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            norms[controlled].append(float(grad.norm()))
    spreads = {k: torch.tensor(v).std() / torch.tensor(v).mean() for k, v in norms.items()}
    assert spreads[True] < 0.15 and spreads[False] > 0.35, spreads  # 64 directions: 1 / sqrt(128) = 0.09
