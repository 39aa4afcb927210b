"""Surrogates of a sequence's geometric-mean ratio, for aggregation that takes the mean of each sequence first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlvr.surrogates.base import Clipped, Proportional, TokenRatio, bounded_exp, check_region, log_ratio
from rlvr.surrogates.per_token import PpoClip
from rlvr.types import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Gspo(Proportional):
    """PPO clip of the sequence's geometric-mean ratio s = exp(mean_t log r_t), the same for all its tokens.

    low, high: the trust region of s is [1 - low, 1 + high].
    Meant for sequence-mean aggregation, in which each token's gradient is s A / |y|.
    Raises: ValueError if low or high is negative.
    Ref: Zheng et al. 2025, arXiv 2507.18071, Eq. 5-7.
    Differs: verl's bounds are `clip_ratio_low`, `clip_ratio_high` (.2 unless set), its log s is at most 10, ours 20.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        check_region(self.low, self.high)

    def ratio(self, tokens: Tokens) -> Tensor:
        """s of each token's sequence [N]."""
        return bounded_exp(tokens.sequence_means(log_ratio(tokens)))[tokens.sequence]

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        return PpoClip(low=self.low, high=self.high).loss(ratio, tokens)

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        return PpoClip(low=self.low, high=self.high).clipped(ratio, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gmpo(TokenRatio):
    """-A exp(mean_t d_t), d = log r clipped to [-low, high]: each token is clipped before the geometric mean.

    A > 0 is clipped above only, A < 0 below only; a clipped token has no gradient, the rest of its sequence has.

    low, high: bounds of the log-ratio; .4 lets a ratio range from .67 to 1.49.   `ratio` is the token's.
    Raises: ValueError if low or high is negative.
    Ref: Zhao et al. 2025, arXiv 2507.20673.
    Differs: verl divides by the length plus 1e-8, and averages over each micro-batch instead of the whole batch.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        check_region(self.low, self.high)

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        at = self.clipped(ratio, tokens)
        bounded = torch.where(at.low, -self.low, torch.where(at.high, self.high, ratio.log()))
        return -torch.exp(tokens.sequence_means(bounded))[tokens.sequence] * tokens.advantages

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        x = ratio.detach().log()
        return Clipped((x < -self.low) & (tokens.advantages < 0), (x > self.high) & (tokens.advantages > 0))
