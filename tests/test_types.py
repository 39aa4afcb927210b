"""Laws of the values that travel between the stages."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rlvr.types import Coefficients, Mean, Tokens, token_keys

MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])


def coefficients(seed: int, n: int = 6) -> Coefficients:
    """Every coefficient, with numbers whose sums and products are exact."""
    draw = torch.randint(1, 9, (6, n), generator=torch.Generator().manual_seed(seed)).double()
    return Coefficients(
        weight=draw[0], keep=draw[1] > 3, advantage=draw[2], drift=draw[3], entropy=draw[4], reference=draw[5]
    )


def same(a: Coefficients, b: Coefficients) -> bool:
    mine, theirs = a.present(), b.present()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_combine_is_associative_and_commutative_with_a_neutral_element() -> None:
    for seed, present in itertools.product(range(3), ((), ("weight", "keep"), ("drift", "entropy", "weight"))):
        a, c = coefficients(seed), coefficients(seed + 20)
        b = Coefficients(**{k: x for k, x in coefficients(seed + 10).present().items() if k in present})
        assert same(a.combine(b).combine(c), a.combine(b.combine(c)))
        assert same(a.combine(b), b.combine(a))
        assert same(a.combine(Coefficients()), a)
        assert same(Coefficients().combine(a), a)


def test_combine_multiplies_weights_and_adds_the_rest() -> None:
    a, b = coefficients(0), coefficients(1)
    both = a.combine(b).present()
    for name, x in a.present().items():
        y = b.present()[name]
        expected = {"weight": lambda x, y: x * y, "keep": lambda x, y: x & y}.get(name, lambda x, y: x + y)(x, y)
        assert torch.equal(both[name], expected)


def test_coefficients_refuse_a_gradient() -> None:
    for f in fields(Coefficients):
        if f.name != "keep":
            with pytest.raises(ValueError, match="detached"):
                Coefficients(**{f.name: torch.ones(2, requires_grad=True)})


def test_coefficients_select_spends_keep() -> None:
    chosen = coefficients(0).select(torch.tensor([True, False, True, False, False, True]))
    assert chosen.keep is None
    assert {name: x.numel() for name, x in chosen.present().items()} == dict.fromkeys(
        ("weight", "advantage", "drift", "entropy", "reference"), 3
    )


def test_from_padded_takes_valid_tokens_in_order() -> None:
    logps = torch.arange(9.0).view(3, 3)
    for advantages in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]])):
        tokens = Tokens.from_padded(MASK, logps=logps, old_logps=logps, advantages=advantages, entropy=None)
        assert tokens.logps.tolist() == [0.0, 2.0, 6.0, 7.0]
        assert tokens.advantages.tolist() == [1.0, 1.0, 3.0, 3.0]
        assert tokens.sequence.tolist() == [0, 0, 2, 2]
        assert (len(tokens), tokens.num_sequences, tokens.entropy) == (4, 3, None)
    integers = Tokens.from_padded(MASK.long(), logps=logps, old_logps=logps, advantages=advantages)
    assert torch.equal(integers.logps, tokens.logps)


def test_from_padded_carries_the_gradient_to_valid_positions() -> None:
    logps = torch.zeros(3, 3, requires_grad=True)
    tokens = Tokens.from_padded(MASK, logps=logps, old_logps=logps.detach(), advantages=torch.zeros(3))
    (grad,) = torch.autograd.grad(tokens.logps.sum(), logps)
    assert torch.equal(grad, MASK.float())


def test_tokens_select_keeps_row_numbers() -> None:
    logps = torch.arange(9.0).view(3, 3)
    tokens = Tokens.from_padded(MASK, logps=logps, old_logps=logps, advantages=torch.tensor([1.0, 2.0, 3.0]))
    chosen = tokens.select(torch.tensor([False, True, False, True]))
    assert chosen.logps.tolist() == [2.0, 7.0]
    assert chosen.sequence.tolist() == [0, 2]
    assert (chosen.num_sequences, chosen.key) == (3, None)


def test_tokens_refuse_shapes_that_differ() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"Tokens\.old_logps has shape \(3,\)"):
        Tokens(logps=x, old_logps=x[:3], advantages=x, sequence=x.long(), num_sequences=1)
    y = x.view(2, 2)
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        Tokens(logps=y, old_logps=y, advantages=y, sequence=y.long(), num_sequences=1)


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row, column


def test_token_keys_are_uniform() -> None:
    for seed, step in ((0, 0), (1, 0), (42, 7)):
        keys = token_keys(seed, step, *grid(256, 256)).flatten()
        assert int(keys.min()) >= 0 and int(keys.max()) < 2**53
        assert keys.unique().numel() == keys.numel()  # 2^16 draws of 2^53: a repetition has odds of 2e-7
        for bits in (keys >> 45, keys & 255):  # 255 degrees of freedom: mean 255, standard deviation 22.6
            counts = torch.bincount(bits, minlength=256).double()
            chi_square = float(((counts - 256) ** 2 / 256).sum())
            assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6


def test_token_keys_of_neighbors_are_uncorrelated() -> None:
    keys = token_keys(0, 0, *grid(256, 256)).double() / 2**53 - 0.5
    for a, b in ((keys[1:], keys[:-1]), (keys[:, 1:], keys[:, :-1]), (keys, keys.T)):
        # a product of two centered uniforms has standard deviation 1/12; 5 of the mean's
        assert abs(float((a * b).mean())) < 5 / 12 / a.numel() ** 0.5


def test_token_keys_do_not_depend_on_the_batch() -> None:
    row, column = grid(8, 5)
    keys = token_keys(3, 4, row, column)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_keys(3, 4, row[order], column[order]), keys[order])
    assert torch.equal(token_keys(3, 4, row[5:, 2:], column[5:, 2:]), keys[5:, 2:])
    assert torch.equal(token_keys(3, 4, row.int(), column.int()), keys)


def test_token_keys_differ_by_seed_step_sequence_and_position() -> None:
    row, column = grid(64, 64)
    runs = [token_keys(seed, step, row, column) for seed in (0, 1, 2, -1, 2**40) for step in (0, 1, 2)]
    assert torch.stack(runs).unique().numel() == len(runs) * row.numel()
    assert not (token_keys(0, 0, row, column) == token_keys(0, 0, column, row)).triu(1).any()


def test_mean_adds_totals_and_counts() -> None:
    a, b = Mean.of(torch.tensor([1.0, 2.0, 6.0])), Mean.of(torch.tensor([True]))
    assert (a.value(), b.value(), (a + b).value()) == (3.0, 1.0, 2.5)  # (9 + 1) / (3 + 1), not (3 + 1) / 2
    nothing = Mean.of(torch.zeros(0))
    assert math.isnan(nothing.value())
    assert (a + nothing).value() == 3.0
