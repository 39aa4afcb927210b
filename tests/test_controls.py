"""The contract of an entropy control: the laws that every member of CONTROLS keeps.

A new control is one more row of CASES, in control_cases.py; test_controls_ranks.py and test_controls_meaning.py read
the table too.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from control_cases import CASES, batch
from torch import Tensor

from rlvr.controls import CONTROLS, Control, Outcome, apply, build_controls
from rlvr.controls.base import largest
from rlvr.errors import ConfigError
from rlvr.objective import policy_loss
from rlvr.surrogates import SURROGATES, Clipped, PpoClip, Surrogate
from rlvr.types import Coefficients, LocalReduce, Reduce, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
OPTIONAL = ("position", "key", "entropy", "rollout_logps", "ref_logps", "mean_discriminator")


FLOATS = ("entropy", "rollout_logps", "mean_discriminator")
every_control = pytest.mark.parametrize("name", CASES)


def test_contract_table_covers_every_control() -> None:
    assert CASES.keys() == CONTROLS.keys()
    for name, case in CASES.items():
        assert type(case.active) is type(case.neutral) is CONTROLS[name]
        assert case.active.name == name
        assert case.active.needs <= set(OPTIONAL)
        assert case.active.surrogate is None or case.active.surrogate in SURROGATES


def surrogate_of(control: Control) -> Surrogate:
    return PpoClip() if control.surrogate is None else SURROGATES[control.surrogate]()


def decide(control: Control, tokens: Tokens, reduce: Reduce | None = None) -> Outcome:
    surrogate = surrogate_of(control)
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
    return apply([control], tokens, clipped, LocalReduce() if reduce is None else reduce)


def assert_same(got: Coefficients, expected: Coefficients) -> None:
    assert got.present().keys() == expected.present().keys()
    for name, x in expected.present().items():
        y = got.present()[name]
        torch.testing.assert_close(y.double(), x.double(), **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def pick(tokens: Tokens, index: Tensor, **changes: Any) -> Tokens:
    """The tokens at `index`, in that order."""
    moved = {f.name: x[index] for f in fields(tokens) if isinstance(x := getattr(tokens, f.name), Tensor)}
    return replace(tokens, **{**moved, **changes})


@every_control
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_control_coefficients_are_sound_in_every_precision(name: str, dtype: torch.dtype) -> None:
    control, tokens = CASES[name].active, batch(dtype=dtype)
    coefficients, metrics = decide(control, tokens)
    assert coefficients.present(), "the active case does nothing"
    for x in coefficients.present().values():
        assert x.shape == (len(tokens),) and x.isfinite().all() and not x.requires_grad
    if coefficients.weight is not None:
        assert (coefficients.weight >= 0).all()
    # Not only sound but right: what the same numbers give in float64, rounded once.
    exact = {f.name: x.double() for f in fields(tokens) if (x := getattr(tokens, f.name)) is not None and is_float(x)}
    expected, expected_metrics = decide(control, replace(tokens, **exact))
    rounded = {k: x.to(coefficients.present()[k].dtype) for k, x in expected.present().items()}
    assert_same(coefficients, Coefficients(**rounded))
    for key, mean in metrics.items():
        assert mean.value() == pytest.approx(expected_metrics[key].value(), abs=1e-10)
    loss = policy_loss(tokens, surrogate_of(control), coefficients, mode="token_mean")
    (grad,) = torch.autograd.grad(loss, tokens.logps)
    assert loss.isfinite() and grad.isfinite().all()
    assert all(key.startswith(f"{name}/") and mean.count == len(tokens) for key, mean in metrics.items())


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@every_control
def test_gradient_flows_to_log_probs_and_through_a_bonus_to_entropy(name: str) -> None:
    control, tokens = CASES[name].active, batch()
    leaves = {f: getattr(tokens, f).detach().requires_grad_() for f in (*FLOATS, "advantages", "old_logps", "logps")}
    tokens = replace(tokens, **leaves)
    coefficients = decide(control, tokens).coefficients
    loss = policy_loss(tokens, surrogate_of(control), coefficients, mode="token_mean")
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    assert grads["logps"] is not None and (grads["logps"] != 0).any()
    assert (grads["entropy"] is not None) == (coefficients.entropy is not None)
    assert grads["mean_discriminator"] is None and grads["rollout_logps"] is None


@every_control
def test_active_control_changes_the_loss(name: str) -> None:
    control, tokens = CASES[name].active, batch()
    losses = [
        policy_loss(tokens, surrogate_of(control), c, mode="token_mean")
        for c in (decide(control, tokens).coefficients, Coefficients())
    ]
    assert losses[0] != losses[1]


@every_control
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_neutral_control_is_bit_identical_to_none(name: str, surrogate: str, dtype: torch.dtype) -> None:
    tokens, objective = batch(dtype=dtype), SURROGATES[surrogate]()
    if CASES[name].engine_agrees:
        tokens = replace(tokens, rollout_logps=tokens.old_logps)
    results = []
    for coefficients in (decide(CASES[name].neutral, tokens).coefficients, Coefficients()):
        loss = policy_loss(tokens, objective, coefficients, mode="seq_mean_token_mean")
        results.append((loss, *torch.autograd.grad(loss, tokens.logps)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@every_control
def test_permuted_tokens_permute_the_result(name: str) -> None:
    control = CASES[name].active
    for seed in range(5):
        tokens = batch(seed)
        expected, metrics = decide(control, tokens)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(tokens), generator=generator)
        renumbered = torch.randperm(24, generator=generator)[tokens.sequence[order]]
        got, permuted_metrics = decide(control, pick(tokens, order, sequence=renumbered))
        assert_same(got, Coefficients(**{k: x[order] for k, x in expected.present().items()}))
        for key, mean in metrics.items():
            assert permuted_metrics[key].value() == pytest.approx(mean.value(), abs=1e-10)


@every_control
def test_permuted_ties_go_to_the_same_tokens(name: str) -> None:
    """All log-probs and advantages equal: only the keys can tell tokens apart."""
    tokens = batch()
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    tokens = replace(tokens, logps=zeros - 1, old_logps=zeros - 1, advantages=zeros)
    expected = decide(CASES[name].active, tokens).coefficients
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    got = decide(CASES[name].active, pick(tokens, order)).coefficients
    assert_same(got, Coefficients(**{k: x[order] for k, x in expected.present().items()}))


@every_control
def test_control_needs_only_the_fields_it_names(name: str) -> None:
    control, tokens = CASES[name].active, batch()
    bare = replace(tokens, **dict.fromkeys(set(OPTIONAL) - control.needs))
    assert_same(decide(control, bare).coefficients, decide(control, tokens).coefficients)
    for field in control.needs:
        with pytest.raises(ValueError, match=field):
            decide(control, replace(tokens, **{field: None}))


@every_control
def test_same_keys_same_result(name: str) -> None:
    case = CASES[name]
    first, again, other = (decide(case.active, batch(key_seed=seed)).coefficients for seed in (0, 0, 1))
    assert_same(first, again)
    differs = any(not torch.equal(x, other.present()[k]) for k, x in first.present().items())
    assert differs == case.draws


@every_control
def test_control_accepts_any_number_of_tokens(name: str) -> None:
    control, tokens = CASES[name].active, batch()
    for n in (0, 1, 2, 3):
        few = pick(tokens, torch.arange(n))
        coefficients, metrics = decide(control, few)
        assert all(x.shape == (n,) and x.isfinite().all() for x in coefficients.present().values())
        for mode in ("token_mean", "seq_mean_token_mean"):
            loss = policy_loss(few, surrogate_of(control), coefficients, mode=mode)  # type: ignore[arg-type]
            (grad,) = torch.autograd.grad(loss, tokens.logps, retain_graph=True)
            assert loss.isfinite() and grad.isfinite().all()
            if n == 0:
                assert loss == 0 and (grad == 0).all()
        assert all(mean.count == n for mean in metrics.values())


@every_control
@pytest.mark.parametrize("advantage", (0.0, 0.7, -0.7))
def test_control_accepts_equal_advantages(name: str, advantage: float) -> None:
    tokens = batch()
    equal = replace(tokens, advantages=torch.full_like(tokens.advantages, advantage))
    coefficients = decide(CASES[name].active, equal).coefficients
    assert all(x.isfinite().all() for x in coefficients.present().values())


@every_control
def test_bad_hyper_parameters_are_refused_by_name(name: str) -> None:
    case = CASES[name]
    for field, value in case.refused.items():
        with pytest.raises(ValueError, match=f"{field}="):
            replace(case.active, **{field: value})  # type: ignore[type-var]
        with pytest.raises(ConfigError, match=rf"controls {name}: .*{field}=") as raised:
            build_controls([{"name": name, field: value}])
        assert "\n" not in str(raised.value)


def test_apply_combines_controls_and_keeps_their_metrics() -> None:
    tokens = batch()
    none = torch.zeros(len(tokens), dtype=torch.bool)
    controls = [case.active for case in CASES.values()]
    both = apply(controls, tokens, Clipped(none, none), LocalReduce())
    alone = [apply([c], tokens, Clipped(none, none), LocalReduce()) for c in controls]
    combined = Coefficients()
    for outcome in alone:
        combined = combined.combine(outcome.coefficients)
    assert_same(both.coefficients, combined)
    assert both.metrics.keys() == {key for outcome in alone for key in outcome.metrics}


def test_largest_equals_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (0, 1, 2, 7, 40):
        for values in (2, 5, 1000):  # few values: many ties
            score = torch.randint(-values, values, (n,), generator=generator).double() / 8
            key = torch.randperm(n, generator=generator)
            for k in (0, 1, 2, 5, n, n + 3):
                best = sorted(range(n), key=lambda i, s=score, q=key: (float(s[i]), int(q[i])), reverse=True)[:k]
                expected = torch.zeros(n, dtype=torch.bool)
                expected[best] = True
                assert torch.equal(largest(score, key, k, LocalReduce()), expected)
