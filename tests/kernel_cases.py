"""Heads for the tests of rlvr_kernels: random ones with a difficulty each, and their statistics in float64."""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr_kernels import TokenStats, reference
from rlvr_kernels.stats import WITHOUT_GRADIENT

ALL = TokenStats._fields
SMOOTH = tuple(name for name in ALL if name not in WITHOUT_GRADIENT)
IGNORED = -100
INF = math.inf
# Gradients: relative error (Frobenius norm) that rounding of the result to the inputs' dtype alone explains.
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2e-3}


class Case(NamedTuple):
    """hidden: [N, D].   weight: [V, D].   targets: [N].   bias: [V] or None.   options: the rest of a call."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict[str, Any] = {}  # noqa: RUF012

    def to(self, *args: Any) -> "Case":
        """The same case on another device or in another dtype; targets and temperature keep their dtype."""
        device = self.hidden.to(*args).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        bias = None if self.bias is None else self.bias.to(*args)
        return Case(self.hidden.to(*args), self.weight.to(*args), self.targets.to(device), bias, moved)


class Result(NamedTuple):
    """stats: of a call.   grads: by hidden, weight and bias, of its fields times the coefficients of the call."""

    stats: TokenStats
    grads: dict[str, Tensor]


def random_case(n: int, d: int, v: int, *, spread: float = 3.0, seed: int = 0, bias: bool = False, **options) -> Case:
    """float32, with logits of standard deviation `spread` about."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g) * spread / math.sqrt(d)
    weight = torch.randn(v, d, generator=g)
    targets = torch.randint(v, (n,), generator=g)
    return Case(hidden, weight, targets, torch.randn(v, generator=g) if bias else None, options)


def _peaked() -> Case:
    case = random_case(19, 32, 101, spread=30.0)
    return case._replace(targets=(case.hidden @ case.weight.T).argmax(-1))


def _shifted(by: float) -> Case:
    """All logits moved by a constant, through a column of the weight."""
    case = random_case(41, 15, 101)
    ones = case.hidden.new_ones
    return case._replace(
        hidden=torch.cat([case.hidden, ones(41, 1)], 1), weight=torch.cat([case.weight, by * ones(101, 1)], 1)
    )


def _impossible() -> Case:
    """A bias of -inf for the first 40 tokens of the vocabulary, the last, and others; some of them are targets."""
    case = random_case(23, 16, 131, bias=True)
    bias = case.bias.clone()
    bias[:40] = bias[90::5] = -INF
    return case._replace(bias=bias, targets=torch.arange(0, 23 * 5, 5))


def _one_possible() -> Case:
    case = random_case(5, 8, 67, bias=True)
    bias = torch.full_like(case.bias, -INF)
    bias[50] = 1.0
    return case._replace(bias=bias, targets=torch.tensor([50, 50, 0, 66, 50]))


def _partly_labeled() -> Case:
    case = random_case(29, 16, 97)
    return case._replace(targets=case.targets.where(torch.arange(29) % 3 > 0, IGNORED))


def _per_token_temperature() -> Case:
    return random_case(31, 16, 67, temperature=torch.linspace(0.3, 2.0, 31))


CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: random_case(13, 16, 101),
    "smallest": lambda: random_case(1, 1, 1),
    "below_a_tile": lambda: random_case(3, 5, 7),
    "ragged": lambda: random_case(37, 29, 211),
    "flat": lambda: random_case(17, 16, 128, spread=0.01),
    "peaked": _peaked,
    "shifted_up": lambda: _shifted(500.0),
    "shifted_down": lambda: _shifted(-500.0),
    "bias": lambda: random_case(17, 16, 67, bias=True),
    "impossible": _impossible,
    "one_possible": _one_possible,
    "partly_labeled": _partly_labeled,
    "temperature": lambda: random_case(17, 16, 67, temperature=0.7),
    "per_token_temperature": _per_token_temperature,
    "softcap": lambda: random_case(17, 16, 67, spread=8.0, softcap=5.0, temperature=0.8),
    "one token": lambda: random_case(1, 16, 301),
    "small logits under a cap": lambda: random_case(17, 16, 67, spread=1e-3, softcap=30.0, temperature=1e-3),
    "logit_scale": lambda: random_case(17, 16, 67, logit_scale=0.25, bias=True, softcap=4.0),
}


def coefficients(n: int, fields: Collection[str] = SMOOTH, seed: int = 0) -> dict[str, Tensor]:
    """Random [N] float64 for each field: with the gradients by all fields at once, none can hide."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, generator=g, dtype=torch.float64) for name in fields}


def evaluate(
    function: Callable[..., TokenStats],
    case: Case,
    coef: dict[str, Tensor] | None = None,
    *,
    want: Collection[str] = ALL,
    **options: Any,
) -> Result:
    """Call function with a case, and differentiate sum_fields coef * field; coef defaults to random ones."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in _parameters(case).items()}
    hidden, weight, bias = (leaves.get(name) for name in ("hidden", "weight", "bias"))
    stats = function(hidden, weight, case.targets, bias=bias, **case.options, **options, want=want)
    coef = coefficients(len(case.targets), [x for x in SMOOTH if x in want]) if coef is None else coef
    outputs = [getattr(stats, name) for name in coef]
    weights = [c.to(y) for c, y in zip(coef.values(), outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return Result(TokenStats(*(x if x is None else x.detach() for x in stats)), dict(zip(leaves, grads, strict=True)))


def exact(case: Case, coef: dict[str, Tensor] | None = None) -> Result:
    """What `evaluate` should give: the reference, of the same numbers in float64."""
    return evaluate(reference.token_stats, case.to("cpu", torch.float64), coef)


def check_stats(got: TokenStats, want: TokenStats, tolerance: float = 2e-5) -> None:
    """Absolute error at most tolerance * max(1, |lse|), the size at which logits are rounded; of the fields in got."""
    size = want.lse.abs().clamp_min(1.0)
    for name, value in got._asdict().items():
        expected = getattr(want, name)
        if value is None:
            continue
        if name == "is_greedy":
            assert torch.equal(value.cpu(), expected), name
        else:
            value = value.cpu().double()
            wrong = (value - expected).abs() > tolerance * size
            wrong = (wrong | value.isnan()) & (value != expected)  # -inf equals -inf, though their difference is NaN
            assert not wrong.any(), f"{name}: {value[wrong]} for {expected[wrong]}"


def check_grads(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float | None = None) -> None:
    """Error of each gradient relative to its norm, or to 1, the size of the coefficients, where that is larger."""
    for name, expected in want.items():
        limit = GRADIENT_TOLERANCE[got[name].dtype] if tolerance is None else tolerance
        error = (got[name].cpu().double() - expected).norm() / expected.norm().clamp_min(1.0)
        assert error <= limit, f"gradient by {name}: relative error {error:.1e}"


def brute_force(case: Case) -> TokenStats:
    """Every statistic from its definition, one token and one vocabulary entry at a time, in Python's floats."""
    case = case.to(torch.float64)
    options = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0} | case.options
    logits = case.hidden @ case.weight.T + (0.0 if case.bias is None else case.bias)
    rows = (logits * options["logit_scale"]).tolist()
    if (cap := options["softcap"]) is not None:
        rows = [[cap * math.tanh(z / cap) for z in row] for row in rows]
    temperatures = torch.as_tensor(options["temperature"], dtype=torch.float64).expand(len(rows)).tolist()
    found = [
        _row([z / t for z in row], y) if y != IGNORED else {name: 0.0 for name in ALL}
        for row, t, y in zip(rows, temperatures, case.targets.tolist(), strict=True)
    ]
    columns = {name: torch.tensor([row[name] for row in found], dtype=torch.float64) for name in ALL}
    return TokenStats(**columns | {"is_greedy": columns["is_greedy"].bool()})


def _row(z: list[float], target: int) -> dict[str, float]:
    top = max(z)
    lse = top + math.log(math.fsum(math.exp(x - top) for x in z))
    pairs = [(math.exp(x - lse), x - lse) for x in z if x > -INF]
    return {
        "logps": z[target] - lse,
        "entropy": -math.fsum(p * logp for p, logp in pairs),
        "lse": lse,
        "sum_p2": math.fsum(p * p for p, _ in pairs),
        "sum_p_logp2": math.fsum(p * logp**2 for p, logp in pairs),
        "sum_p2_logp": math.fsum(p * p * logp for p, logp in pairs),
        "sum_p2_logp2": math.fsum((p * logp) ** 2 for p, logp in pairs),
        "p_max": math.exp(top - lse),
        "is_greedy": float(z[target] == top),
    }


def _parameters(case: Case) -> dict[str, Tensor]:
    return {name: x for name in ("hidden", "weight", "bias") if (x := getattr(case, name)) is not None}
