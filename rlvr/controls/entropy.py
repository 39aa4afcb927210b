"""Controls that read each token's entropy: train on the uncertain tokens only, or pay for uncertainty."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.controls.base import Control, Outcome, Scope, check_fraction, check_scope, in_loss_precision, required
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens


def constant(value: float, tokens: Tokens) -> Tensor:
    """The same number for every token, float64 [N]."""
    return torch.full_like(tokens.logps, value, dtype=torch.float64)


def check_coef(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value}: must be a number >= 0")


def upper_quantile(values: Tensor, fraction: float, reduce: Reduce) -> Tensor:
    """The value with `fraction` of all ranks' values [n] above it, linear between order statistics; NaN without any.

    Every rank sends only the values that can decide: the largest ones, down to that place.
    """
    count = int(reduce.sum(torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)))
    # The decimal that was written: in floats 0.29 * 100 is below 29, and would lose the token that stands there.
    place = Fraction(str(fraction)) * max(count - 1, 0)
    mine = values.double().topk(min(math.ceil(place) + 1, values.numel())).values
    largest = reduce.gather(mine).sort(descending=True).values
    if count == 0:
        return values.new_full((), math.nan, dtype=torch.float64)
    above, below = largest[math.floor(place)], largest[math.ceil(place)]
    return above - float(place % 1) * (above - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class HighEntropyTokens(Control):
    """Train only on the tokens where the policy is most uncertain: the 80/20 rule.

    Weight 1 where H_t >= the (1 - fraction) quantile of H over the scope's tokens, linearly interpolated; 0 elsewhere.
    Ties with the quantile are kept. Masked tokens stay in the denominator.

    fraction: share of the scope's tokens to train on, in [0, 1]; 1 keeps all, 0 those of the largest entropy.
    Raises: ValueError if fraction is outside [0, 1].
    Metrics: high_entropy/masked (fraction), high_entropy/threshold (nats).
    Ref: Wang et al. 2025, arXiv 2506.01939.
    Differs: the quantile is that of the whole rollout batch by default, by the policy that made it; TRL takes that of
    one micro-batch of every rank, with torch.quantile, which stops at 2^24 tokens. No lever: a larger fraction leaves
    less entropy while training lowers it, and more while training raises it.
    """

    fraction: float = 0.2
    scope: Scope = "rollout"

    name: ClassVar[str] = "high_entropy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    @property
    def idle(self) -> bool:
        return self.fraction == 1

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_scope(self.scope)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        entropy = required(tokens.entropy, "entropy").double()
        threshold = upper_quantile(entropy, self.fraction, reduce)
        kept = entropy >= threshold
        metrics = {
            "high_entropy/masked": Mean.of(~kept),
            "high_entropy/threshold": Mean.of(threshold.expand_as(entropy)),
        }
        return Outcome(Coefficients(weight=in_loss_precision(kept, tokens)), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonus(Control):
    """Pay for entropy: the loss gets - coef H_t at each token, with the gradient through H.

    coef: >= 0; 0 is no bonus at all, even where H is NaN. Cui et al. saw no gain at 0.005, an explosion at 0.01.
    Raises: ValueError if coef is negative or not finite.
    Metrics: entropy_bonus/coef.
    Ref: Mnih et al. 2016, arXiv 1602.01783; for reasoning models Cui et al. 2025, arXiv 2505.22617.
    Differs: all tokens pay, and the bonus is aggregated as the rest of the loss is. TRL takes the micro-batch's token
    mean in every mode, and only over the tokens that its high-entropy mask keeps.
    """

    coef: float = 0.001

    name: ClassVar[str] = "entropy_bonus"
    levers: ClassVar[Mapping[str, int]] = {"coef": +1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    @property
    def idle(self) -> bool:
        return self.coef == 0

    @property
    def scope(self) -> Scope:
        """Tokens share nothing, and the gradient is that of the current policy's entropy."""
        return "micro_batch"

    def __post_init__(self) -> None:
        check_coef("coef", self.coef)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        required(tokens.entropy, "entropy")
        coef = constant(self.coef, tokens)
        bonus = in_loss_precision(coef, tokens) if self.coef else None
        return Outcome(Coefficients(entropy=bonus), {"entropy_bonus/coef": Mean.of(coef)})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveEntropy(Control):
    """An entropy bonus that is there only while entropy is below its target, and grows the longer it is.

    After each optimizer step with entropy e: coef <- clip(coef + delta) if e < target, else clip(coef - delta), and
    the next step's bonus is coef if e < target, else 0.

    coef: where it starts.   target: nats.   delta: change per step.   min_coef, max_coef: its range.
    inclusive: e = target counts as below.   enabled: the last e was below; True pays the bonus from the first step on.
    Raises: ValueError unless 0 <= min_coef <= coef <= max_coef, target >= 0, delta >= 0, all finite; from `observe`
    for an entropy that is not a number.
    Metrics: adaptive_entropy/coef, adaptive_entropy/applied.
    Ref: Skywork-OR1, He et al. 2025, arXiv 2505.22312.
    Differs: e is the exact entropy of an optimizer step's tokens over all ranks, and acts from the next step on;
    Skywork takes the mean of -old_logps over the rollout, and acts on that rollout. TRL's rule is inclusive=True, with
    delta 0.005 and max_coef 1. No lever: it is a controller itself.
    """

    coef: float = 0.0
    target: float = 0.2
    delta: float = 1e-4
    min_coef: float = 0.0
    max_coef: float = 0.005
    inclusive: bool = False
    enabled: bool = False

    name: ClassVar[str] = "adaptive_entropy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    @property
    def idle(self) -> bool:
        return self.max_coef == 0

    @property
    def scope(self) -> Scope:
        """As `EntropyBonus`."""
        return "micro_batch"

    @property
    def applied(self) -> float:
        """The coefficient of the bonus at this step."""
        return self.coef if self.enabled else 0.0

    def __post_init__(self) -> None:
        for name in ("target", "delta", "min_coef", "max_coef", "coef"):
            check_coef(name, getattr(self, name))
        if not self.min_coef <= self.coef <= self.max_coef:
            raise ValueError(f"coef={self.coef}: must lie in [min_coef={self.min_coef}, max_coef={self.max_coef}]")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        required(tokens.entropy, "entropy")
        applied = constant(self.applied, tokens)
        metrics = {
            "adaptive_entropy/coef": Mean.of(constant(self.coef, tokens)),
            "adaptive_entropy/applied": Mean.of(applied),
        }
        bonus = in_loss_precision(applied, tokens) if self.applied else None
        return Outcome(Coefficients(entropy=bonus), metrics)

    def observe(self, entropy: float) -> "AdaptiveEntropy":
        if math.isnan(entropy):
            raise ValueError(f"entropy={entropy}: adaptive_entropy needs the entropy of the step")
        low = entropy < self.target or (self.inclusive and entropy == self.target)
        moved = self.coef + (self.delta if low else -self.delta)
        return replace(self, coef=min(max(moved, self.min_coef), self.max_coef), enabled=low)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyAdvantage(Control):
    """Give uncertain tokens a bounded bonus on their advantage: A + min(alpha H, |A| / kappa), H detached.

    Both signs gain: good tokens are reinforced more, bad ones punished less. An advantage of 0 stays 0, and none
    changes its sign.

    alpha: advantage per nat, >= 0; the paper takes 0.4 with GRPO and 0.1 with PPO.   kappa: >= 1, bounds the bonus.
    Raises: ValueError if alpha is negative or kappa below 1, or either is not finite.
    Metrics: entropy_advantage/bonus, entropy_advantage/bounded (fraction).
    Ref: Cheng et al. 2025, arXiv 2506.14758.
    Differs: kappa 2 comes from a third party, the paper's own value is unknown to us. By default H is that of the
    policy that made the rollout. No lever: on a tabular policy it leaves more entropy after small steps, less after
    large ones.
    """

    alpha: float = 0.4
    kappa: float = 2.0
    scope: Scope = "rollout"

    name: ClassVar[str] = "entropy_advantage"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    @property
    def idle(self) -> bool:
        return self.alpha == 0

    def __post_init__(self) -> None:
        check_coef("alpha", self.alpha)
        if not 1 <= self.kappa < math.inf:
            raise ValueError(f"kappa={self.kappa}: must be a number >= 1, below which an advantage changes its sign")
        check_scope(self.scope)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        wanted = self.alpha * required(tokens.entropy, "entropy").double()
        bound = tokens.advantages.double().abs() / self.kappa
        bonus = torch.minimum(wanted, bound)
        metrics = {"entropy_advantage/bonus": Mean.of(bonus), "entropy_advantage/bounded": Mean.of(wanted > bound)}
        coefficient = in_loss_precision(bonus, tokens) if self.alpha else None
        return Outcome(Coefficients(advantage=coefficient), metrics)
