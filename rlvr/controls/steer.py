"""STEER: hold back the tokens whose update is estimated to change entropy most."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlvr.controls.base import Control, Outcome, Scope, check_scope, in_loss_precision, required
from rlvr.surrogates import LOG_RATIO_LIMIT, Clipped
from rlvr.theory import ESTIMATORS, TokenStatistics
from rlvr.types import Coefficients, Mean, Reduce, Tokens

Form = Literal["theorem", "released", "full"]
CHANGED = 0.01  # a weight this far from 1 counts as changed


def estimated_change(tokens: Tokens, form: Form) -> Tensor:
    """Omega [N] in float64: the change of entropy by each token's own update, per unit of learning rate over tokens.

    With S = pi (log pi + H), E_S its mean under the policy and r = pi / pi_old:
    theorem: -r A (1 - pi) S.   released: -(A / pi_old) (1 - pi) S, pi_old at least 1e-8.   full: -r A (S - E_S).
    """
    logps, old_logps, advantages = tokens.logps.double(), tokens.old_logps.double(), tokens.advantages.double()
    if form == "released":
        step = advantages / old_logps.exp().clamp(min=1e-8)
    else:
        step = advantages * (logps - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    full = form == "full"
    statistics = TokenStatistics(
        logps=logps,
        entropy=required(tokens.entropy, "entropy"),
        step=step,
        mean_discriminator=required(tokens.mean_discriminator, "mean_discriminator") if full else None,
    )
    return ESTIMATORS["discriminator" if full else "steer"](statistics)


def extremes(values: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Smallest and largest of all ranks' values [n]; both 0 without any."""
    mine = torch.stack(values.aminmax()).unsqueeze(0) if len(values) else values.new_zeros(0, 2)
    everyone = reduce.gather(mine)
    return (everyone[:, 0].min(), everyone[:, 1].max()) if len(everyone) else (values.sum(), values.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer(Control):
    """Hold back the tokens whose update is estimated to change entropy most, up or down.

    exp: weight = min_weight^(|Omega_t| / max |Omega|), the maximum over all tokens of the scope.
    linear: weight = max_weight - (max_weight - min_weight) (|Omega_t| - min |Omega|) / (max |Omega| - min |Omega|).
    Omega as in `estimated_change`. Tokens that the surrogate clips have no part in this and weight 1, except in the
    released form. If there is nothing to compare (max |Omega| = 0, in linear max = min), all weights are 1.

    form: theorem, with the sampled token's own logit alone; full, with the whole softmax, exact to first order where
    states share no parameters; released, as the authors' code has it.
    mapping: exp, a power of |Omega| over its maximum; linear, from max_weight down to min_weight.
    min_weight: in (0, 1], of the token with the largest |Omega|.   max_weight: linear only, above min_weight.
    floor: exp only, a lower bound > 0 on the maximum.
    Raises: ValueError if form, mapping or scope is unknown, a number is out of its range, linear has no max_weight, or
    exp has one.
    Metrics: steer/changed (fraction), steer/omega (mean |Omega|), steer/omega_max.
    Ref: arXiv 2510.10150, Eq. 7-8 and 17; for `full` arXiv 2602.03392.
    Differs: zz-haooo/STEER's release is form released with floor 0.02 and min_weight 0.8 (linear: 0.8 to 1.2), where
    Omega is the theorem's over pi, so that rare tokens set the maximum, and clipped tokens count. It takes the maximum
    of one micro-batch of one rank instead of the whole rollout, entropies of the old pass beside current log-probs,
    weights in float32, and in linear the middle of the range if max = min.
    """

    form: Form = "theorem"
    mapping: Literal["exp", "linear"] = "exp"
    min_weight: float = 0.7
    max_weight: float | None = None
    floor: float | None = None
    scope: Scope = "rollout"

    name: ClassVar[str] = "steer"
    levers: ClassVar[Mapping[str, int]] = {"min_weight": -1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy", "mean_discriminator"} if self.form == "full" else {"entropy"})

    @property
    def idle(self) -> bool:
        return self.mapping == "exp" and self.min_weight == 1

    def __post_init__(self) -> None:
        check_scope(self.scope)
        if self.form not in ("theorem", "released", "full"):
            raise ValueError(f"form={self.form!r}: must be 'theorem', 'released' or 'full'")
        if self.mapping not in ("exp", "linear"):
            raise ValueError(f"mapping={self.mapping!r}: must be 'exp' or 'linear'")
        if not 0 < self.min_weight <= 1:
            raise ValueError(f"min_weight={self.min_weight}: must lie in (0, 1]")
        if self.mapping == "exp" and self.max_weight is not None:
            raise ValueError(f"max_weight={self.max_weight}: only mapping='linear' has one, unset it")
        if self.mapping == "linear" and (self.max_weight is None or not self.min_weight < self.max_weight < math.inf):
            raise ValueError(
                f"max_weight={self.max_weight}: mapping='linear' needs a number above min_weight={self.min_weight}"
            )
        if self.mapping == "linear" and self.floor is not None:
            raise ValueError(f"floor={self.floor}: only mapping='exp' has one, unset it")
        if self.floor is not None and not 0 < self.floor < math.inf:
            raise ValueError(f"floor={self.floor}: must be a number above 0, or unset")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        acts = torch.ones_like(clipped.any) if self.form == "released" else ~clipped.dead
        omega = estimated_change(tokens, self.form).abs() * acts
        smallest, largest = extremes(omega[acts], reduce)
        weight = torch.where(acts, self._weight(omega, smallest, largest), 1.0)
        metrics = {
            "steer/changed": Mean.of((weight - 1).abs() > CHANGED),
            "steer/omega": Mean.of(omega),
            "steer/omega_max": Mean.of(largest.expand_as(omega)),
        }
        return Outcome(Coefficients(weight=in_loss_precision(weight, tokens)), metrics)

    def _weight(self, omega: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
        if self.max_weight is None:
            bound = largest if self.floor is None else largest.clamp(min=self.floor)
            return torch.where(bound > 0, self.min_weight ** (omega / bound), 1.0)
        share = (omega - smallest) / (largest - smallest)
        weight = self.max_weight - (self.max_weight - self.min_weight) * share
        return torch.where(largest > smallest, weight, 1.0)
