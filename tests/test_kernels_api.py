"""token_stats as a differentiable function: what costs nothing, what is saved, what is refused, and which backend."""

import gc
import math
import weakref

import pytest
import torch
from kernel_cases import ALL, CASES, IGNORED, SMOOTH, check_grads, coefficients, evaluate, exact, random_case
from torch.nn.functional import embedding

from rlvr_kernels import choose_backend, chunked, reference, token_stats
from rlvr_kernels.backend import Backend
from rlvr_kernels.stats import WITHOUT_GRADIENT


@pytest.fixture
def reached(monkeypatch):
    """What reaches the backend: {"forward": numbers of rows, "backward": numbers of rows, "needs": ...}."""
    seen = {"forward": [], "backward": [], "needs": []}

    def forward(rows, *rest):
        seen["forward"].append(len(rows.hidden))
        return original.forward(rows, *rest)

    def backward(rows, head, sums, slope, needs):
        seen["backward"].append(len(rows.hidden))
        seen["needs"].append(tuple(needs))
        return original.backward(rows, head, sums, slope, needs)

    original = chunked.BACKEND
    monkeypatch.setattr(chunked, "BACKEND", Backend(forward, backward))
    return seen


def leaves(case):
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()


def test_tokens_without_a_label_or_without_a_coefficient_cost_nothing_and_get_zero(reached):
    case = random_case(10, 4, 17)
    case = case._replace(targets=case.targets.index_fill(0, torch.tensor([0, 1, 2]), IGNORED))
    coef = coefficients(10)
    for c in coef.values():
        c[[3, 7]] = 0.0
    got = evaluate(token_stats, case, coef)
    assert (reached["forward"], reached["backward"]) == ([7], [5])
    assert all(not x[:3].any() for x in got.stats)
    assert torch.equal(got.grads["hidden"][[0, 1, 2, 3, 7]], torch.zeros(5, 4))
    check_grads(got.grads, exact(case, coef).grads)


def test_ignored_rows_may_hold_anything():
    """Padding is often not a number: it must reach neither the statistics nor the weight's gradient."""
    case = CASES["partly_labeled"]()
    want = evaluate(token_stats, case)
    padding = case.targets == IGNORED
    got = evaluate(token_stats, case._replace(hidden=case.hidden.masked_fill(padding[:, None], torch.nan)))
    assert all(torch.equal(a, b) for a, b in zip(got.stats, want.stats, strict=True))
    assert all(torch.equal(got.grads[name], want.grads[name]) for name in want.grads)


@pytest.mark.parametrize("n", [0, 4])
def test_no_labels_at_all_are_zeros_and_zero_gradients(n):
    case = random_case(4, 3, 5, bias=True)
    case = case._replace(hidden=case.hidden[:n], targets=torch.full((n,), IGNORED))
    got = evaluate(token_stats, case)
    assert all(x.shape == (n,) and not x.any() for x in got.stats)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(got.grads[name], torch.zeros_like(getattr(case, name)))


def test_ignore_index_is_any_number():
    case = CASES["partly_labeled"]()
    moved = case._replace(targets=case.targets.masked_fill(case.targets == IGNORED, 96), options={"ignore_index": 96})
    case = case._replace(targets=case.targets.masked_fill(moved.targets == 96, IGNORED))
    got, want = evaluate(token_stats, moved), evaluate(token_stats, case)
    assert all(torch.equal(a, b) for a, b in zip(got.stats, want.stats, strict=True))


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias", "weight"), ("hidden", "weight")])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen, reached):
    """A frozen head, as under LoRA, skips the largest product of the backward pass."""
    case = CASES["bias"]()
    want = evaluate(token_stats, case, want=SMOOTH).grads
    inputs = {k: getattr(case, k).clone().requires_grad_(k not in frozen) for k in ("hidden", "weight", "bias")}
    stats = token_stats(inputs["hidden"], inputs["weight"], case.targets, bias=inputs["bias"], want=SMOOTH)
    coef = coefficients(len(case.targets))
    sum((coef[name].float() * getattr(stats, name)).sum() for name in SMOOTH).backward()
    assert reached["needs"][-1] == tuple(name not in frozen for name in inputs)
    for name, x in inputs.items():
        assert x.grad is None if name in frozen else torch.equal(x.grad, want[name])


def test_tied_embeddings_get_the_sum_of_both_gradients():
    case = random_case(12, 8, 31)
    tokens = torch.arange(12) % 31
    grads = []
    for function in (token_stats, reference.token_stats):
        weight = case.weight.double().requires_grad_()
        stats = function(embedding(tokens, weight).tanh(), weight, case.targets)
        (stats.logps.sum() + 0.3 * stats.entropy.square().sum()).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_one_field_gives_the_same_in_any_company_and_order():
    case = CASES["logit_scale"]()
    coef = coefficients(len(case.targets), ["entropy"])
    alone = evaluate(token_stats, case, coef, want=["entropy"])
    for want in (SMOOTH, SMOOTH[::-1], set(ALL), ("entropy", "entropy")):
        got = evaluate(token_stats, case, coef, want=want)
        assert torch.equal(got.stats.entropy, alone.stats.entropy)
        assert all(torch.equal(got.grads[name], alone.grads[name]) for name in alone.grads)


def test_fields_are_those_wanted_and_only_two_have_no_gradient():
    hidden, weight = leaves(random_case(3, 4, 5))
    stats = token_stats(hidden, weight, torch.tensor([0, 1, 2]))
    assert [name for name in ALL if getattr(stats, name) is not None] == ["logps", "entropy"]
    stats = token_stats(hidden, weight, torch.tensor([0, 1, 2]), want=ALL)
    assert [name for name in ALL if not getattr(stats, name).requires_grad] == list(WITHOUT_GRADIENT)


def test_backward_twice_gives_the_same_bits():
    hidden, weight = leaves(random_case(9, 4, 37))
    stats = token_stats(hidden, weight, torch.arange(9), want=SMOOTH)
    loss = sum(x.sum() for x in stats if x is not None)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True))


def test_second_derivatives_are_refused():
    hidden, weight = leaves(random_case(3, 4, 5))
    stats = token_stats(hidden, weight, torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match=r"no second derivatives: .* without create_graph"):
        torch.autograd.grad(stats.entropy.sum(), hidden, create_graph=True)


def test_weight_changed_in_place_before_the_backward_pass_is_refused():
    """The tiles are formed again from it: an optimizer step in between would give the gradient of nothing."""
    hidden, weight = leaves(random_case(3, 4, 5))
    loss = token_stats(hidden, weight, torch.tensor([0, 1, 2])).logps.sum()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_targets_changed_in_place_before_the_backward_pass_are_refused():
    case = random_case(5, 8, 30)
    hidden, targets = case.hidden.requires_grad_(), case.targets.clone()
    stats = token_stats(hidden, case.weight, targets)
    targets.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.logps.sum().backward()


def test_a_token_without_a_gradient_does_not_spoil_the_weight_s():
    """Not even one that is NaN."""
    case = random_case(4, 8, 30)
    case.hidden[1] = math.nan
    weight = case.weight.requires_grad_()
    entropy = token_stats(case.hidden, weight, case.targets).entropy
    torch.where(torch.arange(4) == 1, 0.0, entropy).sum().backward()
    assert weight.grad.isfinite().all()


def test_a_compiled_caller_gets_the_same():
    case = random_case(5, 8, 30)
    hidden = case.hidden.requires_grad_()

    def loss(x):
        return token_stats(2 * x, case.weight, case.targets).entropy.sum()

    (want,) = torch.autograd.grad(loss(hidden), hidden)
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(hidden), hidden)
    torch.testing.assert_close(found, want)


def test_want_may_be_any_collection_or_iterator():
    case = random_case(5, 8, 30)
    found = token_stats(case.hidden, case.weight, case.targets, want=(name for name in ("logps",)))
    assert found.logps is not None and found.entropy is None


def test_hidden_states_of_no_width_are_uniform():
    found = token_stats(torch.zeros(3, 0), torch.zeros(5, 0), torch.tensor([0, 1, 2]))
    assert found.logps.tolist() == pytest.approx([-math.log(5)] * 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_saved_where_no_gradient_is_wanted(mode):
    hidden, weight = leaves(random_case(3, 4, 5))
    with mode():
        copy = hidden * 1.0
        kept = weakref.ref(copy)
        stats = token_stats(copy, weight, torch.tensor([0, 1, 2]))
    del copy
    gc.collect()
    assert kept() is None
    assert not stats.logps.requires_grad


def test_inputs_are_not_changed():
    case = CASES["logit_scale"]()
    before = case.to(torch.float32)._replace(
        hidden=case.hidden.clone(), weight=case.weight.clone(), bias=case.bias.clone()
    )
    evaluate(token_stats, case)
    assert all(torch.equal(a, b) for a, b in zip(case[:4], before[:4], strict=True))


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    case = random_case(9, 8, 37)
    want = evaluate(token_stats, case)
    hidden = torch.stack([case.hidden, case.hidden], 1)[:, 1]
    stats = token_stats(hidden, case.weight.T.contiguous().T, case.targets, want=ALL)
    for a, b in zip(stats, want.stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"got \(2, 4\), \(5, 3\) and \(2,\)"),
        ({"hidden": torch.zeros(1, 2, 3)}, r"want hidden \[N, D\]"),
        ({"weight": torch.zeros(3)}, r"want hidden \[N, D\], weight \[V, D\]"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"and \(3,\)"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "int64 targets, got .*torch.int32"),
        ({"targets": torch.tensor([0, 5])}, r"targets has 5: want numbers in \[0, 5\) or ignore_index=-100"),
        ({"targets": torch.tensor([0, -1])}, "targets has -1"),
        ({"targets": torch.tensor([0, -100]), "ignore_index": -1}, "targets has -100.*ignore_index=-1"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.long)}, "floating-point hidden"),
        ({"weight": torch.zeros(5, 3, dtype=torch.int8)}, "torch.int8"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\).*5 tokens"),
        ({"bias": torch.zeros(5, dtype=torch.long)}, "bias.*torch.int64"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": torch.tensor([1.0, math.nan])}, "temperature=.*must be > 0 and finite"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\).*2 tokens"),
        ({"softcap": 0.0}, "softcap=0.0 must be > 0"),
        ({"softcap": math.inf}, "softcap=inf must be > 0 and finite, or None"),
        ({"logit_scale": math.nan}, "logit_scale=nan must be > 0"),
        ({"logit_scale": 0.0}, "logit_scale=0.0 must be > 0"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be > 0"),
        ({"temperature": torch.tensor(1e-39)}, "and so must its inverse in torch.float32"),
        ({"temperature": torch.ones(2, requires_grad=True)}, "wants a gradient"),
        ({"want": "logps"}, "want='logps'"),
        ({"want": ()}, "want="),
        ({"want": ["logp"]}, "'logp'.* choose from logps, entropy"),
        ({"backend": "cuda"}, "backend='cuda' is not known; choose from auto, chunked"),
        ({"vocab_start": 5}, "vocab_start=5 .*group"),
    ],
)
def test_bad_arguments_are_refused_with_the_value_and_the_fix(change, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS} | change
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)


@pytest.mark.parametrize("backend", ["triton", "triton_fused"])
def test_triton_on_a_cpu_is_refused_outside_its_interpreter(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot run here: .* on a CPU; use 'auto' or 'chunked'"):
        token_stats(HIDDEN, WEIGHT, TARGETS, backend=backend)


@pytest.mark.parametrize(
    ("interpret", "device", "dtype", "name", "why"),
    [
        ("0", "cpu", torch.float32, "chunked", "the tensors are on a CPU"),
        ("1", "cpu", torch.float32, "chunked", "interpreter, which is for tests"),
        ("0", "meta", torch.float32, "chunked", "the tensors are on meta"),
    ],
)
def test_choose_backend_says_why(interpret, device, dtype, name, why, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    x = torch.zeros(2, 3, device=device, dtype=dtype)
    choice = choose_backend(x, x)
    assert choice.name == name
    assert why in choice.why
