"""What a step measures of its trained tokens, as (total, count) pairs that are reduced over ranks once per step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlvr.controls.covariance import products, token_means
from rlvr.diagnostics import (
    doubling_edges,
    explained_variance,
    histogram,
    mean_by_position,
    quantile_shares,
    quantiles,
    top_share_means,
)
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.objective import reference_kl
from rlvr.rollout.parity import Mismatch
from rlvr.surrogates import Clipped
from rlvr.trainers.distributed import AcceleratorReduce, reduce_means
from rlvr.types import Coefficients, Mean, Metrics, Reduce, Tokens


@torch.no_grad()
def step_means(
    tokens: Tokens, ratio: Tensor, clipped: Clipped, coefficients: Coefficients, stale: Tensor | None = None
) -> dict[str, Mean]:
    """Means over the tokens of one micro-batch; keys are those of `rlvr.monitor.metrics.METRICS`.

    The entropy is the policy's, over all tokens: runs are compared by it, whatever a control takes out of the loss.

    stale: bool [N], tokens of which only what the rollout's policy made of them is known: they count in the entropy
    and in policy/tokens alone, and would hide how far the others have moved.
    """
    entropy = tokens.entropy
    keep = torch.ones_like(tokens.logps, dtype=torch.bool) if coefficients.keep is None else coefficients.keep
    kept = Mean.of(keep)
    if stale is not None:
        keep = keep & ~stale
    if not keep.all():  # what a control took out of the loss is no trained token
        tokens, ratio, coefficients = tokens.select(keep), ratio[keep], coefficients.select(keep)
        clipped = clipped.select(keep)
    log_ratio = tokens.logps - tokens.old_logps
    means = {
        "policy/tokens": kept,
        "policy/ratio": Mean.of(ratio),
        "policy/kl_old": Mean.of(torch.exp(log_ratio) - 1 - log_ratio),
        "policy/logp": Mean.of(tokens.logps),
        "clip/low": Mean.of(clipped.low),
        "clip/high": Mean.of(clipped.high),
    }
    if clipped.dual is not None:
        means["clip/dual"] = Mean.of(clipped.dual)
    if entropy is not None:
        means["entropy/mean"] = Mean.of(entropy)
    if tokens.ref_logps is not None:
        means["policy/reference_kl"] = Mean.of(reference_kl(tokens))
    if coefficients.weight is not None:
        means["policy/weight"] = Mean.of(coefficients.weight)
    if coefficients.drift is not None:
        penalized = coefficients.drift > 0
        means["policy/drift"] = Mean.of(log_ratio[penalized].abs())
    return means


def global_mean(values: Tensor, reduce: Reduce) -> float:
    """Over all ranks, NaN of nothing. values: [N] of this rank."""
    mean = Mean.of(values)
    return Mean(reduce.sum(mean.total), reduce.sum(mean.count.to(values.device))).value()


@torch.no_grad()
def value_means(values: Tensor, earned: Tensor, advantages: Tensor, reduce: Reduce) -> dict[str, float]:
    """What a critic knew of a rollout, and how its advantages are spread, over all ranks.

    values, advantages: [N] of this rank's tokens.   earned: [N], the discounted rewards that followed, whatever lambda
    the run has: returns by a smaller one contain the critic's own values.
    """
    told = {"critic/value": global_mean(values, reduce), "critic/earned": global_mean(earned, reduce)}
    told["critic/explained_variance"] = explained_variance(values, earned, reduce)
    mean = told["advantage/mean"] = global_mean(advantages.double(), reduce)
    told["advantage/std"] = math.sqrt(global_mean((advantages.double() - mean).square(), reduce))
    percents = (5, 50, 95)
    found = quantiles(advantages, [percent / 100 for percent in percents], reduce)
    told |= {f"advantage/p{percent:02d}": value for percent, value in zip(percents, found, strict=True)}
    return {name: value for name, value in told.items() if value == value}  # a constant reward explains nothing


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
        self._loss: Tensor | None = None  # of the policy; none while a critic is trained alone
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

    def add(self, means: Metrics, loss: Tensor | None = None) -> None:
        """One micro-batch; the policy's loss is already scaled for accumulation."""
        _add(self._means, means)
        if loss is not None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def add_mismatch(self, mismatch: Mismatch) -> None:
        self._mismatch = mismatch if self._mismatch is None else self._mismatch + mismatch

    def state_dict(self) -> dict[str, Any]:
        """What is known of the rollout at hand, as JSON."""
        means = {name: [float(mean.total), float(mean.count)] for name, mean in self._rollout_means.items()}
        return {"step": self._rollout_step, "metrics": self._rollout, "means": means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the rollout of `state_dict`."""
        self._rollout_step, self._rollout = state["step"], {k: list(v) for k, v in state["metrics"].items()}
        number = partial(torch.tensor, dtype=torch.float64, device=self._accelerator.device)
        self._rollout_means = {name: Mean(number(t), number(n)) for name, (t, n) in state["means"].items()}

    def close(self) -> StepMeasurement:
        """The step's metrics over all ranks; the meter starts anew."""
        means = {**self._means, **self._rollout_means}
        if self._loss is not None:
            means["policy/loss"] = Mean(self._loss.double(), torch.ones((), dtype=torch.float64))
        reduced = reduce_means(means, self._accelerator)
        metrics = {name: _over_rollouts(name, values) for name, values in self._rollout.items()}
        metrics |= {name: mean.value() for name, mean in reduced.items() if mean.count}  # nothing measured: absent
        if "policy/tokens" in reduced:
            metrics["policy/tokens"] = float(reduced["policy/tokens"].total)
        mismatch = None
        if self._mismatch is not None:
            mismatch = self._mismatch.reduced(self._reduce)
            metrics |= mismatch.metrics()
        self._means, self._mismatch, self._loss = {}, None, None
        return StepMeasurement(metrics, mismatch)


def _over_rollouts(name: str, values: list[float]) -> float:
    """One number for the rollouts of a step: tokens add, maxima are maxima, the rest are means of equal parts."""
    if name == "rollout/tokens":
        return sum(values)
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def _add(into: dict[str, Mean], means: Metrics) -> None:
    for name, mean in means.items():
        into[name] = into[name] + mean if name in into else mean


class TokenDiagnostics:
    """How what a step knows of its tokens is spread over them, over all ranks; nothing when not `active`.

    details: of the step closed last, for its record: `entropy_by_position`, `mismatch_by_position`, `histograms`.
    means: mean log-prob and advantage of its trained tokens, float64 [2]; None where they are not known.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._parts: list[dict[str, Tensor]] = []
        self._weighted = False
        self.details: dict[str, Any] = {}
        self.means: Tensor | None = None

    def add(self, tokens: Tokens, coefficients: Coefficients) -> None:
        """One micro-batch, with the tokens that controls take out of the loss."""
        if not self._active or tokens.entropy is None or tokens.position is None:
            return
        keep, weight = coefficients.keep, coefficients.weight
        self._weighted = self._weighted or keep is not None or weight is not None
        keep = torch.ones_like(tokens.logps, dtype=torch.bool) if keep is None else keep
        weight = torch.ones_like(tokens.logps) if weight is None else weight
        part = {
            "logps": tokens.logps,
            "advantages": tokens.advantages,
            "entropy": tokens.entropy,
            "position": tokens.position,
            "keep": keep,
            "weight": torch.where(keep, weight, 0.0),
        }
        if tokens.rollout_logps is not None:
            part["mismatch"] = (tokens.old_logps.double() - tokens.rollout_logps.double()).abs()
        self._parts.append({name: x.detach() for name, x in part.items()})

    def close(self, reduce: Reduce) -> dict[str, float]:
        """The step's metrics; what else there is to tell is in `details` and `means`. Starts anew."""
        self.details, self.means = {}, None
        if not self._parts:  # not active, or the policy was not trained
            return {}
        step = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        weighted, self._parts, self._weighted = self._weighted, [], False
        keep, weight = step.pop("keep"), step.pop("weight")
        logps, entropy, position = step["logps"][keep], step["entropy"], step["position"]  # as entropy/mean
        advantages = step["advantages"][keep].to(logps.dtype)
        means, total = token_means(logps, advantages, reduce)
        if not total:
            return {}
        self.means = means
        cov = products(logps, advantages, means)
        values = {"entropy": entropy, "covariance": cov, "advantage": advantages}
        placed = {"entropy_by_position": (position, entropy)}
        if weighted:
            values["weight"] = weight
        if "mismatch" in step:
            known = step["mismatch"].isfinite()  # as in the metrics of the mismatch
            values["mismatch"] = step["mismatch"][known]
            placed["mismatch_by_position"] = (position[known], values["mismatch"])
        edges = doubling_edges(4, _longest(position, reduce))
        self.details = _by_position(placed, edges, reduce) | {"histograms": _histograms(values, reduce)}
        found = {"covariance/mean": float(reduce.sum(cov.sum())) / total}
        found |= {
            f"covariance/top_2_in_{round(2 / q)}": m.value() for q, m in top_share_means(cov, reduce=reduce).items()
        }
        shares = quantile_shares(entropy, reduce=reduce)
        return found | {f"entropy/share_top_{100 - 100 * q:g}pct": m.value() for q, m in shares.items() if m.total}


def _by_position(
    placed: Mapping[str, tuple[Tensor, Tensor]], edges: tuple[int, ...], reduce: Reduce
) -> dict[str, dict[str, list[float]]]:
    """Means over all ranks, by name.   placed: positions and values of this rank's tokens, each [N]."""
    bins = [mean for position, values in placed.values() for mean in mean_by_position(position, values, edges)]
    device = next(iter(placed.values()))[0].device
    sums = reduce.sum(torch.stack([torch.stack([b.total.to(device), b.count.to(device)]) for b in bins]))
    return {
        name: {
            "edges": [float(edge) for edge in edges],
            "mean": [x / n if n else 0.0 for x, n in of_name.tolist()],
            "count": of_name[:, 1].tolist(),
        }
        for name, of_name in zip(placed, sums.split(len(edges)), strict=True)
    }


def _histograms(values: Mapping[str, Tensor], reduce: Reduce) -> dict[str, list[int]]:
    """Counts over all ranks in the bins of HISTOGRAMS, by name.   values: [N] of this rank."""
    counts = [histogram(x, HISTOGRAMS[name].edges) for name, x in values.items()]
    summed = reduce.sum(torch.cat(counts)).split([len(part) for part in counts])
    return {name: part.tolist() for name, part in zip(values, summed, strict=True)}


def _longest(position: Tensor, reduce: Reduce) -> int:
    """Positions in the longest response of all ranks."""
    last = position.new_zeros(1) if position.numel() == 0 else position.max().unsqueeze(0) + 1
    return int(reduce.gather(last).max())
