"""From sums over a vocabulary to statistics and to their gradient: the mathematics that every backend shares.

A row of logits z, seen in any number of parts, is summed up relative to the largest logit m so far, u = z - m <= 0:

    s0 = sum e^u    s1 = sum u e^u    s2 = sum u^2 e^u    q0 = sum e^2u    q1 = sum u e^2u    q2 = sum u^2 e^2u

and u_y for the target. Entropy is then log s0 - s1/s0, a sum of two non-negative terms, and the log-prob u_y - log s0
a sum of two non-positive ones: their signs hold exactly, and no large numbers cancel.

The gradient of any of the statistics by z_v is, with l = log p,

    target 1[v = y] + p_v (a0 + a1 l + a2 l^2 + p_v (b0 + b1 l + b2 l^2))

so one backward pass with seven numbers per token serves every objective.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")
# Rows of the tensor [8, N] in which a backend returns its sums.
M, S0, S1, S2, Q0, Q1, Q2, U_TARGET = range(8)
ROWS = 8
FAR = 1000.0  # e^-FAR is 0 in every dtype, and FAR^2 finite


def empty(n: int, like: Tensor) -> Tensor:
    """Sums over no logits [8, n], in the dtype and on the device of `like`."""
    sums = like.new_zeros(ROWS, n)
    sums[M] = sums[U_TARGET] = -INF
    return sums


def rescale_(sums: Tensor, m: Tensor) -> None:
    """Make sums [8, ...] relative to m >= sums[M], in place."""
    above = torch.where(sums[M] == -INF, 0.0, m - sums[M])  # sums over no logits are all 0 and stay so
    d = above.clamp(max=FAR)
    a = torch.exp(-d)
    for zeroth, first, second, scale in ((S0, S1, S2, a), (Q0, Q1, Q2, a * a)):
        sums[second] = scale * (sums[second] - 2 * d * sums[first] + d * d * sums[zeroth])
        sums[first] = scale * (sums[first] - d * sums[zeroth])
        sums[zeroth] *= scale
    sums[U_TARGET] -= above
    sums[M] = m


def merge(parts: Tensor) -> Tensor:
    """Sums [8, N] of a vocabulary from those of its parts [8, S, N]: splits of a kernel, shards of ranks, or both."""
    parts = parts.clone()
    rescale_(parts, parts[M].amax(0).expand_as(parts[M]))
    sums = parts.sum(1)
    sums[M] = parts[M, 0]
    sums[U_TARGET] = parts[U_TARGET].amax(0)  # one part has the target, the others say -inf
    return sums


def finish(sums: Tensor, want: Collection[str]) -> dict[str, Tensor]:
    """The wanted fields of TokenStats [N] from the sums [8, N] of the whole vocabulary."""
    m, s0, s1, s2, q0, q1, q2, u_target = sums
    log_s0, mean_u = s0.log(), s1 / s0
    stats = {
        "logps": lambda: u_target - log_s0,
        "entropy": lambda: log_s0 - mean_u,
        "lse": lambda: m + log_s0,
        "sum_p2": lambda: q0 / s0.square(),
        "sum_p_logp2": lambda: s2 / s0 - 2 * log_s0 * mean_u + log_s0.square(),
        "sum_p2_logp": lambda: (q1 - log_s0 * q0) / s0.square(),
        "sum_p2_logp2": lambda: (q2 - 2 * log_s0 * q1 + log_s0.square() * q0) / s0.square(),
        "p_max": lambda: s0.reciprocal(),
        "is_greedy": lambda: u_target == 0,
    }
    return {name: stats[name]() for name in want}


class Slope(NamedTuple):
    """The numbers [7, N] of the gradient by the logits: target, a0, a1, a2, b0, b1, b2.

    degree: 0 if only target and a0 are not zero (log-prob), 1 if a1 is not either (entropy), 2 in general.
    """

    numbers: Tensor
    degree: int


def live_tokens(grads: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """[N] bool, N as in `like`: the tokens with a gradient by any statistic. What the others' statistics are, be it
    NaN, does not matter.
    """
    live = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for g in grads.values():
        live |= g != 0
    return live


def slope(sums: Tensor, grads: Mapping[str, Tensor]) -> Slope:
    """The gradient by the logits from the gradients [N] by the statistics, of `finish`'s fields."""
    stats = finish(sums, _slope_needs(grads))
    numbers = sums.new_zeros(7, sums.size(1))
    target, a0, a1, a2, b0, b1, b2 = numbers
    for name, g in grads.items():
        match name:
            case "logps":
                target += torch.where(sums[U_TARGET] == -INF, 0.0, g)  # an impossible target stays impossible
                a0 -= g
            case "lse":
                a0 += g
            case "entropy":
                a0 -= g * stats["entropy"]
                a1 -= g
            case "sum_p2":
                a0 -= 2 * g * stats["sum_p2"]
                b0 += 2 * g
            case "sum_p_logp2":
                a0 -= g * (stats["sum_p_logp2"] - 2 * stats["entropy"])
                a1 += 2 * g
                a2 += g
            case "sum_p2_logp":
                a0 -= g * (2 * stats["sum_p2_logp"] + stats["sum_p2"])
                b0 += g
                b1 += 2 * g
            case "sum_p2_logp2":
                a0 -= 2 * g * (stats["sum_p2_logp2"] + stats["sum_p2_logp"])
                b1 += 2 * g
                b2 += 2 * g
    degree = 0 if grads.keys() <= {"logps", "lse"} else 1 if grads.keys() <= {"logps", "lse", "entropy"} else 2
    return Slope(numbers, degree)


def _slope_needs(grads: Collection[str]) -> set[str]:
    also = {"sum_p_logp2": {"entropy"}, "sum_p2_logp": {"sum_p2"}, "sum_p2_logp2": {"sum_p2_logp"}}
    return set(grads) | {name for grad in grads for name in also.get(grad, ())}
