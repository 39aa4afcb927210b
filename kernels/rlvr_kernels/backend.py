"""What a backend is: two functions on tokens that all have a label, and a head that is at hand."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_kernels.sums import Slope


class Head(NamedTuple):
    """z = softcap(logit_scale * (h W^T + bias)) / temperature, with softcap(x) = cap * tanh(x / cap).

    weight: [V, D].   bias: [V] or None; -inf makes a token impossible.   dtype: of the matrix products' inputs.
    start: the number of the weight's first row in the whole vocabulary, for a shard of it.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype
    start: int = 0


class Rows(NamedTuple):
    """hidden: [N, D].   targets: [N] int64, numbers in the whole vocabulary.   inv_t: [N], 1 / temperature."""

    hidden: Tensor
    targets: Tensor
    inv_t: Tensor


class Grads(NamedTuple):
    """By hidden [N, D] in float32 (float64) and by the head; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Backend(NamedTuple):
    """forward(rows, head, moments) -> sums [8, N] (see `rlvr_kernels.sums`); without moments s2, q0, q1, q2 stay 0.

    backward(rows, head, sums, slope, needs) -> the gradients of the statistics that `slope` describes.
    Both hold a bounded number of logits at a time, in float32 (float64 for float64 rows), and round them alike.
    """

    forward: Callable[[Rows, Head, bool], Tensor]
    backward: Callable[[Rows, Head, Tensor, Slope, Needs], Grads]


def slices(length: int, step: int) -> Iterator[slice]:
    """0:step, step:2 step, ... up to length."""
    return (slice(i, min(i + step, length)) for i in range(0, length, step))
