"""rlvr_kernels.reference against sums written out by hand, and its promises about -inf, signs and gradients."""

import math

import pytest
import torch
from kernel_cases import (
    ALL,
    CASES,
    GRADIENT_TOLERANCE,
    IGNORED,
    INF,
    SMOOTH,
    brute_force,
    check_grads,
    check_stats,
    evaluate,
    exact,
    random_case,
)

from rlvr_kernels import logit_stats
from rlvr_kernels.reference import token_stats

DOUBLE = torch.float64


@pytest.mark.parametrize("name", CASES)
def test_token_stats_equals_brute_force(name):
    case = CASES[name]().to(DOUBLE)
    check_stats(evaluate(token_stats, case).stats, brute_force(case), tolerance=1e-12)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_token_stats_of_lower_precision_is_exact_about_its_inputs(name, dtype):
    """Logits are not rounded to the precision of the inputs, under autocast either: only float32's rounding remains.

    Here log p = z - lse rounds at the size of the logits, so shifting them by 500 costs accuracy in the gradient.
    """
    case = CASES[name]().to(dtype)
    got = evaluate(torch.autocast("cpu", dtype=torch.bfloat16)(token_stats), case)
    want = exact(case)
    assert got.stats.entropy.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    check_stats(got.stats, want.stats)
    check_grads(got.grads, want.grads, 1e-4 if name.startswith("shifted") and dtype == torch.float32 else None)


def test_entropy_worked_numbers():
    """Worked by hand: p of row 0 is e^2, e, 1, 1/e over their sum 11.475217; row 1 is uniform, H = ln 4."""
    logits = torch.tensor([[2.0, 1, 0, -1], [0, 0, 0, 0], [10, 0, 0, 0]], dtype=DOUBLE, requires_grad=True)
    stats = logit_stats(logits, torch.zeros(3, dtype=torch.long), want=ALL)
    torch.testing.assert_close(
        stats.entropy,
        torch.tensor([0.9475369639754255, 1.3862943611198906, 0.0014980029292489647], dtype=DOUBLE),
        rtol=1e-10,
        atol=0.0,
    )
    mean_discriminator = stats.sum_p2_logp + stats.entropy * stats.sum_p2
    torch.testing.assert_close(
        mean_discriminator,
        torch.tensor([0.16881746072761752, 0.0, 0.001361379723605602], dtype=DOUBLE),
        rtol=1e-10,
        atol=1e-15,
    )
    (grad,) = torch.autograd.grad(stats.entropy.sum(), logits)
    tail = 0.0004538756536684968
    want = [
        [-0.3266881389153907, 0.11670096810837767, 0.13007620567390885, 0.07991096513310417],
        [0.0, 0.0, 0.0, 0.0],
        [-0.0013616269610054904, tail, tail, tail],
    ]
    torch.testing.assert_close(grad, torch.tensor(want, dtype=DOUBLE), rtol=1e-10, atol=1e-15)


def test_moments_worked_numbers():
    """p = (1/2, 1/4, 1/4), log p = -(1, 2, 2) ln 2: the sums are (1/4 + 2/16), (1/2 + 4/2) ln^2 2, and so on."""
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=DOUBLE) * math.log(2)
    stats = logit_stats(logits, torch.tensor([1]), want=ALL)
    ln2 = math.log(2)
    want = {
        "logps": -2 * ln2,
        "entropy": 1.5 * ln2,
        "lse": 3 * ln2,
        "sum_p2": 3 / 8,
        "sum_p_logp2": 2.5 * ln2**2,
        "sum_p2_logp": -0.5 * ln2,
        "sum_p2_logp2": 0.75 * ln2**2,
        "p_max": 0.5,
        "is_greedy": False,
    }
    assert {name: getattr(stats, name).item() for name in ALL} == pytest.approx(want, rel=1e-12)


def test_entropy_gradient_is_minus_p_times_logp_plus_entropy():
    case = random_case(4, 5, 9).to(DOUBLE)
    logits = (case.hidden @ case.weight.T).requires_grad_()
    entropy = logit_stats(logits, case.targets, temperature=0.8).entropy
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    logp = (logits.detach() / 0.8).log_softmax(-1)
    want = -logp.exp() * (logp + entropy.detach().unsqueeze(-1)) / 0.8
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_logps_gradient_is_target_minus_p():
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE, requires_grad=True)  # p = (3/4, 1/4)
    (grad,) = torch.autograd.grad(logit_stats(logits, torch.tensor([1])).logps, logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.75, 0.75]], dtype=DOUBLE), rtol=1e-12, atol=0.0)


def test_logit_stats_of_minus_inf_is_that_of_the_vocabulary_without_it():
    finite = torch.tensor([[1.0, 0.0], [-3.0, 2.0]], dtype=DOUBLE, requires_grad=True)
    padded = torch.tensor([[1.0, -INF, 0.0, -INF], [-3.0, -INF, 2.0, -INF]], dtype=DOUBLE, requires_grad=True)
    want = logit_stats(finite, torch.tensor([0, 1]), want=ALL)
    got = logit_stats(padded, torch.tensor([0, 2]), want=ALL)
    assert got.entropy[0].item() == pytest.approx(0.5822031088882179, rel=1e-12)
    for name in ALL:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=0.0)
    for name in SMOOTH:
        (grad,) = torch.autograd.grad(getattr(got, name).sum(), padded, retain_graph=True)
        (grad_finite,) = torch.autograd.grad(getattr(want, name).sum(), finite, retain_graph=True)
        assert torch.equal(grad[:, [1, 3]], torch.zeros(2, 2, dtype=DOUBLE)), name
        torch.testing.assert_close(grad[:, [0, 2]], grad_finite, rtol=1e-12, atol=1e-15)


def test_logit_stats_impossible_target_has_log_prob_minus_inf_and_no_nan():
    logits = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    stats = logit_stats(logits, torch.tensor([1]), want=ALL)
    assert stats.logps.item() == -INF
    assert not stats.is_greedy.item()
    assert stats.entropy.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(stats.logps.sum(), logits)
    assert grad.tolist() == [[-0.5, 0.0, -0.5]]


@pytest.mark.parametrize("row", [[-INF, 0.0, -INF], [0.0, 200.0, -200.0], [1e30, -1e30, 0.0], [-1e4, -1e4, -1e4]])
def test_logit_stats_extreme_rows_stay_finite_and_signed(row):
    logits = torch.tensor([row], requires_grad=True)
    stats = logit_stats(logits, logits.argmax(-1), want=ALL)
    assert stats.logps.item() <= 0
    assert stats.is_greedy.item()
    assert 0 <= stats.entropy.item() <= math.log(3) + 1e-6
    (grad,) = torch.autograd.grad(sum(getattr(stats, name).sum() for name in SMOOTH), logits)
    assert grad.isfinite().all()


def test_logit_stats_signs_hold_in_float32_over_many_tokens():
    g = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(4000, 64, generator=g)
    stats = logit_stats(logits, logits.argmax(-1))
    assert (stats.logps <= 0).all()
    assert (stats.entropy >= 0).all()


def test_logit_stats_without_gradient_says_so():
    stats = logit_stats(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]), want=ALL)
    assert [name for name in ALL if not getattr(stats, name).requires_grad] == ["p_max", "is_greedy"]


def test_is_greedy_counts_ties():
    stats = logit_stats(torch.tensor([[1.0, 1.0, 0.0]] * 3), torch.arange(3), want=["is_greedy"])
    assert stats.is_greedy.tolist() == [True, True, False]


def test_token_stats_gradcheck():
    case = random_case(4, 2, 5, spread=1.0, bias=True).to(DOUBLE)
    targets = case.targets.index_fill(0, torch.tensor([1]), IGNORED)
    options = {"temperature": torch.tensor([0.5, 1.0, 1.3, 2.0]), "softcap": 3.0, "logit_scale": 0.7, "want": SMOOTH}

    def fields(hidden, weight, bias):
        stats = token_stats(hidden, weight, targets, bias=bias, **options)
        return tuple(getattr(stats, name) for name in SMOOTH)

    assert torch.autograd.gradcheck(fields, tuple(x.requires_grad_() for x in (case.hidden, case.weight, case.bias)))


def test_token_stats_without_a_label_is_zero_and_has_no_gradient():
    case = random_case(3, 4, 5)._replace(targets=torch.tensor([IGNORED, 2, IGNORED]))
    got = evaluate(token_stats, case)
    assert all(not x[[0, 2]].any() for x in got.stats)
    assert torch.equal(got.grads["hidden"][[0, 2]], torch.zeros(2, 4))


def test_token_stats_returns_only_what_is_wanted():
    case = random_case(2, 3, 5)
    found = token_stats(*case[:3])
    assert [name for name in ALL if getattr(found, name) is not None] == ["logps", "entropy"]
    only = token_stats(*case[:3], want=("sum_p2",))
    assert [name for name in ALL if getattr(only, name) is not None] == ["sum_p2"]


def test_token_stats_of_no_tokens_is_empty_and_differentiable():
    got = evaluate(token_stats, random_case(0, 3, 4))
    assert all(s.shape == (0,) for s in got.stats)
    assert torch.equal(got.grads["weight"], torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\).* each of 2 tokens"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "must be > 0"),
        ({"want": ["h"]}, "'h'"),
        ({"want": []}, "want="),
        ({"want": "logps"}, "want='logps'"),
    ],
)
def test_logit_stats_refuses_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        logit_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), **kwargs)


def test_logit_stats_refuses_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        logit_stats(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
