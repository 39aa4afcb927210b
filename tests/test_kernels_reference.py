"""rlvr_kernels.reference against sums written out by hand, and its promises about -inf, signs and gradients."""

import math

import pytest
import torch

from rlvr_kernels import TokenStats, logit_stats, token_stats

ALL = TokenStats._fields
INF = math.inf
DOUBLE = torch.float64


def brute_force(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict[str, list[float]]:
    """Every statistic from its definition, one token and one vocabulary entry at a time, in Python floats."""
    out: dict[str, list[float]] = {name: [] for name in ALL}
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        top = max(row)
        mass = [math.exp((z - top) / temperature) for z in row]
        p = [m / math.fsum(mass) for m in mass]
        out["logps"].append(math.log(p[target]))
        out["entropy"].append(-math.fsum(q * math.log(q) for q in p if q > 0))
        out["sum_p2"].append(math.fsum(q * q for q in p))
        out["sum_p2_logp"].append(math.fsum(q * q * math.log(q) for q in p if q > 0))
        out["sum_p2_logp2"].append(math.fsum((q * math.log(q)) ** 2 for q in p if q > 0))
    return out


def random_case(n: int, v: int, scale: float, seed: int = 0, d: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(n, d, generator=g, dtype=DOUBLE)
    weight = torch.randn(v, d, generator=g, dtype=DOUBLE)
    return hidden, weight, torch.randint(v, (n,), generator=g)


@pytest.mark.parametrize("v", [1, 2, 7, 1000, 1025])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_token_stats_equals_brute_force(v, temperature):
    hidden, weight, targets = random_case(6, v, scale=1.5, seed=v)
    got = token_stats(hidden, weight, targets, temperature=temperature, want=ALL)
    for name, want in brute_force(hidden @ weight.T, targets, temperature).items():
        torch.testing.assert_close(getattr(got, name), torch.tensor(want, dtype=DOUBLE), rtol=1e-10, atol=1e-12)


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


def test_entropy_gradient_is_minus_p_times_logp_plus_entropy():
    hidden, weight, targets = random_case(4, 9, scale=1.0)
    logits = (hidden @ weight.T).requires_grad_()
    entropy = logit_stats(logits, targets, temperature=0.8).entropy
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    logp = (logits.detach() / 0.8).log_softmax(-1)
    want = -logp.exp() * (logp + entropy.detach().unsqueeze(-1)) / 0.8
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-12)


def test_logit_stats_of_minus_inf_is_that_of_the_vocabulary_without_it():
    finite = torch.tensor([[1.0, 0.0], [-3.0, 2.0]], dtype=DOUBLE, requires_grad=True)
    padded = torch.tensor([[1.0, -INF, 0.0, -INF], [-3.0, -INF, 2.0, -INF]], dtype=DOUBLE, requires_grad=True)
    want = logit_stats(finite, torch.tensor([0, 1]), want=ALL)
    got = logit_stats(padded, torch.tensor([0, 2]), want=ALL)
    assert got.entropy[0].item() == pytest.approx(0.5822031088882179, rel=1e-12)
    for name in ALL:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=0.0)
        (grad,) = torch.autograd.grad(getattr(got, name).sum(), padded, retain_graph=True)
        (grad_finite,) = torch.autograd.grad(getattr(want, name).sum(), finite, retain_graph=True)
        assert torch.equal(grad[:, [1, 3]], torch.zeros(2, 2, dtype=DOUBLE)), name
        torch.testing.assert_close(grad[:, [0, 2]], grad_finite, rtol=1e-12, atol=1e-15)


def test_logit_stats_impossible_target_has_log_prob_minus_inf_and_no_nan():
    logits = torch.tensor([[0.0, -INF, 0.0]], requires_grad=True)
    stats = logit_stats(logits, torch.tensor([1]), want=ALL)
    assert stats.logps.item() == -INF
    assert stats.entropy.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(stats.logps.sum(), logits)
    assert grad.tolist() == [[-0.5, 0.0, -0.5]]


@pytest.mark.parametrize("row", [[-INF, 0.0, -INF], [0.0, 200.0, -200.0], [1e30, -1e30, 0.0], [-1e4, -1e4, -1e4]])
def test_logit_stats_extreme_rows_stay_finite_and_signed(row):
    logits = torch.tensor([row], requires_grad=True)
    stats = logit_stats(logits, logits.argmax(-1), want=ALL)
    assert stats.logps.item() <= 0
    assert 0 <= stats.entropy.item() <= math.log(3) + 1e-6
    (grad,) = torch.autograd.grad(sum(s.sum() for s in stats), logits)
    assert grad.isfinite().all()


def test_logit_stats_signs_hold_in_float32_over_many_tokens():
    g = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(4000, 64, generator=g)
    stats = logit_stats(logits, logits.argmax(-1))
    assert (stats.logps <= 0).all()
    assert (stats.entropy >= 0).all()


def test_logit_stats_gradcheck():
    hidden, weight, targets = random_case(3, 6, scale=1.0)
    logits = (hidden @ weight.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tuple(logit_stats(z, targets, temperature=1.3, want=ALL)), logits)


def test_token_stats_gradcheck():
    hidden, weight, targets = random_case(3, 6, scale=1.0, d=2)
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: tuple(token_stats(h, w, targets, want=ALL)), inputs)


def test_logps_gradient_is_target_minus_p():
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE, requires_grad=True)  # p = (3/4, 1/4)
    (grad,) = torch.autograd.grad(logit_stats(logits, torch.tensor([1])).logps, logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.75, 0.75]], dtype=DOUBLE), rtol=1e-12, atol=0.0)


def test_token_stats_returns_only_what_is_wanted():
    hidden, weight, targets = random_case(2, 3, scale=1.0)
    found = token_stats(hidden, weight, targets)
    assert [name for name in ALL if getattr(found, name) is not None] == ["logps", "entropy"]
    only = token_stats(hidden, weight, targets, want=("sum_p2",))
    assert [name for name in ALL if getattr(only, name) is not None] == ["sum_p2"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_stats_of_half_inputs_is_float32_and_exact_about_them(dtype):
    """Logits are not rounded to the precision of the inputs: only float32 rounding away from float64."""
    hidden, weight, targets = random_case(8, 50, scale=2.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = token_stats(hidden.double(), weight.double(), targets, want=ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_stats(hidden, weight, targets, want=ALL)
    for name in ALL:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


def test_token_stats_of_no_tokens_is_empty_and_differentiable():
    hidden, weight, targets = random_case(0, 4, scale=1.0)
    weight.requires_grad_()
    stats = token_stats(hidden, weight, targets, want=ALL)
    assert all(s.shape == (0,) for s in stats)
    (grad,) = torch.autograd.grad(sum(s.sum() for s in stats), weight)
    assert torch.equal(grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"temperature": 0.0}, "temperature=0.0"), ({"temperature": math.nan}, "temperature"), ({"want": ["h"]}, "'h'")],
)
def test_logit_stats_refuses_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        logit_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), **kwargs)


def test_logit_stats_refuses_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        logit_stats(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
