"""The chunked backend through token_stats, against float64: values, gradients, signs, and the memory it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    ALL,
    CASES,
    GRADIENT_TOLERANCE,
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

from rlvr_kernels import chunked, token_stats

DOUBLE = torch.float64
FLOAT = torch.float32
TILES = [(512, 2048), (8, 32), (1, 7), (5, 1)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of the cases' size, so that tokens and vocabulary take several, and the last ones are cut."""
    set_tiles(monkeypatch, 8, 32)


def set_tiles(monkeypatch, tokens, vocabulary):
    monkeypatch.setattr(chunked, "TOKENS", tokens)
    monkeypatch.setattr(chunked, "VOCABULARY", vocabulary)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_all_fields_and_gradients_are_exact_about_the_inputs(name, dtype):
    case = CASES[name]().to(dtype)
    got, want = evaluate(token_stats, case), exact(case)
    assert got.stats.entropy.dtype == (DOUBLE if dtype == DOUBLE else FLOAT)
    check_stats(got.stats, want.stats, 1e-11 if dtype == DOUBLE else 2e-5)
    check_grads(got.grads, want.grads)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("field", SMOOTH)
def test_each_field_alone_has_its_own_gradient(field, dtype):
    case = CASES["logit_scale"]().to(dtype)
    coef = coefficients(len(case.targets), [field])
    got, want = evaluate(token_stats, case, coef, want=[field]), exact(case, coef)
    check_stats(got.stats, want.stats)
    check_grads(got.grads, want.grads)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", ["impossible", "one_possible", "softcap", "peaked"])
def test_tiles_of_any_size_change_nothing(name, tiles, monkeypatch):
    set_tiles(monkeypatch, *tiles)
    case = CASES[name]()
    got, want = evaluate(token_stats, case), exact(case)
    check_stats(got.stats, want.stats)
    check_grads(got.grads, want.grads)


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [(torch.bfloat16, FLOAT, FLOAT), (FLOAT, torch.bfloat16, FLOAT), (torch.float16, torch.bfloat16, DOUBLE)],
)
def test_mixed_dtypes_are_computed_in_float32_and_give_each_gradient_its_own(hidden, weight, bias):
    case = CASES["bias"]()
    case = case._replace(hidden=case.hidden.to(hidden), weight=case.weight.to(weight), bias=case.bias.to(bias))
    got, want = evaluate(token_stats, case), exact(case)
    assert got.stats.logps.dtype == FLOAT
    assert [g.dtype for g in got.grads.values()] == [hidden, weight, bias]
    check_stats(got.stats, want.stats)
    check_grads(got.grads, want.grads, max(GRADIENT_TOLERANCE[x] for x in (FLOAT, hidden, weight)))


def test_float64_of_one_input_makes_all_of_it_float64():
    case = CASES["bias"]()
    case = case._replace(weight=case.weight.double())
    got, want = evaluate(token_stats, case), exact(case)
    check_stats(got.stats, want.stats, 1e-11)
    assert got.stats.logps.dtype == DOUBLE


def test_autocast_changes_no_bit():
    """On a CPU: the products are of the inputs as they are, forward and backward."""
    case = CASES["plain"]()
    want = evaluate(token_stats, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = evaluate(token_stats, case)
    assert all(torch.equal(a, b) for a, b in zip(got.stats, want.stats, strict=True))
    assert all(torch.equal(got.grads[name], want.grads[name]) for name in want.grads)


@pytest.mark.parametrize("name", ["shifted_up", "shifted_down"])
def test_shift_of_all_logits_changes_only_lse(name):
    case = CASES[name]()
    plain = case._replace(weight=case.weight.clone())
    plain.weight[:, -1] = 0.0
    coef = coefficients(len(case.targets), [x for x in SMOOTH if x != "lse"])
    got, want = evaluate(token_stats, case, coef), evaluate(token_stats, plain, coef)
    shift = case.weight[0, -1].item()
    for field in SMOOTH:
        moved = getattr(want.stats, field) + (shift if field == "lse" else 0.0)
        torch.testing.assert_close(getattr(got.stats, field), moved, rtol=1e-4, atol=1e-4)
    check_grads({"weight": got.grads["weight"]}, {"weight": want.grads["weight"].double()}, 1e-4)


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
def test_gradient_by_the_logits_sums_to_zero_but_that_of_lse(dtype):
    """With the identity for a weight hidden are the logits; lse's gradient is p, which sums to 1."""
    g = torch.Generator().manual_seed(0)
    case = Case(3 * torch.randn(50, 97, generator=g), torch.eye(97), torch.randint(97, (50,), generator=g)).to(dtype)
    coef = coefficients(50)
    by_logits = evaluate(token_stats, case, coef).grads["hidden"]
    limit = 1e-5 if dtype == FLOAT else 1e-12
    assert (by_logits.sum(-1) - coef["lse"].to(dtype)).abs().max() <= limit


def test_signs_hold_exactly_over_many_tokens():
    case = random_case(4000, 24, 97, spread=6.0, temperature=torch.linspace(0.05, 2.0, 4000))
    greedy = case._replace(targets=(case.hidden @ case.weight.T).argmax(-1))
    for one in (case, greedy, greedy._replace(hidden=40 * case.hidden), case._replace(hidden=1e-4 * case.hidden)):
        stats = token_stats(*one[:3], **one.options, want=ALL)
        assert (stats.logps <= 0).all()
        assert (stats.entropy >= 0).all()
        assert ((stats.p_max > 0) & (stats.p_max <= 1)).all()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=80), st.data())
def test_signs_hold_exactly_for_any_row_and_its_gradient_is_finite(row, data):
    logits = torch.tensor([row])
    target = torch.tensor([data.draw(st.integers(0, len(row) - 1))])
    got = evaluate(token_stats, Case(logits, torch.eye(len(row)), target))
    assert got.stats.logps.item() <= 0
    assert got.stats.entropy.item() >= 0
    assert got.stats.is_greedy.item() == (row[target.item()] == max(row))
    assert got.grads["hidden"].isfinite().all()


def test_nan_stays_in_its_row():
    case = CASES["plain"]()
    poisoned = case._replace(hidden=case.hidden.index_fill(0, torch.tensor([4]), torch.nan))
    got, want = evaluate(token_stats, poisoned), evaluate(token_stats, case)
    rest = torch.arange(13) != 4
    assert all(x[4].isnan() for x in got.stats[:8])
    check_stats(type(got.stats)(*(x[rest] for x in got.stats)), type(got.stats)(*(x[rest] for x in want.stats)), 1e-6)
    assert torch.equal(got.grads["hidden"][rest].isnan().any(), torch.tensor(False))


def test_gradcheck_of_every_field_by_every_input():
    case = random_case(5, 3, 11, spread=1.0, bias=True).to(DOUBLE)
    targets = case.targets.index_fill(0, torch.tensor([1]), IGNORED)
    options = {"temperature": torch.linspace(0.5, 2.0, 5), "softcap": 3.0, "logit_scale": 0.7, "want": SMOOTH}

    def fields(hidden, weight, bias):
        stats = token_stats(hidden, weight, targets, bias=bias, **options)
        return tuple(getattr(stats, name) for name in SMOOTH)

    inputs = tuple(x.requires_grad_() for x in (case.hidden, case.weight, case.bias))
    assert torch.autograd.gradcheck(fields, inputs)


def peak_bytes(case: Case, **options) -> int:
    """Most bytes that a forward and a backward pass hold at a time beyond their inputs, by torch's allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate(token_stats, case, **options)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16])
@pytest.mark.parametrize(("n", "v"), [(256, 4096), (1024, 4096), (256, 16384)])
def test_memory_is_tiles_and_gradients_and_a_few_numbers_per_token(n, v, dtype, monkeypatch):
    """The bound holds while the logits alone, in float32, would take 2 to 10 times as much.

    Tiles: logits, their gradient, room for moments, and the two copies that oneDNN makes of what it multiplies.
    """
    d, tokens, vocabulary = 16, 32, 256
    set_tiles(monkeypatch, tokens, vocabulary)
    case = random_case(n, d, v).to(dtype)
    leaves_and_gradients = 2 * dtype.itemsize * (n + v) * d
    tiles = 4 * (5 * tokens * vocabulary + 4 * vocabulary * d)
    hidden_in_float32 = 4 * 4 * n * d
    per_token = 4 * 80 * n
    bound = leaves_and_gradients + tiles + hidden_in_float32 + per_token
    assert peak_bytes(case) <= bound
    assert bound < 4 * n * v / 2
