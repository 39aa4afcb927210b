"""The statistics of a language-model head at each token: their names, and what a call may ask for."""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of p = softmax(z) at each token, all [N]; None where not wanted.

    z are the logits as the policy samples from them: scaled, capped and divided by the temperature.
    float32, or float64 for float64 inputs. Differentiable but for the two that are marked.
    """

    logps: Tensor | None = None  # log p(target), <= 0
    entropy: Tensor | None = None  # H = -sum_v p log p in nats, >= 0
    lse: Tensor | None = None  # log sum_v exp(z)
    sum_p2: Tensor | None = None  # sum_v p^2
    sum_p_logp2: Tensor | None = None  # sum_v p (log p)^2; the variance of log p is it - H^2
    sum_p2_logp: Tensor | None = None  # sum_v p^2 log p; E_S = sum_v p^2 (log p + H) = sum_p2_logp + entropy * sum_p2
    sum_p2_logp2: Tensor | None = None  # sum_v (p log p)^2; |dH/dz|^2 = it + 2 H sum_p2_logp + H^2 sum_p2
    p_max: Tensor | None = None  # max_v p; without gradient
    is_greedy: Tensor | None = None  # bool: the target has the largest logit, alone or tied; without gradient


WITHOUT_GRADIENT = ("p_max", "is_greedy")
# What needs sums of higher order than log-prob and entropy do.
MOMENTS = ("sum_p2", "sum_p_logp2", "sum_p2_logp", "sum_p2_logp2")


def check_want(want: Collection[str]) -> tuple[str, ...]:
    """The names in want, each once. Raises: ValueError if one of them is unknown or there is none."""
    names = () if isinstance(want, str) else tuple(dict.fromkeys(want))
    if not names:
        raise ValueError(f"want={want!r}: give a list of {', '.join(TokenStats._fields)}")
    if unknown := set(names) - set(TokenStats._fields):
        raise ValueError(f"want={sorted(unknown)} is not known; choose from {', '.join(TokenStats._fields)}")
    return names


def inverse_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature for each token: a scalar or [N] becomes [N], on the device of `like` [N] and in its dtype.

    Raises: ValueError if a temperature or its inverse is not positive and finite, if it wants a gradient, or if their
    number is not N.
    """
    if not isinstance(temperature, Tensor):
        if not 1 / torch.finfo(like.dtype).max < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be > 0 and finite, and so must its inverse")
        return torch.full_like(like, 1 / float(temperature))
    if temperature.shape not in ((), like.shape):
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}: give a number, or one for each of {len(like)} tokens"
        )
    if temperature.requires_grad:
        raise ValueError("temperature wants a gradient, and there is none: detach it")
    inverse = temperature.double().reciprocal().to(like)
    if not bool(((inverse > 0) & inverse.isfinite()).all()):
        raise ValueError(f"temperature={temperature} must be > 0 and finite, and so must its inverse in {like.dtype}")
    return inverse.expand(like.shape).contiguous()
