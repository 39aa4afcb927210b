"""What a surrogate is: a frozen dataclass of hyper-parameters that gives each token a loss, [N] in and [N] out.

Losses are minimized; aggregation is elsewhere. The importance ratio is an argument, so that it is computed once for
everything that uses it.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlvr.types import Tokens

LOG_RATIO_LIMIT = 20.0


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision holds neither a ratio nor the length of a sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_ratio(tokens: Tokens) -> Tensor:
    """log pi - log pi_old [N], at least float32; 0 for a token that is impossible under both."""
    new, old = at_least_float32(tokens.logps), at_least_float32(tokens.old_logps)
    return (new - old).masked_fill((new == -torch.inf) & (old == -torch.inf), 0.0)


def bounded_exp(x: Tensor) -> Tensor:
    """The ratio of a log-ratio clamped to +-20: positive and finite for a log-ratio of +-inf, too."""
    return torch.exp(x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def check_region(low: float, high: float) -> None:
    for name, value in (("low", low), ("high", high)):
        if not value >= 0:
            raise ValueError(f"{name}={value}: must be >= 0")


class Clipped(NamedTuple):
    """Tokens that have left the trust region on the side that their advantage pushes to; bool [N], detached.

    low, high: at the region's bounds.   dual: punished tokens whose ratio is beyond the dual clip, where there is one.
    """

    low: Tensor
    high: Tensor
    dual: Tensor | None = None

    @property
    def any(self) -> Tensor:
        """At a bound of the trust region, as clip fractions and Clip-Cov count it."""
        return self.low | self.high

    @property
    def dead(self) -> Tensor:
        """Without gradient, for whatever bound: STEER's I_clip = 0."""
        return self.any if self.dual is None else self.any | self.dual

    def select(self, keep: Tensor) -> "Clipped":
        """The tokens where keep [N] is true."""
        return Clipped(self.low[keep], self.high[keep], None if self.dual is None else self.dual[keep])


class Surrogate(Protocol):
    @property
    def penalizes(self) -> bool:
        """Whether a token without advantage has a gradient, too."""

    def ratio(self, tokens: Tokens) -> Tensor:
        """The importance ratio that the surrogate uses, of tokens or of their sequences, [N]."""

    def loss(self, ratio: Tensor, tokens: Tokens) -> Tensor:
        """Loss of each token, [N], of the ratio that `ratio` gave."""

    def clipped(self, ratio: Tensor, tokens: Tokens) -> Clipped:
        """Where the surrogate's bound is active."""


class Proportional:
    """Surrogates whose loss is a multiple of the advantage."""

    __slots__ = ()

    @property
    def penalizes(self) -> bool:
        """A token without advantage has no gradient."""
        return False


class TokenRatio(Proportional):
    """Surrogates of the token-level ratio."""

    __slots__ = ()

    def ratio(self, tokens: Tokens) -> Tensor:
        """pi / pi_old [N]; the log-ratio is clamped to +-20 before exp."""
        return bounded_exp(log_ratio(tokens))
