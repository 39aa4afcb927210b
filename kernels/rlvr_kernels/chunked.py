"""Plain PyTorch: tiles of tokens x vocabulary, folded in place. For CPUs, and for whatever has no kernel of its own.

A tile is small enough for a core's cache, and the vocabulary is the outer loop: a slice of the weight is converted
once, and its gradient is rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_kernels.backend import Backend, Grads, Head, Needs, Rows, slices
from rlvr_kernels.sums import INF, Q0, Q1, Q2, S0, S1, S2, U_TARGET, M, Slope, empty, rescale_

TOKENS, VOCABULARY = 512, 1024  # of a tile; 256 to 2048 of either changes the time on a CPU by 5 %, the memory more


class Scaled(NamedTuple):
    """The rows, multiplied by what stands before the matrix product in z: it is cheaper than scaling the logits.

    hidden: [N, D].   row_scale: [N], dz/d(h W^T) but for the soft cap.   inv_cap: [N], T / cap, or None.
    """

    hidden: Tensor
    row_scale: Tensor
    inv_cap: Tensor | None


def forward(rows: Rows, head: Head, moments: bool) -> Tensor:
    """Sums [8, N]; see `rlvr_kernels.backend.Backend`."""
    sums = empty(len(rows.targets), rows.inv_t)
    scaled = _scale(rows, head)
    buffers = _buffers(scaled.hidden, head, 2)
    for vocabulary in slices(len(head.weight), VOCABULARY):
        weight = head.weight[vocabulary].to(scaled.hidden.dtype)
        local = rows.targets - head.start - vocabulary.start
        for tokens in slices(len(rows.targets), TOKENS):
            z = _logits(scaled, head, weight, tokens, vocabulary)
            e, ue = (buffer[: z.numel()].view_as(z) for buffer in buffers)
            _fold(sums[:, tokens], z, e, ue, local[tokens], moments, guard=head.bias is not None)
    return sums


def backward(rows: Rows, head: Head, sums: Tensor, slope: Slope, needs: Needs) -> Grads:
    """Gradients; see `rlvr_kernels.backend.Backend`."""
    scaled = _scale(rows, head)
    dtype = scaled.hidden.dtype
    grad_hidden = torch.zeros_like(scaled.hidden) if needs.hidden else None
    grad_weight = torch.empty_like(head.weight) if needs.weight else None
    grad_bias = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    log_s0 = sums[S0].log()
    buffers = _buffers(scaled.hidden, head, 2 if slope.degree == 2 else 1)
    for vocabulary in slices(len(head.weight), VOCABULARY):
        weight = head.weight[vocabulary].to(dtype)
        of_weight = weight.new_zeros(weight.shape) if needs.weight else None
        of_bias = weight.new_zeros(len(weight)) if needs.bias else None
        local = rows.targets - head.start - vocabulary.start
        for tokens in slices(len(rows.targets), TOKENS):
            logp = _logits(scaled, head, weight, tokens, vocabulary)
            grad, *spare = (buffer[: logp.numel()].view_as(logp) for buffer in buffers)
            bend = None
            if scaled.inv_cap is not None:  # d tanh = 1 - tanh^2
                bend = (logp * scaled.inv_cap[tokens, None]).square_().neg_().add_(1)
            logp.sub_(sums[M, tokens, None]).sub_(log_s0[tokens, None])  # m + log s0 would round at the logits' size
            torch.exp(logp, out=grad)
            if head.bias is not None:
                logp.masked_fill_(logp == -INF, 0.0)  # 0 log 0 = 0
            _slope_of_logits(grad, logp, slope, tokens, spare[0] if spare else None)
            _at_targets(local[tokens], grad, slope.numbers[0, tokens])
            if bend is not None:
                grad.mul_(bend)
            if grad_hidden is not None:
                grad_hidden[tokens] += _product(grad, weight.t())
            if of_weight is not None:
                of_weight += _product(grad.t(), scaled.hidden[tokens].t())  # which carries the row's scale
            if of_bias is not None:
                of_bias.addmv_(grad.t(), scaled.row_scale[tokens])
        if grad_weight is not None and of_weight is not None:
            grad_weight[vocabulary] = of_weight
        if grad_bias is not None and of_bias is not None:
            grad_bias[vocabulary] = of_bias
    if grad_hidden is not None:
        grad_hidden.mul_(scaled.row_scale[:, None])
    return Grads(grad_hidden, grad_weight, grad_bias)


BACKEND = Backend(forward, backward)


def _scale(rows: Rows, head: Head) -> Scaled:
    row_scale = rows.inv_t * head.logit_scale
    inv_cap = None if head.softcap is None else (rows.inv_t * head.softcap).reciprocal()
    return Scaled(rows.hidden.to(head.dtype).to(row_scale.dtype) * row_scale[:, None], row_scale, inv_cap)


def _buffers(hidden: Tensor, head: Head, count: int) -> list[Tensor]:
    size = min(TOKENS, len(hidden)) * min(VOCABULARY, len(head.weight))
    return [hidden.new_empty(size) for _ in range(count)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, by oneDNN where it can: torch.mm calls MKL, which does without AVX-512 on processors of other makers."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available() and a.size(1):
        return torch.ops.aten.linear(a.to_mkldnn(), b.to_mkldnn()).to_dense()  # DeepSpeed replaces F.linear
    return a @ b.t()


def _logits(scaled: Scaled, head: Head, weight: Tensor, tokens: slice, vocabulary: slice) -> Tensor:
    """The tile's z = cap(scale (h W^T + b)) / T."""
    z = _product(scaled.hidden[tokens], weight)
    if head.bias is not None:
        z.addcmul_(scaled.row_scale[tokens, None], head.bias[vocabulary].to(z.dtype))
    if scaled.inv_cap is not None:
        z.mul_(scaled.inv_cap[tokens, None]).tanh_().div_(scaled.inv_cap[tokens, None])
    return z


def _fold(sums: Tensor, z: Tensor, e: Tensor, ue: Tensor, local: Tensor, moments: bool, guard: bool) -> None:
    """Add a tile of logits to the sums. e, ue: room for the tile.   guard: z may hold -inf."""
    m = torch.maximum(sums[M], z.amax(-1))
    rescale_(sums, m)
    z.sub_(m.masked_fill(m == -INF, 0.0)[:, None] if guard else m[:, None])
    inside = (local >= 0) & (local < z.size(1))
    at_target = z.gather(1, local.clamp(0, z.size(1) - 1)[:, None]).squeeze(1)
    sums[U_TARGET] = torch.where(inside, at_target, sums[U_TARGET])
    torch.exp(z, out=e)
    if guard:
        z.masked_fill_(z == -INF, 0.0)  # 0 log 0 = 0
    sums[S0] += e.sum(-1)
    torch.mul(z, e, out=ue)
    sums[S1] += ue.sum(-1)
    if moments:
        sums[S2] += z.mul_(ue).sum(-1)
        sums[Q0] += torch.linalg.vector_norm(e, dim=-1).square_()
        sums[Q1] += e.mul_(ue).sum(-1)
        sums[Q2] += torch.linalg.vector_norm(ue, dim=-1).square_()


def _slope_of_logits(p: Tensor, logp: Tensor, slope: Slope, tokens: slice, room: Tensor | None) -> None:
    """p becomes p (a0 + a1 l + a2 l^2 + p (b0 + b1 l + b2 l^2)); logp and room are used up."""
    _, a0, a1, a2, b0, b1, b2 = slope.numbers[:, tokens, None]
    if slope.degree == 0:
        p.mul_(a0)
    elif slope.degree == 1:
        p.mul_(logp.mul_(a1).add_(a0))
    else:
        assert room is not None
        torch.mul(logp, b2, out=room).add_(b1).mul_(logp).add_(b0).mul_(p)
        room.addcmul_(logp, a1).add_(a0)
        p.mul_(room.addcmul_(logp.square_(), a2))


def _at_targets(local: Tensor, grad: Tensor, target: Tensor) -> None:
    width = grad.size(1)
    inside = (local >= 0) & (local < width)
    grad.scatter_add_(1, local.clamp(0, width - 1)[:, None], torch.where(inside, target, 0.0)[:, None])
