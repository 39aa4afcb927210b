"""Estimators of the entropy change from statistics of sampled tokens, and predictions compared with the truth."""

from typing import Any

import pytest
import torch
from test_theory import same, sampled, states, statistics
from torch import Tensor

from rlvr.theory import (
    ESTIMATORS,
    Agreement,
    TokenStatistics,
    exact_change,
    first_order_change,
    own_logit_step,
    single_logit_step,
    token_step,
)

# ------------------------------------------------------------------------------------------------ estimators of tokens


@pytest.mark.parametrize(
    ("estimator", "step"),
    [("single_logit", single_logit_step), ("steer", own_logit_step), ("discriminator", token_step)],
)
def test_estimators_are_the_first_order_change_of_their_step(estimator: str, step: Any) -> None:
    z, a, k = states(128)
    alpha = 0.1 * sampled(a, k)
    same(ESTIMATORS[estimator](statistics(z, k, alpha)), first_order_change(z, step(z, k, alpha)))


def test_released_steer_divides_by_p() -> None:
    z, a, k = states(16)
    stats = statistics(z, k, sampled(a, k))
    same(ESTIMATORS["steer_released"](stats) * stats.p, ESTIMATORS["steer"](stats))


def test_covariance_estimator_is_minus_the_covariance() -> None:
    """logp -1, -3 and A 2, 0: means -2 and 1, so cov = (1)(1) and (-1)(-1)."""
    logps, cov = torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 1.0])
    stats = TokenStatistics(logps=logps, entropy=logps, step=logps, covariance=cov)
    assert torch.equal(ESTIMATORS["covariance"](stats), torch.tensor([-1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_answer_in_float64(name: str) -> None:
    x = torch.tensor([-0.5, -2.0], dtype=torch.bfloat16)
    stats = TokenStatistics(logps=x, entropy=-x, step=x, mean_discriminator=x, covariance=x)
    wide = TokenStatistics(
        **{f: x.double() for f in ("logps", "step", "mean_discriminator", "covariance")}, entropy=-x
    )
    assert ESTIMATORS[name](stats).dtype == torch.float64
    assert torch.equal(ESTIMATORS[name](stats), ESTIMATORS[name](wide))


@pytest.mark.parametrize(("name", "missing"), [("covariance", "covariance"), ("discriminator", "mean_discriminator")])
def test_estimators_name_the_statistic_they_lack(name: str, missing: str) -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=rf"TokenStatistics\.{missing} is None"):
        ESTIMATORS[name](TokenStatistics(logps=x, entropy=x, step=x))


def test_statistics_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TokenStatistics\.entropy has shape \(3,\), logps has \(2,\)"):
        TokenStatistics(logps=torch.zeros(2), entropy=torch.zeros(3), step=torch.zeros(2))


# ----------------------------------------------------------------------------------------------------------- agreement


def streams(number: int = 200) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = 1e-4 * torch.randn(number, generator=g, dtype=torch.float64) + 3e-4
    return x, 0.6 * x + 1e-4 * torch.randn(number, generator=g, dtype=torch.float64)


def test_agreement_is_the_textbook_regression() -> None:
    x, y = streams()
    got = Agreement.of(x, y)
    design = torch.stack([x, torch.ones_like(x)], 1)
    slope = torch.linalg.lstsq(design, y).solution[0].item()
    residual = y - design @ torch.linalg.lstsq(design, y).solution
    assert got.slope == pytest.approx(slope, abs=1e-10)
    assert got.correlation == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), abs=1e-10)
    assert got.r2 == pytest.approx(1 - (residual.var() / y.var()).item(), abs=1e-10)
    assert got.total_predicted == pytest.approx(x.sum().item(), abs=1e-15)
    assert got.total_measured == pytest.approx(y.sum().item(), abs=1e-15)
    assert got.count == 200


def test_agreement_of_a_perfect_prediction() -> None:
    x, _ = streams()
    got = Agreement.of(x, 2 * x - 1e-3)
    assert (got.slope, got.correlation, got.r2) == pytest.approx((2.0, 1.0, 1.0), abs=1e-10)
    assert Agreement.of(x, -x).correlation == pytest.approx(-1.0, abs=1e-10)


def test_agreement_adds_over_micro_batches_and_ranks() -> None:
    x, y = streams()
    whole = Agreement.of(x, y)
    parts = [Agreement.of(a, b) for a, b in zip(x.split(37), y.split(37), strict=True)]
    torch.testing.assert_close(sum(parts[1:], parts[0]).sums, whole.sums, rtol=1e-14, atol=0)

    class OtherRank:
        def sum(self, x: Tensor) -> Tensor:
            return x + Agreement.of(*(s[90:] for s in streams())).sums

        def gather(self, x: Tensor) -> Tensor:
            raise AssertionError("sums are enough")

    both = Agreement.of(x[:90], y[:90]).over_ranks(OtherRank())
    torch.testing.assert_close(both.sums, whole.sums, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0, 2.0], [1.0, 2.0]),
        ([0.1] * 9, list(range(9))),
        (list(range(9)), [0.1] * 9),
        ([0.0] * 9, [0.0] * 9),
    ],
    ids=["nothing", "two points", "constant prediction", "constant measurement", "all zero"],
)
def test_agreement_is_absent_without_variation(x: list[float], y: list[float]) -> None:
    got = Agreement.of(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    assert all(v != v for v in (got.slope, got.correlation, got.r2))


def test_agreement_of_float32_loses_nothing() -> None:
    x, y = (v.float() for v in streams())
    assert torch.equal(Agreement.of(x, y).sums, Agreement.of(x.double(), y.double()).sums)
    with pytest.raises(ValueError, match="predicted has shape"):
        Agreement.of(x, y[1:])


def test_first_order_predictions_agree_with_small_real_steps() -> None:
    """What the estimators are ranked by: with the full softmax step, S - E_S is right and the others are not."""
    z, a, k = (torch.cat(parts) for parts in zip(*[states(16, 400)], strict=True))
    alpha = 1e-4 * sampled(a, k)
    measured, stats = exact_change(z, token_step(z, k, alpha)), statistics(z, k, alpha)
    found = {name: Agreement.of(ESTIMATORS[name](stats), measured) for name in ESTIMATORS if name != "covariance"}
    assert found["discriminator"].slope == pytest.approx(1.0, abs=1e-3)
    assert found["discriminator"].r2 > 0.99999
    assert max(one.r2 for name, one in found.items() if name != "discriminator") < 0.9
