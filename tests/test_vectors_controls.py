"""Worked cases (see test_vectors.py) of STEER, Clip_B, Clip_V and the token budget."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_vectors import EXACT, VECTORS, cases, check_loss, ppo, setup, tensor
from torch import Tensor

from rlvr.budget import kept_tokens
from rlvr.controls import Control, Outcome, apply
from rlvr.controls.budget import TokenBudget
from rlvr.controls.discriminator import ClipB, ClipV, discriminator, spread
from rlvr.controls.steer import Steer, estimated_change
from rlvr.objective import policy_loss
from rlvr.surrogates import Clipped, PpoClip
from rlvr.types import LocalReduce, Tokens

FIELDS = {"entropy": "entropy", "E_S": "mean_discriminator"}


def tokens_of(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tokens]:
    """(padded log-probs that carry the gradient, mask, tokens with entropy and E_S where the case has them)"""
    logps, mask, tokens = setup(case)
    known = {ours: tensor(case["inputs"][theirs])[mask] for theirs, ours in FIELDS.items() if theirs in case["inputs"]}
    return logps, mask, replace(tokens, **known)


def decided(control: Control, tokens: Tokens, clipped: Clipped | None = None) -> Outcome:
    none = torch.zeros(len(tokens), dtype=torch.bool)
    return apply([control], tokens, clipped or Clipped(none, none), LocalReduce())


def steer_of(p: dict[str, Any]) -> Steer:
    if p["mapping"] == "linear":
        return Steer(form=p["form"], mapping="linear", min_weight=p["w_min"], max_weight=p["w_max"])
    return Steer(form=p["form"], min_weight=p["lam_min"], floor=p["denom_floor"])


@cases("steer")
def test_steer(case: dict[str, Any]) -> None:
    p, expected = case["params"], case["expected"]
    logps, mask, tokens = tokens_of(case)
    clipped = None
    if p.get("use_iclip"):
        surrogate = ppo(p)
        clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
    coefficients = decided(steer_of(p), tokens, clipped).coefficients
    assert coefficients.weight is not None
    if "omega" in expected:  # only its size matters, and the sign of the cases is that of -Omega
        omega = estimated_change(tokens, p["form"]).detach() * (1 if clipped is None else ~clipped.any)
        torch.testing.assert_close(-omega, tensor(expected["omega"])[mask], **EXACT)
        torch.testing.assert_close(coefficients.weight, tensor(expected["weight"])[mask], **EXACT)
    if "weight_without_floor" in expected:
        weight = decided(replace(steer_of(p), floor=None), tokens, clipped).coefficients.weight
        assert weight is not None
        torch.testing.assert_close(weight, tensor(expected["weight_without_floor"])[mask], **EXACT)
    if "loss" in expected:
        check_loss(case, policy_loss(tokens, ppo(p), coefficients, mode="token_mean"), logps)


@cases("clip_b")
def test_clip_b(case: dict[str, Any]) -> None:
    expected = case["expected"]
    _, mask, tokens = tokens_of(case)
    if "S" in expected:
        s = discriminator(tokens).detach()
        mean, std, _ = spread(s, LocalReduce())
        torch.testing.assert_close(s, tensor(expected["S"])[mask], **EXACT)
        torch.testing.assert_close(mean, tensor(expected["mean"]), **EXACT)
        torch.testing.assert_close(std, tensor(expected["std"]), **EXACT)
    keep = decided(ClipB(mu=case["params"]["mu"]), tokens).coefficients.keep
    assert keep is not None and torch.equal(keep, torch.tensor(expected["keep"])[mask])


@cases("clip_v")
def test_clip_v(case: dict[str, Any]) -> None:
    expected, p = case["expected"], case["params"]
    _, mask, tokens = tokens_of(case)
    if "D" in expected:
        assert tokens.mean_discriminator is not None
        d = tokens.mean_discriminator - discriminator(tokens).detach()
        torch.testing.assert_close(d, tensor(expected["D"])[mask], **EXACT)
        torch.testing.assert_close(spread(d, LocalReduce())[1], tensor(expected["std"]), **EXACT)
    keep = decided(ClipV(mu=p["mu"], max_fraction=p["max_frac"]), tokens).coefficients.keep
    assert keep is not None and torch.equal(keep, torch.tensor(expected["keep"])[mask])


def method(name: str) -> Any:
    chosen = [v for v in VECTORS.values() if v["method"] == name]
    return pytest.mark.parametrize("case", chosen, ids=lambda v: v["id"])


@method("c3po_select")
def test_token_budget_selection(case: dict[str, Any]) -> None:
    p, expected = case["params"], case["expected"]
    lengths = torch.tensor(case["inputs"]["lengths"])
    kept = kept_tokens(lengths, p["budget"], whole_responses=not p["truncate_last"])
    assert kept.tolist() == expected["kept_tokens"] and int(kept.sum()) == expected["total"]


@method("c3po_loss")
def test_token_budget_loss(case: dict[str, Any]) -> None:
    """Keys that increase with the row take the responses in the order of the case."""
    p, expected = case["params"], case["expected"]
    logps, mask, tokens = tokens_of(case)
    control = TokenBudget(tokens=p["budget"], whole_responses=not p["truncate_last"])
    outcome = decided(control, replace(tokens, key=tokens.sequence))
    keep = outcome.coefficients.keep
    assert keep is not None and torch.equal(keep, torch.tensor(expected["selected"])[mask])
    if "total" in expected:
        assert outcome.metrics["token_budget/filled"].value() == pytest.approx(
            expected["total"] / p["budget"], abs=1e-12
        )
    surrogate = PpoClip(low=p["eps"], high=p["eps"])
    loss = policy_loss(tokens, surrogate, outcome.coefficients, mode="token_budget", denominator=p["budget"])
    penalty = p["beta"] * tensor(case["inputs"]["ref_kl"])[mask][keep].sum() / p["budget"]  # a constant of the case
    check_loss(case, loss + penalty, logps)
