"""Laws of the Triton backends. `test_kernels_triton.py` runs this file in the interpreter, and on a GPU where one is.

By hand: TRITON_INTERPRET=1 python -m pytest tests/triton_cases.py, without the variable on a GPU.
"""

import pytest
import torch
from kernel_cases import (
    ALL,
    CASES,
    IGNORED,
    SMOOTH,
    Case,
    check_grads,
    check_stats,
    coefficients,
    evaluate,
    exact,
    random_case,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlvr_kernels import token_stats, triton_backend
from rlvr_kernels.backend import Backend, Head, Needs, Rows
from rlvr_kernels.sums import Slope, merge, slope

DEVICE = "cpu" if triton_backend.SIZES is triton_backend.INTERPRETER else "cuda"
BACKENDS = {"triton": triton_backend.BACKEND, "triton_fused": triton_backend.FUSED}
# Relative error of gradients. That of half precision is the rounding of dlogits, which the interpreter truncates. The
# fused forward adds products up in another order than the backward: p is off there by the rounding of large logits.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-4, torch.float32: 1e-5}
TOLERANCE_FUSED = TOLERANCE | {torch.float32: 1e-4}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def check(backend: str, case: Case, fields=ALL) -> None:
    """Statistics and gradients are those of the reference."""
    case = case.to(DEVICE)
    coef = coefficients(len(case.targets), [name for name in SMOOTH if name in fields])
    got, want = evaluate(token_stats, case, coef, want=fields, backend=backend), exact(case, coef)
    check_stats(got.stats, want.stats)
    tolerance = TOLERANCE_FUSED if backend == "triton_fused" else TOLERANCE
    check_grads(got.grads, want.grads, max(tolerance[grad.dtype] for grad in got.grads.values()))
    if {"logps", "entropy"} <= set(fields):
        assert (got.stats.logps <= 0).all() and (got.stats.entropy >= 0).all()


def problem(case: Case, start: int = 0) -> tuple[Rows, Head]:
    """What a backend is given for a case."""
    case = case.to(DEVICE)
    inv_t = torch.ones(len(case.targets), device=DEVICE)
    head = Head(case.weight, case.bias, None, 1.0, case.hidden.dtype, start)
    return Rows(case.hidden, case.targets, inv_t), head


class Largest(TorchDispatchMode):
    """The size of the largest tensor of each dtype among the results of operations."""

    def __init__(self):
        super().__init__()
        self.size: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.size[x.dtype] = max(self.size.get(x.dtype, 0), x.untyped_storage().nbytes() // x.element_size())
        return result


def gradients_of(backend: Backend, rows: Rows, head: Head, sums: Tensor, of_logits: Slope, needs=(True, True, True)):
    return backend.backward(rows, head, sums, of_logits, Needs(*needs))


@pytest.mark.parametrize("name", CASES)
def test_token_stats_are_those_of_the_reference(backend, name):
    check(backend, CASES[name]())


@pytest.mark.parametrize(("n", "d", "v"), [(16, 16, 64), (17, 17, 65), (15, 3, 63), (13, 31, 300), (40, 7, 131)])
def test_token_stats_at_and_around_the_edges_of_blocks(backend, n, d, v):
    check(backend, random_case(n, d, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ragged", "impossible", "logit_scale"])
def test_token_stats_of_half_inputs_have_float32_logits(backend, name, dtype):
    check(backend, CASES[name]().to(dtype))


@pytest.mark.parametrize("half", ["hidden", "weight"])
def test_token_stats_of_mixed_inputs_have_float32_products(backend, half):
    case = CASES["ragged"]()
    case = case._replace(**{half: getattr(case, half).bfloat16()})
    check(backend, case)


@pytest.mark.parametrize("fields", [("logps",), ("lse",), ("entropy",), ("logps", "entropy"), ("sum_p2_logp2",)])
def test_each_degree_of_gradient_alone(backend, fields):
    check(backend, CASES["logit_scale"](), (*fields, "is_greedy"))


def test_gradient_by_logits_sums_to_zero(backend):
    """With the identity as weight, hidden states are logits and their gradient is that by the logits."""
    case = random_case(20, 70, 70, spread=20.0)._replace(weight=torch.eye(70)).to(DEVICE)
    coef = coefficients(20, ("logps", "entropy"))
    grads = evaluate(token_stats, case, coef, want=("logps", "entropy"), backend=backend).grads
    assert grads["hidden"].sum(-1).abs().max() <= 1e-5


def test_tokens_without_label_or_gradient_get_exactly_zero(backend):
    case = random_case(21, 9, 70).to(DEVICE)
    case.targets[::3] = IGNORED
    coef = coefficients(21, ("logps", "entropy"))
    for of_field in coef.values():
        of_field[1::3] = 0
    got = evaluate(token_stats, case, coef, want=("logps", "entropy"), backend=backend)
    assert (got.stats.logps[::3] == 0).all() and (got.stats.entropy[::3] == 0).all()
    assert (got.grads["hidden"][::3] == 0).all() and (got.grads["hidden"][1::3] == 0).all()
    assert (got.grads["hidden"][2::3] != 0).all()


def test_no_token_with_a_label_gives_zero_gradients(backend):
    case = random_case(5, 9, 70).to(DEVICE)
    got = evaluate(token_stats, case._replace(targets=torch.full_like(case.targets, IGNORED)), backend=backend)
    assert all((grad == 0).all() for grad in got.grads.values())


def test_sums_and_gradients_of_shards_make_those_of_the_vocabulary(backend):
    functions = BACKENDS[backend]
    case, cut = random_case(19, 24, 200, bias=True), 77
    left = case._replace(weight=case.weight[:cut], bias=case.bias[:cut])
    right = case._replace(weight=case.weight[cut:], bias=case.bias[cut:])
    problems = [problem(left), problem(right, cut)]
    rows, head = problem(case)
    whole = functions.forward(rows, head, True)
    shards = merge(torch.stack([functions.forward(*shard, True) for shard in problems], 1))
    torch.testing.assert_close(shards, whole, rtol=3e-6, atol=3e-6)

    of_logits = slope(whole, {name: g.to(whole) for name, g in coefficients(19).items()})
    want = gradients_of(functions, rows, head, whole, of_logits)
    parts = [gradients_of(functions, *shard, whole, of_logits) for shard in problems]
    torch.testing.assert_close(sum(part.hidden for part in parts), want.hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.weight for part in parts]), want.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part.bias for part in parts]), want.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_not_asked_for_are_none_and_change_no_other(backend, needs):
    rows, head = problem(random_case(19, 24, 200, bias=True))
    functions = BACKENDS[backend]
    sums = functions.forward(rows, head, False)
    of_logits = slope(sums, {"entropy": torch.ones_like(rows.inv_t)})
    every = gradients_of(functions, rows, head, sums, of_logits)
    some = gradients_of(functions, rows, head, sums, of_logits, needs)
    for asked, got, want in zip(needs, some, every, strict=True):
        assert torch.equal(got, want) if asked else got is None


def test_memory_holds_neither_logits_nor_a_float32_weight(backend):
    if DEVICE == "cuda":
        pytest.skip("a tile of a GPU holds all logits of a small problem")
    n, d, v = 40, 24, 1000
    case = random_case(n, d, v).to(DEVICE, torch.bfloat16)
    with Largest() as largest:
        evaluate(token_stats, case, backend=backend)
    assert largest.size[torch.bfloat16] == v * d  # the gradient by the weight itself
    assert largest.size[torch.float32] < v * d / 4 < n * v / 4


def test_strides_of_the_inputs_do_not_matter(backend):
    functions = BACKENDS[backend]
    case = random_case(19, 24, 130, bias=True).to(DEVICE)
    strided = Case(
        hidden=case.hidden.t().contiguous().t(),
        weight=case.weight.repeat_interleave(2, 1)[:, ::2],
        targets=case.targets.repeat_interleave(2)[::2],
        bias=case.bias.repeat_interleave(2)[::2],
    )
    results = []
    for rows, head in (problem(case), problem(strided)):
        sums = functions.forward(rows, head, True)
        of_logits = slope(sums, {name: g.to(sums) for name, g in coefficients(19).items()})
        results.append((sums, *gradients_of(functions, rows, head, sums, of_logits)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_nan_stays_visible_and_in_its_row(backend):
    case = random_case(5, 16, 70, bias=True).to(DEVICE)
    case.hidden[2, 3] = torch.nan
    stats = token_stats(case.hidden, case.weight, case.targets, bias=case.bias, backend=backend)
    assert stats.logps.isnan().tolist() == stats.entropy.isnan().tolist() == [False, False, True, False, False]
    case.bias[60] = torch.nan  # one logit of each token
    stats = token_stats(case.hidden, case.weight, case.targets, bias=case.bias, backend=backend)
    assert stats.logps.isnan().all() and stats.entropy.isnan().all()


def test_sums_of_a_token_do_not_depend_on_the_other_tokens(backend):
    if backend == "triton":
        pytest.skip("the library's products may differ with their number of rows")
    rows, head = problem(random_case(37, 29, 211))
    few = Rows(*(x[:5] for x in rows))
    forward = BACKENDS[backend].forward
    assert torch.equal(forward(few, head, True), forward(rows, head, True)[:, :5])
