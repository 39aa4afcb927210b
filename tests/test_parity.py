"""How far engine and trainer are apart: sums that add over cuts, and the check that stops a run."""

import math

import pytest
import torch

from rlvr.rollout.parity import EngineMismatchError, check_parity, default_tolerance, measure_mismatch
from rlvr.types import LocalReduce


def test_mismatch_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0, -3.0])
    engine = torch.tensor([-1.5, -2.0, -2.0])  # delta = 0.5, 0, -1
    got = measure_mismatch(trainer, engine).metrics()
    assert got["mismatch/abs_logp_mean"] == pytest.approx(1.5 / 3, abs=1e-12)
    assert got["mismatch/abs_logp_max"] == 1.0
    k3 = (math.exp(0.5) - 1 - 0.5) + 0 + (math.exp(-1) - 1 + 1)
    assert got["mismatch/kl"] == pytest.approx(k3 / 3, abs=1e-12)
    assert got["mismatch/ratio_mean"] == pytest.approx((math.exp(0.5) + 1 + math.exp(-1)) / 3, abs=1e-12)
    assert got["mismatch/ratio_min"] == pytest.approx(math.exp(-1), abs=1e-12)
    assert got["mismatch/ratio_max"] == pytest.approx(math.exp(0.5), abs=1e-12)


def test_mismatch_does_not_depend_on_how_tokens_are_cut() -> None:
    torch.manual_seed(0)
    trainer, engine = torch.randn(2, 50, dtype=torch.float64)
    engine[3] = torch.nan
    whole = measure_mismatch(trainer, engine)
    parts = [measure_mismatch(trainer[i:j], engine[i:j]) for i, j in ((0, 7), (7, 7), (7, 50))]
    added = (parts[0] + parts[1] + parts[2]).reduced(LocalReduce())
    assert torch.allclose(added.sums, whole.sums, rtol=0, atol=1e-12)
    assert torch.equal(added.maxima, whole.maxima)
    assert (whole.num_tokens, whole.num_nonfinite) == (49, 1)


def test_mismatch_of_no_token_is_neutral() -> None:
    empty = measure_mismatch(torch.empty(0), torch.empty(0))
    assert empty.metrics() == {}
    check_parity(empty, 0.1, step=0)
    with pytest.raises(ValueError, match="one shape"):
        measure_mismatch(torch.zeros(2), torch.zeros(3))


def test_check_parity_accepts_rounding_and_stops_at_a_difference() -> None:
    logps = torch.tensor([-1.0, -2.0])
    check_parity(measure_mismatch(logps, logps + 9e-5), default_tolerance("float32"), step=3)
    with pytest.raises(EngineMismatchError, match=r"step 3: .*0\.2 nats.*stale weights.*mismatch_tolerance"):
        check_parity(measure_mismatch(logps, logps + 0.2), default_tolerance("bfloat16"), step=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_parity_stops_at_what_is_not_finite(bad: float) -> None:
    logps = torch.tensor([-1.0, -2.0])
    broken = torch.tensor([-1.0, bad])
    with pytest.raises(EngineMismatchError, match="1 of 2 sampled tokens"):
        check_parity(measure_mismatch(logps, broken), 0.1, step=0)
    with pytest.raises(EngineMismatchError):
        check_parity(measure_mismatch(broken, logps), 0.1, step=0)


def test_default_tolerance_knows_its_dtypes() -> None:
    assert default_tolerance("float32") < default_tolerance("bfloat16") == default_tolerance("float16")
    with pytest.raises(ValueError, match="dtype='int8'"):
        default_tolerance("int8")
