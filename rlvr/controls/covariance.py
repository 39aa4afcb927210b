"""Clip-Cov and KL-Cov: act on the few tokens whose log-prob and advantage vary together, which drive entropy down.

Both rest on dH = -eta Cov(log pi, pi A) for a policy-gradient step (Cui et al. 2025, arXiv 2505.22617, Theorem 1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.controls.base import (
    Control,
    Outcome,
    Scope,
    check_fraction,
    check_scope,
    in_loss_precision,
    largest,
    required,
)
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens


def covariance(tokens: Tokens, reduce: Reduce) -> tuple[Tensor, int]:
    """(cov_t = (A_t - mean A)(log pi_t - mean log pi) in float64 [N], number of tokens over all ranks)."""
    means, total = token_means(tokens.logps, tokens.advantages, reduce)
    return products(tokens.logps, tokens.advantages, means), total


def token_means(logps: Tensor, advantages: Tensor, reduce: Reduce) -> tuple[Tensor, int]:
    """(mean log pi and mean A in float64 [2], number of tokens), over all ranks; 0 without tokens."""
    logps, advantages = logps.double(), advantages.double()
    count = torch.tensor(float(logps.numel()), dtype=torch.float64, device=logps.device)
    sums = reduce.sum(torch.stack([logps.sum(), advantages.sum(), count]))
    return sums[:2] / sums[2].clamp(min=1), int(sums[2])


def products(logps: Tensor, advantages: Tensor, means: Tensor) -> Tensor:
    """(A_t - mean A)(log pi_t - mean log pi) in float64 [N], with the means of `token_means`."""
    return (logps.double() - means[0]) * (advantages.double() - means[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCov(Control):
    """Mask a random few of the tokens that drive entropy down most.

    cov_t = (A_t - mean A)(log pi_t - mean log pi); candidates have low < cov < high and an inactive clip; a fraction
    of all tokens, drawn without replacement, gets weight 0.

    fraction: share of the scope's tokens to mask, at least one candidate if any.   low, high: covariance band.
    exclude_clipped: leave tokens that the surrogate already clips out of the candidates, as the released code does.
    Raises: ValueError if fraction is outside [0, 1] or low >= high.
    Metrics: clip_cov/masked, clip_cov/candidates (fractions), clip_cov/cov.
    Ref: Cui et al. 2025, arXiv 2505.22617, Eq. 10-12.
    Differs: keyed draws instead of the global generator; statistics over the whole rollout batch by default, where
    nothing is clipped yet because old and current policy are the same.
    """

    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    exclude_clipped: bool = True
    scope: Scope = "rollout"

    name: ClassVar[str] = "clip_cov"
    levers: ClassVar[Mapping[str, int]] = {"fraction": +1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key"})

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_scope(self.scope)
        if not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: low must be below high")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        cov, total = covariance(tokens, reduce)
        candidates = (cov > self.low) & (cov < self.high)
        if self.exclude_clipped:
            candidates &= ~clipped.any
        num_masked = max(int(self.fraction * total), 1)
        masked = torch.zeros_like(candidates)
        keys = required(tokens.key, "key")[candidates]
        masked[candidates] = largest(keys, keys, num_masked, reduce)
        weight = in_loss_precision(~masked, tokens)
        metrics = {
            "clip_cov/masked": Mean.of(masked),
            "clip_cov/candidates": Mean.of(candidates),
            "clip_cov/cov": Mean.of(cov),
        }
        return Outcome(Coefficients(weight=weight), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class KlCov(Control):
    """Hold back the tokens that drive entropy down most: a penalty on their drift from the old policy.

    The `fraction` of tokens with the largest cov_t = (A_t - mean A)(log pi_t - mean log pi) pays
    coef * |log pi - log pi_old|. There is no PPO clip: the surrogate is -A r.

    fraction: share of the scope's tokens, at least one.   coef: the paper's beta, >= 0.
    Raises: ValueError if fraction is outside [0, 1] or coef is negative.
    Metrics: kl_cov/selected (fraction), kl_cov/cov.
    Ref: Cui et al. 2025, arXiv 2505.22617, Eq. 13-14.
    Differs: `fraction` is a fraction (PRIME's `k_percent` is a percent, and capped by the token count); statistics
    over the whole rollout batch by default. Penalty and gradient are zero while pi = pi_old: it needs several updates
    per rollout.
    """

    fraction: float = 2e-3
    coef: float = 1.0
    scope: Scope = "rollout"

    name: ClassVar[str] = "kl_cov"
    off_policy_only: ClassVar[bool] = True
    surrogate: ClassVar[str | None] = "unclipped"
    levers: ClassVar[Mapping[str, int]] = {"coef": +1, "fraction": +1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key"})

    @property
    def idle(self) -> bool:
        return self.coef == 0

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_scope(self.scope)
        if not 0 <= self.coef < math.inf:
            raise ValueError(f"coef={self.coef}: must be a number >= 0")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        cov, total = covariance(tokens, reduce)
        selected = largest(cov, required(tokens.key, "key"), max(int(self.fraction * total), 1), reduce)
        metrics = {"kl_cov/selected": Mean.of(selected), "kl_cov/cov": Mean.of(cov)}
        return Outcome(Coefficients(drift=in_loss_precision(self.coef * selected.double(), tokens)), metrics)
