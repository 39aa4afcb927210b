"""Corrections for an engine that samples from other numbers than the trainer computes.

With rho_t = pi_old(a_t) / pi_rollout(a_t), each is a detached weight on the surrogate; the denominator stays.
A token whose log-prob the engine did not report counts as agreement: rho = 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlvr.controls.base import Control, Outcome, Scope, in_loss_precision, required
from rlvr.surrogates import Clipped
from rlvr.surrogates.base import bounded_exp
from rlvr.types import Coefficients, Mean, Reduce, Tokens


def log_gap(logps: Tensor, other: Tensor) -> Tensor:
    """logps - other in float64 [N], finite: 0 where either is unknown (NaN)."""
    return (logps.double() - other.double()).nan_to_num(nan=0.0)


def log_rho(tokens: Tokens) -> Tensor:
    """log pi_old - log pi_rollout, [N]."""
    return log_gap(tokens.old_logps, required(tokens.rollout_logps, "rollout_logps"))


def check_band(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"low={low}, high={high}: need 0 <= low < high")


class EngineCorrection(Control):
    """A control of old and engine log-probs alone."""

    __slots__ = ()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rollout_logps"})

    @property
    def scope(self) -> Scope:
        """Neither policy changes while the rollout is trained on, and no statistic spans sequences."""
        return "rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tis(EngineCorrection):
    """Truncated importance sampling: weight min(max(rho, low), high).

    low, high: bounds of rho.   level: "token", or "sequence" for rho = prod_t rho_t at all tokens of a sequence.
    Log-ratios, or their sums, are clamped to +-20.
    Raises: ValueError unless 0 <= low < high, or if level is unknown.
    Metrics: tis/weight, tis/capped (fraction).
    Ref: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    Differs: none from verl's token-level weight, which has no lower bound; TRL's upper one is 3 by default.
    """

    low: float = 0.0
    high: float = 2.0
    level: Literal["token", "sequence"] = "token"

    name: ClassVar[str] = "tis"

    def __post_init__(self) -> None:
        check_band(self.low, self.high)
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level={self.level!r}: must be 'token' or 'sequence'")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        log = log_rho(tokens)
        rho = bounded_exp(log if self.level == "token" else tokens.sequence_sums(log)[tokens.sequence])
        weight = rho.clamp(self.low, self.high)
        metrics = {"tis/weight": Mean.of(weight), "tis/capped": Mean.of(weight != rho)}
        return Outcome(Coefficients(weight=in_loss_precision(weight, tokens)), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class IcePop(EngineCorrection):
    """Drop the tokens on which engine and trainer disagree: weight rho where low <= rho <= high, else 0.

    low, high: band of rho_t.
    Raises: ValueError unless 0 <= low < high.
    Metrics: icepop/weight, icepop/masked (fraction).
    Ref: IcePop, Ling team 2025.
    Differs: read from slime, OpenRLHF and NeMo RL, whose band is the default, not from the authors' text.
    """

    low: float = 0.5
    high: float = 5.0

    name: ClassVar[str] = "icepop"

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        rho = bounded_exp(log_rho(tokens))
        kept = (rho >= self.low) & (rho <= self.high)
        weight = rho * kept
        metrics = {"icepop/weight": Mean.of(weight), "icepop/masked": Mean.of(~kept)}
        return Outcome(Coefficients(weight=in_loss_precision(weight, tokens)), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mis(EngineCorrection):
    """Masked importance sampling of sequences: weight rho = prod_t rho_t at all their tokens, 0 outside [low, high].

    low, high: bounds of rho.   The sum of log-ratios is clamped to +-20: a product over a long response overflows.
    Raises: ValueError unless 0 <= low < high.
    Metrics: mis/weight, mis/masked (fraction).
    Ref: Liu et al. 2025, "When speed kills stability"; TRL's sequence_mask.
    Differs: TRL does not clamp the sum.
    """

    low: float = 0.0
    high: float = 3.0

    name: ClassVar[str] = "mis"

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        rho = bounded_exp(tokens.sequence_sums(log_rho(tokens))[tokens.sequence])
        kept = (rho >= self.low) & (rho <= self.high)
        weight = rho * kept
        metrics = {"mis/weight": Mean.of(weight), "mis/masked": Mean.of(~kept)}
        return Outcome(Coefficients(weight=in_loss_precision(weight, tokens)), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricGate(EngineCorrection):
    """Drop the sequences on which engine and trainer disagree, and weigh the tokens of the others by rho_t.

    A sequence is kept if low <= exp(mean_t log rho_t) <= high, else its weights are 0.

    low, high: band of the geometric mean, which unlike the product does not grow with length.
    Raises: ValueError unless 0 <= low < high.
    Metrics: geometric_gate/weight, geometric_gate/masked (fraction).
    Ref: OpenRLHF's and NeMo RL's seq-mask-tis, whose band 0.999 to 1.002 is the default.
    Differs: the tokens' own rho_t is not capped, as in OpenRLHF's code and against its comment; only its log is
    clamped to +-20. `Tis` beside it would apply rho twice.
    """

    low: float = 0.999
    high: float = 1.002

    name: ClassVar[str] = "geometric_gate"

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        log = log_rho(tokens)
        mean = bounded_exp(tokens.sequence_means(log)[tokens.sequence])
        kept = (mean >= self.low) & (mean <= self.high)
        weight = bounded_exp(log) * kept
        metrics = {"geometric_gate/weight": Mean.of(weight), "geometric_gate/masked": Mean.of(~kept)}
        return Outcome(Coefficients(weight=in_loss_precision(weight, tokens)), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicyMask(Control):
    """Do not punish what the current policy would hardly have said: drop sequences that are bad and far off-policy.

    Weight 0 where A < 0 and mean_t (log pi_rollout - log pi) > delta, else 1.

    delta: nats per token, >= 0.
    Raises: ValueError if delta is negative.
    Metrics: off_policy_mask/masked (fraction), off_policy_mask/kl (nats).
    Ref: DeepSeek-V3.2 2025, arXiv 2512.02556, Eq. 9; the paper does not give delta, 0.5 is TRL's example.
    Differs: none from TRL with an engine. Without one TRL takes old_logps for rollout_logps; here they are needed.
    """

    delta: float = 0.5

    name: ClassVar[str] = "off_policy_mask"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rollout_logps"})

    @property
    def scope(self) -> Scope:
        """The current policy's drift is what it measures."""
        return "micro_batch"

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise ValueError(f"delta={self.delta}: must be >= 0, in nats per token")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        kl = log_gap(required(tokens.rollout_logps, "rollout_logps"), tokens.logps)
        kept = (tokens.advantages >= 0) | (tokens.sequence_means(kl)[tokens.sequence] <= self.delta)
        metrics = {"off_policy_mask/masked": Mean.of(~kept), "off_policy_mask/kl": Mean.of(kl)}
        return Outcome(Coefficients(weight=in_loss_precision(kept, tokens)), metrics)
