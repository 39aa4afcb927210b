"""What an optimizer step does to entropy, predicted and measured on the same tokens.

A few sequences of a step's first micro-batch are passed through the model once before and once after the step, without
gradient. How hard the loss pushes each of their tokens, with all its clips, weights and penalties, is its derivative
by the token's log-prob; taking a control's coefficients away shows what that control changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlvr.controls.covariance import covariance
from rlvr.theory import ESTIMATORS, Agreement, TokenStatistics
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.distributed import reduce_means
from rlvr.trainers.forward import mean_discriminator
from rlvr.trainers.steering import combined
from rlvr.types import Coefficients, Mean, Tokens

if TYPE_CHECKING:
    from rlvr.trainers.controlled import ControlledTrainer

Loss = Callable[[Tokens, Coefficients], Tensor]
MOMENTS = ("logps", "entropy", "sum_p2", "sum_p2_logp", "sum_p2_logp2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The probe's sequences before the step; [N] over their tokens, flat in the order of the batch's mask."""

    batch: Mapping[str, Any]
    mask: Tensor  # [n, T]
    entropy: Tensor
    predicted: Mapping[str, Tensor]  # nats, by estimator
    effects: Mapping[str, Tensor]  # nats that each control adds to the prediction
    rewarded: Tensor
    punished: Tensor
    likely: Tensor


class EntropyProbe:
    """Watches `num_sequences` of each rank every `every` optimizer steps."""

    def __init__(self, trainer: "ControlledTrainer", num_sequences: int, every: int) -> None:
        self._trainer, self._size, self._every = trainer, num_sequences, every
        self._seen_step = -1
        self._watched: Watched | None = None

    def wants(self, step: int) -> bool:
        """Whether the micro-batch at hand is the first one of an optimizer step to be watched."""
        return self._size > 0 and step % self._every == 0 and step != self._seen_step

    @torch.no_grad()
    def watch(
        self, step: int, batch: Mapping[str, Any], tokens: Tokens, loss: Loss, by_control: Mapping[str, Coefficients]
    ) -> None:
        """Measure before the step and predict. On every rank.

        loss: of tokens and coefficients, scaled as the one that is trained on.   by_control: what it was made of.
        """
        self._seen_step = step
        trainer, size = self._trainer, self._size
        rows = {key: value[:size] for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
        mine = tokens.sequence < size
        mask = bridge.trained_mask(rows)
        moments = {name: x[mask] for name, x in trainer.moments(rows, MOMENTS).items()}
        scale = trainer.learning_rate / trainer.accelerator.num_processes
        cov = covariance(tokens, trainer.reduce)[0][mine]

        def statistics(coefficients: Coefficients) -> tuple[TokenStatistics, Tensor]:
            pushed, bonus = pushes(loss, tokens, coefficients)
            known = TokenStatistics(
                logps=moments["logps"],
                entropy=moments["entropy"],
                step=scale * pushed[mine],
                mean_discriminator=mean_discriminator(moments),
                covariance=cov,
            )
            return known, scale * bonus[mine].double() * squared_discriminator(moments)

        everything, raised = statistics(combined(by_control))
        predicted = {name: estimate(everything) for name, estimate in ESTIMATORS.items()}
        whole = predicted["discriminator"] = predicted["discriminator"] + raised
        effects = {}
        for name in by_control:
            rest, raised_by_rest = statistics(combined(by_control, without=name))
            effects[name] = whole - ESTIMATORS["discriminator"](rest) - raised_by_rest
        advantages = tokens.advantages[mine]
        self._watched = Watched(
            batch=rows,
            mask=mask,
            entropy=moments["entropy"],
            predicted=predicted,
            effects=effects,
            rewarded=advantages > 0,
            punished=advantages < 0,
            likely=moments["logps"] > -moments["entropy"],
        )

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure after the step and compare, over all ranks; empty if this step is not watched."""
        if self._watched is None:
            return {}
        before, self._watched = self._watched, None
        after = self._trainer.moments(before.batch, ("entropy",))["entropy"][before.mask]
        measured = after.double() - before.entropy.double()
        predicted = before.predicted["discriminator"]
        means = {"dynamics/measured": Mean.of(measured), "dynamics/predicted": Mean.of(predicted)}
        classes = {"rewarded": before.rewarded, "punished": before.punished}
        sides = {"likely": before.likely, "unlikely": ~before.likely}
        for name, of_class in classes.items():
            for side, on_side in sides.items():
                here = of_class & on_side
                means[f"dynamics/measured_{name}_{side}"] = Mean.of(measured * here)
                means[f"dynamics/predicted_{name}_{side}"] = Mean.of(predicted * here)
        means |= {f"{name}/effect": Mean.of(effect) for name, effect in before.effects.items()}
        metrics = {name: mean.value() for name, mean in reduce_means(means, self._trainer.accelerator).items()}
        for name, prediction in before.predicted.items():
            agreement = Agreement.of(prediction, measured).over_ranks(self._trainer.reduce)
            metrics[f"dynamics/{name}_mean"] = agreement.total_predicted / max(agreement.count, 1)
            metrics[f"dynamics/{name}_slope"] = agreement.slope
            metrics[f"dynamics/{name}_correlation"] = agreement.correlation
            metrics[f"dynamics/{name}_r2"] = agreement.r2
        return {name: value for name, value in metrics.items() if value == value}  # nothing measured: absent


def pushes(loss: Loss, tokens: Tokens, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """(-d loss / d logp, -d loss / d entropy) of each token [N], through everything the loss is made of."""
    assert tokens.entropy is not None
    logps, entropy = tokens.logps.detach().requires_grad_(), tokens.entropy.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(replace(tokens, logps=logps, entropy=entropy), coefficients)
    by_logp, by_entropy = torch.autograd.grad(value, (logps, entropy), allow_unused=True)
    zeros = torch.zeros_like(logps)
    return (zeros if by_logp is None else -by_logp), (zeros if by_entropy is None else -by_entropy)


def squared_discriminator(moments: Mapping[str, Tensor]) -> Tensor:
    """sum_v S_v^2 = |dH/dz|^2 [N], by which a bonus on entropy raises it per unit of its step."""
    h = moments["entropy"].double()
    return moments["sum_p2_logp2"] + 2 * h * moments["sum_p2_logp"] + h.square() * moments["sum_p2"]
