"""Surrogates in which each token stands for itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlvr.surrogates.base import Clipped, TokenRatio, at_least_float32, bounded_exp, check_region, log_ratio
from rlvr.types import Tokens


class _Unbounded(TokenRatio):
    """Surrogates without a hard bound."""

    __slots__ = ()

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        none = torch.zeros_like(tokens.advantages, dtype=torch.bool)
        return Clipped(none, none)


def _score_loss(weight: Tensor, tokens: Tokens) -> Tensor:
    """-weight log pi [N], where weight 0 takes a token out even if its log-prob is -inf (0 * -inf is NaN)."""
    return torch.where(weight == 0, 0.0, -weight * at_least_float32(tokens.logps))


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoClip(TokenRatio):
    """max(-A r, -A clip(r, 1 - low, 1 + high)); low < high is clip-higher (DAPO).

    low, high: the trust region is [1 - low, 1 + high].
    dual_clip: c > 1 + high bounds the loss of a negative advantage by -A c (TRL's `delta`).
    Raises: ValueError if low or high is negative, or dual_clip is not above 1 + high.
    Ref: Schulman et al. 2017, arXiv 1707.06347, Eq. 7; DAPO: Yu et al. 2025, arXiv 2503.14476, Eq. 8; dual clip:
    Ye et al. 2020, arXiv 1912.09729, Eq. 5.
    """

    low: float = 0.2
    high: float = 0.2
    dual_clip: float | None = None

    levers: ClassVar[Mapping[str, int]] = {"high": +1}  # what a thermostat may move, as for controls

    def __post_init__(self) -> None:
        check_region(self.low, self.high)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.high:
            raise ValueError(f"dual_clip={self.dual_clip}: must be above 1 + high = {1 + self.high}")

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        if self.dual_clip is not None:
            ratio = ratio.clamp(max=self.dual_clip)
        return -torch.min(ratio * tokens.advantages, bounded * tokens.advantages)

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        ratio, punished = ratio.detach(), tokens.advantages < 0
        dual = None if self.dual_clip is None else punished & (ratio > self.dual_clip)
        low, high = ratio < 1 - self.low, ratio > 1 + self.high
        return Clipped(low & punished, high & (tokens.advantages > 0), dual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclipped(_Unbounded):
    """-A r with no bound: the surrogate of KL-Cov, whose penalty takes the clip's place."""

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        return -ratio * tokens.advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpg(_Unbounded):
    """-A log pi, REINFORCE: the gradient of PPO's first update, with nothing to correct or hold back later ones.

    Ref: Chu et al. 2025, arXiv 2504.02546.
    Differs: the paper also rescales advantages, which is no part of a surrogate.
    """

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        return _score_loss(tokens.advantages, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sapo(_Unbounded):
    """-A (4 / tau) sigmoid(tau (r - 1)): a gate that fades smoothly where PPO clips; tau is that of A's sign.

    At r = 1 its gradient is REINFORCE's and its value -2 A / tau, so losses of other surrogates do not compare.

    tau_pos: for A > 0.   tau_neg: for the rest.   The larger, the sooner a token that moved away loses its gradient.
    Raises: ValueError if one of them is not positive and finite.
    Ref: Gao et al. 2025, arXiv 2511.20347, with the mean of each sequence first (loss_type: grpo).
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive and finite")

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        tau = torch.where(tokens.advantages > 0, torch.full_like(ratio, self.tau_pos), self.tau_neg)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * tokens.advantages


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo(TokenRatio):
    """-stop(clip(r, ratio_low, ratio_high)) A log pi: caps the importance weight, keeps every token's gradient.

    ratio_low, ratio_high: bounds of the ratio itself, not distances from 1 (verl's eps .2/.28 are .8 and 1.28; TRL and
    ScaleRL cap above only). `clipped` reports where a bound is active.
    Raises: ValueError if ratio_high is not positive or below ratio_low.
    Ref: MiniMax 2025, arXiv 2506.13585, Eq. 4; ScaleRL: arXiv 2510.13786.
    Differs: verl writes the bounds as 1 - eps_low and 1 + eps_high.
    """

    ratio_low: float | None = None
    ratio_high: float = 5.0

    def __post_init__(self) -> None:
        low = 0.0 if self.ratio_low is None else self.ratio_low
        if not 0 <= low < self.ratio_high:
            raise ValueError(f"ratio_low={self.ratio_low}, ratio_high={self.ratio_high}: need 0 <= low < high")

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        weight = ratio.clamp(min=self.ratio_low, max=self.ratio_high).detach()
        return _score_loss(weight * tokens.advantages, tokens)

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        r = ratio.detach()
        low = r < self.ratio_low if self.ratio_low is not None else torch.zeros_like(r, dtype=torch.bool)
        return Clipped(low, r > self.ratio_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dppo:
    """-keep A r + kl_coef log^2 r: a trust region of the difference of probabilities, where PPO's is of their ratio.

    A token loses its first term if A > 0 and pi - pi_anchor > high, or if A <= 0 and pi - pi_anchor < -low; `clipped`
    says which. A rare token, whose ratio is large though little probability has moved, keeps it.

    low, high: bounds of the difference.   kl_coef: of the squared log-ratio, on all tokens.   anchor: the policy of
    ratio and difference, `old` (recomputed by the trainer) or `rollout` (as the engine reported it, as in the paper).
    Raises: ValueError if low or high is negative, kl_coef is negative or infinite, or anchor is unknown; with
    `rollout`, for tokens without rollout_logps.
    Ref: Qi et al. 2026, arXiv 2602.04879 (Binary-TV); the penalty: Kimi K2.5, arXiv 2602.02276, as in prime-rl.
    Differs: verl takes -A stop(min(r, c)) log pi for -A r, c its `clip_ratio_c` (3 unless set; its own script 10,000);
    prime-rl does not clamp the log-ratio.
    """

    low: float = 0.2
    high: float = 0.2
    kl_coef: float = 1e-3
    anchor: Literal["old", "rollout"] = "old"

    def __post_init__(self) -> None:
        check_region(self.low, self.high)
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef={self.kl_coef}: must be >= 0 and finite")
        if self.anchor not in ("old", "rollout"):
            raise ValueError(f"anchor={self.anchor!r}: must be old or rollout")

    @property
    def penalizes(self) -> bool:
        """The squared log-ratio does, whatever the advantage."""
        return self.kl_coef > 0

    def ratio(self, tokens: Tokens) -> Tensor:
        """pi / pi_anchor [N]; the log-ratio is clamped to +-20 before exp."""
        return bounded_exp(log_ratio(self._anchored(tokens)))

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        gain = torch.where(self.clipped(ratio, tokens).any, 0.0, ratio * tokens.advantages)
        return self.kl_coef * ratio.log().square() - gain

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        anchor = at_least_float32(self._anchored(tokens).old_logps)
        moved = at_least_float32(tokens.logps.detach()).exp() - anchor.exp()
        positive = tokens.advantages > 0
        return Clipped((moved < -self.low) & ~positive, (moved > self.high) & positive)

    def _anchored(self, tokens: Tokens) -> Tokens:
        """The tokens with the anchor in place of the old policy."""
        if self.anchor == "old":
            return tokens
        if tokens.rollout_logps is None:
            raise ValueError("anchor='rollout' needs tokens.rollout_logps, which was not computed: use anchor='old'")
        return replace(tokens, old_logps=tokens.rollout_logps)
