"""Policy-gradient surrogates: one loss per token, [N] in and [N] out, minimized. Aggregation is elsewhere.

Each is a frozen dataclass of its hyper-parameters and has the methods of `Surrogate`. The importance ratio is an
argument, so that it is computed once for everything that uses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlvr.types import Tokens

LOG_RATIO_LIMIT = 20.0


def log_ratio(tokens: Tokens) -> Tensor:
    """log pi - log pi_old [N], at least float32: half precision holds neither a ratio nor the length of a sequence."""
    dtype = torch.promote_types(tokens.logps.dtype, torch.float32)
    return tokens.logps.to(dtype) - tokens.old_logps.to(dtype)


class Clipped(NamedTuple):
    """Tokens whose ratio has left the trust region on the side that its advantage pushes to; bool [N], detached."""

    low: Tensor
    high: Tensor

    @property
    def any(self) -> Tensor:
        return self.low | self.high


class Surrogate(Protocol):
    def ratio(self, tokens: Tokens) -> Tensor:
        """The importance ratio that the surrogate uses, of tokens or of their sequences, [N]."""

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        """Loss of each token, [N]."""

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        """Where the surrogate's bound is active."""


class _TokenRatio:
    """Surrogates of the token-level ratio."""

    __slots__ = ()

    def ratio(self, tokens: Tokens) -> Tensor:
        """pi / pi_old [N]; the log-ratio is clamped to +-20 before exp."""
        return torch.exp(log_ratio(tokens).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _positive(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}={value}: must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoClip(_TokenRatio):
    """max(-A r, -A clip(r, 1 - low, 1 + high)); low < high is clip-higher (DAPO).

    low, high: the trust region.   dual_clip: c > 1 + high bounds the loss of a negative advantage by -A c (TRL's
    `delta`).
    Raises: ValueError if low or high is negative, or dual_clip is not above 1 + high.
    Ref: Schulman et al. 2017, arXiv 1707.06347, Eq. 7; DAPO: Yu et al. 2025, arXiv 2503.14476, Eq. 8; dual clip:
    Ye et al. 2020, arXiv 1912.09729, Eq. 5.
    """

    low: float = 0.2
    high: float = 0.2
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        _positive("low", self.low)
        _positive("high", self.high)
        if self.dual_clip is not None and not self.dual_clip > 1 + self.high:
            raise ValueError(f"dual_clip={self.dual_clip}: must be above 1 + high = {1 + self.high}")

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        bounded = ratio.clamp(1 - self.low, 1 + self.high)
        if self.dual_clip is not None:
            ratio = ratio.clamp(max=self.dual_clip)
        return -torch.min(ratio * tokens.advantages, bounded * tokens.advantages)

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        low, high = ratio.detach() < 1 - self.low, ratio.detach() > 1 + self.high
        return Clipped(low & (tokens.advantages < 0), high & (tokens.advantages > 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclipped(_TokenRatio):
    """-A r with no bound: the surrogate of KL-Cov, whose penalty takes the clip's place."""

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        return -ratio * tokens.advantages

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        none = torch.zeros_like(tokens.advantages, dtype=torch.bool)
        return Clipped(none, none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo(_TokenRatio):
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
        return -weight * tokens.advantages * tokens.logps

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        r = ratio.detach()
        low = r < self.ratio_low if self.ratio_low is not None else torch.zeros_like(r, dtype=torch.bool)
        return Clipped(low, r > self.ratio_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gspo:
    """PPO clip of the sequence's geometric-mean ratio s = exp(mean_t log r_t), the same for all its tokens.

    low, high: the trust region of s.   Meant for sequence-mean aggregation, in which each token's gradient is s A /
    |y|.
    Raises: ValueError if low or high is negative.
    Ref: Zheng et al. 2025, arXiv 2507.18071, Eq. 5-7.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        _positive("low", self.low)
        _positive("high", self.high)

    def ratio(self, tokens: Tokens) -> Tensor:
        """s of each token's sequence [N]."""
        x = log_ratio(tokens)
        zeros = x.new_zeros(tokens.num_sequences)
        total = zeros.index_add(0, tokens.sequence, x)
        length = zeros.index_add(0, tokens.sequence, torch.ones_like(x))
        mean = total / length.clamp(min=1)
        return torch.exp(mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))[tokens.sequence]

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        return PpoClip(low=self.low, high=self.high).loss(ratio, tokens)

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        return PpoClip(low=self.low, high=self.high).clipped(ratio, tokens)


SURROGATES: Mapping[str, Any] = {"ppo_clip": PpoClip, "unclipped": Unclipped, "cispo": Cispo, "gspo": Gspo}
