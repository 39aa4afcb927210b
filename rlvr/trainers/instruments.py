"""What a step measures of its trained tokens, as (total, count) pairs that are reduced over ranks once per step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from rlvr.objective import reference_kl
from rlvr.rollout.parity import Mismatch
from rlvr.surrogates import Clipped
from rlvr.trainers.distributed import AcceleratorReduce, reduce_means
from rlvr.types import Coefficients, Mean, Metrics, Tokens


@torch.no_grad()
def step_means(tokens: Tokens, ratio: Tensor, clipped: Clipped, coefficients: Coefficients) -> dict[str, Mean]:
    """Means over the tokens of one micro-batch; keys are those of `rlvr.monitor.metrics.METRICS`."""
    keep = coefficients.keep
    if keep is not None:  # what a control took out of the loss is no trained token
        tokens, ratio, coefficients = tokens.select(keep), ratio[keep], coefficients.select(keep)
        clipped = Clipped(clipped.low[keep], clipped.high[keep])
    log_ratio = tokens.logps - tokens.old_logps
    means = {
        "policy/ratio": Mean.of(ratio),
        "policy/kl_old": Mean.of(torch.exp(log_ratio) - 1 - log_ratio),
        "policy/logp": Mean.of(tokens.logps),
        "clip/low": Mean.of(clipped.low),
        "clip/high": Mean.of(clipped.high),
    }
    if tokens.entropy is not None:
        means["entropy/mean"] = Mean.of(tokens.entropy)
    if tokens.ref_logps is not None:
        means["policy/reference_kl"] = Mean.of(reference_kl(tokens))
    if coefficients.weight is not None:
        means["policy/weight"] = Mean.of(coefficients.weight)
    if coefficients.drift is not None:
        penalized = coefficients.drift > 0
        means["policy/drift"] = Mean.of(log_ratio[penalized].abs())
    return means


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """One optimizer step, over all ranks."""

    metrics: dict[str, float]
    mismatch: Mismatch | None


class StepMeter:
    """Adds up what the micro-batches of a step measure, and keeps what its rollout measured.

    Metrics of a rollout are repeated for each optimizer step that trains on it, so that every record is complete.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._reduce = AcceleratorReduce(accelerator)
        self._means: dict[str, Mean] = {}
        self._mismatch: Mismatch | None = None
        self._loss = torch.zeros((), dtype=torch.float64)
        self._rollout_step = -1
        self._rollout: dict[str, list[float]] = {}
        self._rollout_means: dict[str, Mean] = {}

    def start_rollout(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics: already reduced. Calls for rollouts of the same step are put together by `close`."""
        if step != self._rollout_step:
            self._rollout_step, self._rollout, self._rollout_means = step, {}, {}
        for name, value in metrics.items():
            self._rollout.setdefault(name, []).append(value)

    def add_rollout(self, means: Metrics) -> None:
        """What the rollout-scope controls measured, on this rank's part of the rollout."""
        _add(self._rollout_means, means)

    def add(self, means: Metrics, loss: Tensor) -> None:
        """One micro-batch; its loss is already scaled for accumulation."""
        _add(self._means, means)
        self._loss = self._loss.to(loss.device) + loss.detach()

    def add_mismatch(self, mismatch: Mismatch) -> None:
        self._mismatch = mismatch if self._mismatch is None else self._mismatch + mismatch

    def close(self) -> StepMeasurement:
        """The step's metrics over all ranks; the meter starts anew."""
        one = torch.ones((), dtype=torch.float64)
        means = {**self._means, **self._rollout_means, "policy/loss": Mean(self._loss, one)}
        reduced = reduce_means(means, self._accelerator)
        metrics = {name: _over_rollouts(name, values) for name, values in self._rollout.items()}
        metrics |= {name: mean.value() for name, mean in reduced.items() if mean.count}  # nothing measured: absent
        if "policy/ratio" in reduced:
            metrics["policy/tokens"] = float(reduced["policy/ratio"].count)
        mismatch = None
        if self._mismatch is not None:
            mismatch = self._mismatch.reduced(self._reduce)
            metrics |= mismatch.metrics()
        self._means, self._mismatch, self._loss = {}, None, torch.zeros_like(self._loss)
        return StepMeasurement(metrics, mismatch)


def _over_rollouts(name: str, values: list[float]) -> float:
    """One number for the rollouts of a step: tokens add, maxima are maxima, the rest are means of equal parts."""
    if name == "rollout/tokens":
        return sum(values)
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def _add(into: dict[str, Mean], means: Metrics) -> None:
    for name, mean in means.items():
        into[name] = into[name] + mean if name in into else mean
