"""The critic's loss: by hand, its gradient, and what the clip may do."""

from typing import Any

import pytest
import torch
from test_vectors import EXACT, NUMERICAL_GRADIENT, cases, tensor
from torch import Tensor

from rlvr.objective import value_loss


def critic(number: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """(values, old values, returns), which lie on either side of each other."""
    draw = torch.Generator().manual_seed(3)
    values, old, returns = torch.randn(3, number, generator=draw, dtype=torch.float64)
    return values.requires_grad_(), old, returns


@cases("value_loss")
def test_value_loss_of_the_worked_cases(case: dict[str, Any]) -> None:
    values, old, returns = (tensor(case["inputs"][name]) for name in ("vpred", "v_old", "returns"))
    mask, expected = tensor(case["inputs"]["mask"]).bool(), case["expected"]
    values.requires_grad_()
    loss = value_loss(values[mask], old[mask], returns[mask], cliprange=case["params"]["clip"]).loss.mean()
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **EXACT)
    if "loss_noclip" in expected:
        free = value_loss(values[mask], old[mask], returns[mask], cliprange=None).loss.mean()
        torch.testing.assert_close(free.detach(), tensor(expected["loss_noclip"]), **EXACT)
    if "grad_vpred" in expected:
        (grad,) = torch.autograd.grad(loss, values)
        torch.testing.assert_close(grad, tensor(expected["grad_vpred"]), **NUMERICAL_GRADIENT)


def test_value_loss_by_hand() -> None:
    """Old value 0, clip 0.5: it stops what went too far towards the return 2, not what stayed near or went away."""
    values = torch.tensor([0.25, 0.5, 1.0, -1.0, 3.0], requires_grad=True)
    loss, clipped = value_loss(values, torch.zeros(5), torch.full((5,), 2.0), cliprange=0.5)
    # 1.75^2 / 2, 1.5^2 / 2, then the clipped (0.5 - 2)^2 / 2 > 1 / 2, the free 3^2 / 2, the clipped 1.5^2 / 2 > 1 / 2
    assert loss.tolist() == [1.53125, 1.125, 1.125, 4.5, 1.125]
    assert clipped.tolist() == [False, False, True, False, True]
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert grad.tolist() == [-1.75, -1.5, 0.0, -3.0, 0.0]


def test_value_loss_is_the_maximum_of_both_errors() -> None:
    values, old, returns = critic()
    loss, clipped = value_loss(values, old, returns, cliprange=0.3)
    free = (values - returns) ** 2 / 2
    held = (old + (values - old).clamp(-0.3, 0.3) - returns) ** 2 / 2
    torch.testing.assert_close(loss, torch.maximum(free, held), **EXACT)
    assert (loss >= free).all()
    assert 0 < int(clipped.sum()) < len(values)
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert torch.equal(grad == 0, clipped)
    torch.testing.assert_close(grad[~clipped], (values - returns)[~clipped].detach(), **EXACT)


def test_value_loss_under_a_wide_clip_is_the_squared_error() -> None:
    values, old, returns = critic()
    free, wide = (value_loss(values, old, returns, cliprange=c) for c in (None, 100.0))
    assert torch.equal(free.loss, (values - returns) ** 2 / 2)
    assert torch.equal(wide.loss, free.loss)
    assert not bool(free.clipped.any() | wide.clipped.any())


def test_value_loss_at_the_start_of_an_update_is_not_clipped() -> None:
    _, old, returns = critic()
    assert not value_loss(old, old, returns, cliprange=1e-9).clipped.any()


def test_value_loss_has_a_gradient_to_values_alone() -> None:
    values, old, returns = critic()
    value_loss(values, old.requires_grad_(), returns.requires_grad_(), cliprange=0.3).loss.sum().backward()
    assert values.grad is not None and old.grad is None and returns.grad is None


def test_value_loss_of_bfloat16_is_computed_in_float32() -> None:
    half = [x.detach().bfloat16() for x in critic()]
    got = value_loss(*half, cliprange=0.3)
    assert got.loss.dtype == torch.float32
    assert torch.equal(got.loss, value_loss(*(x.float() for x in half), cliprange=0.3).loss)


def test_value_loss_refuses_what_it_cannot_mean() -> None:
    x = torch.zeros(3)
    for cliprange in (0.0, -0.2, float("nan")):
        with pytest.raises(ValueError, match=f"cliprange={cliprange}: must be > 0, or None not to clip"):
            value_loss(x, x, x, cliprange=cliprange)
    with pytest.raises(ValueError, match=r"must all be \[N\], got \(3,\), \(3,\), \(1,\)"):
        value_loss(x, x, x[:1], cliprange=None)
