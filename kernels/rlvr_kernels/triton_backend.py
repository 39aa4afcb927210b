"""Triton for GPUs: the library's matrix products with kernels around them, or a forward pass in one kernel.

BACKEND computes tiles of logits with the GPU library and folds each into the sums while it is in the cache. FUSED
folds logits where they are formed, so that they are never in memory; it is not measured on a GPU yet. Both have the
same backward pass: tiles again, turned into gradients in the dtype of the products' inputs, and two products of those.
float16 gradients underflow here as they do elsewhere: the loss has to be scaled, as usual.

FUSED may add up a product in another order than the library does in the backward pass. Its probabilities there are
then off by the rounding of logits, 2^-24 |z|, which is far below the rounding of half-precision gradients. Of float32
inputs the library's products obey PyTorch's setting of TF32, the kernel's are exact: leave TF32 off for FUSED.

Under TRITON_INTERPRET=1 both run on CPU tensors, slowly, for tests. The interpreter multiplies the bit patterns of
bfloat16 numbers and truncates those it writes, so products have float32 inputs there.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlvr_kernels.backend import Backend, Grads, Head, Needs, Rows, slices
from rlvr_kernels.sums import ROWS, S0, M, Slope, empty, merge
from rlvr_kernels.triton_kernels import fused_stats, tile_grad, tile_stats


class Sizes(NamedTuple):
    """tokens, vocabulary: of a tile of logits in memory; vocabulary is a power of 2.
    split: vocabulary, a multiple of a tile's, for which gradients by logits are held for all tokens at most.
    dlogits: how many of these gradients are held, unless one tile's vocabulary for all tokens is more.
    The rest: constants of each kernel and how it is run.
    """

    tokens: int
    vocabulary: int
    split: int
    dlogits: int
    tile_stats: dict[str, int]
    tile_grad: dict[str, int]
    fused_stats: dict[str, int]
    fused_stats_float32: dict[str, int]


EXACT = {"enable_fp_fusion": False}  # see triton_kernels
# SPAN does not depend on the number of tokens, so that a token's sums do not either.
PIPELINED = EXACT | {"SPAN": 4096, "num_warps": 8, "num_stages": 3}
GPU = Sizes(
    tokens=2048,  # 32 MiB of logits: between the product and the kernel they stay in a cache of 50 MB
    vocabulary=4096,
    split=16384,
    dlogits=2**27,
    tile_stats=EXACT | {"ROWS": 1, "COLUMNS": 4096, "num_warps": 8},
    tile_grad=EXACT | {"ROWS": 1, "COLUMNS": 2048, "num_warps": 4},
    fused_stats=PIPELINED | {"ROWS": 128, "COLUMNS": 128, "INNER": 64},
    # Without tensor cores the inputs of a product stand in registers, where a larger block has no room.
    fused_stats_float32=PIPELINED | {"ROWS": 128, "COLUMNS": 64, "INNER": 16},
)
INTERPRETER = Sizes(
    tokens=16,
    vocabulary=64,
    split=128,
    dlogits=2**11,
    tile_stats={"ROWS": 16, "COLUMNS": 64},
    tile_grad={"ROWS": 16, "COLUMNS": 32},
    fused_stats={"ROWS": 16, "COLUMNS": 32, "INNER": 16, "SPAN": 64},
    fused_stats_float32={"ROWS": 16, "COLUMNS": 32, "INNER": 16, "SPAN": 64},
)
SIZES = INTERPRETER if triton.knobs.runtime.interpret else GPU
TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(rows: Rows, head: Head, moments: bool) -> Tensor:
    """Sums [8, N]; see `rlvr_kernels.backend.Backend`."""
    rows, head = _prepared(rows, head)
    sums = empty(len(rows.targets), rows.inv_t)
    buffer = _buffer(rows, head)
    for vocabulary in slices(len(head.weight), SIZES.vocabulary):
        for tokens, tile in _tiles(rows, _part(head, vocabulary), buffer):
            of_tile = sums[:, tokens]
            grid = (triton.cdiv(of_tile.size(1), SIZES.tile_stats["ROWS"]),)
            _launch(tile_stats, grid, *tile, of_tile, sums.stride(0), moments, **SIZES.tile_stats)
    return sums


def fused_forward(rows: Rows, head: Head, moments: bool) -> Tensor:
    """Sums [8, N] without logits in memory; see `rlvr_kernels.backend.Backend`."""
    rows, head = _prepared(rows, head)
    (n, width), vocabulary = rows.hidden.shape, len(head.weight)
    block = SIZES.fused_stats_float32 if head.dtype == torch.float32 else SIZES.fused_stats
    parts = triton.cdiv(vocabulary, block["SPAN"])
    sums = rows.inv_t.new_empty(ROWS, parts, n)
    _launch(
        fused_stats,
        (triton.cdiv(n, block["ROWS"]), parts),
        *(rows.hidden, *rows.hidden.stride(), head.weight, *head.weight.stride(), n, vocabulary, width, head.start),
        *(rows.targets, rows.inv_t, head.bias, head.logit_scale, head.softcap, sums, sums.stride(0), moments),
        DTYPE=tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPE[head.dtype],
        **block,
    )
    return merge(sums)


def backward(rows: Rows, head: Head, sums: Tensor, slope: Slope, needs: Needs) -> Grads:
    """Gradients; see `rlvr_kernels.backend.Backend`. dlogits are rounded to head.dtype, and sums of them only once."""
    rows, head = _prepared(rows, head)
    n, width = rows.hidden.shape
    grad_hidden = rows.inv_t.new_zeros(n, width) if needs.hidden else None
    grad_weight = torch.empty_like(head.weight) if needs.weight else None
    grad_bias = torch.empty_like(head.bias) if needs.bias and head.bias is not None else None
    buffer = _buffer(rows, head)
    step = _split(n)
    room = rows.hidden.new_empty(n, min(step, len(head.weight)))
    for split in slices(len(head.weight), step):
        part = _part(head, split)
        dlogits = room[:, : len(part.weight)]
        _write_gradient(dlogits, rows, part, sums, slope, buffer)
        if grad_hidden is not None:
            _product(grad_hidden, dlogits, part.weight, add=True)
        if grad_weight is not None:
            _rounded_product(grad_weight[split], dlogits.t(), rows.hidden)
        if grad_bias is not None:
            grad_bias[split] = dlogits.sum(0, dtype=torch.float32)
    return Grads(grad_hidden, grad_weight, grad_bias)


BACKEND = Backend(forward, backward)
FUSED = Backend(fused_forward, backward)


def _write_gradient(out: Tensor, rows: Rows, head: Head, sums: Tensor, slope: Slope, buffer: Tensor) -> None:
    """out: [N, V], dlogits of a part of the vocabulary, which is a head of its own."""
    m, log_s0, numbers = sums[M].contiguous(), sums[S0].log(), slope.numbers.contiguous()
    block = SIZES.tile_grad
    for vocabulary in slices(len(head.weight), SIZES.vocabulary):
        for tokens, tile in _tiles(rows, _part(head, vocabulary), buffer):
            to = out[tokens, vocabulary]
            grid = (triton.cdiv(to.size(0), block["ROWS"]), triton.cdiv(to.size(1), block["COLUMNS"]))
            of_tokens = (m[tokens], log_s0[tokens], numbers[:, tokens], numbers.stride(0), slope.degree)
            _launch(tile_grad, grid, *tile, to, out.stride(0), *of_tokens, **block)


def _prepared(rows: Rows, head: Head) -> tuple[Rows, Head]:
    """With hidden in the products' dtype; vectors of the caller contiguous: the kernels know no strides of them."""
    bias = None if head.bias is None else head.bias.contiguous()
    return Rows(rows.hidden.to(head.dtype), rows.targets.contiguous(), rows.inv_t), head._replace(bias=bias)


def _part(head: Head, vocabulary: slice) -> Head:
    """Some rows of a head, as a head of their own with the weight in the products' dtype."""
    bias = None if head.bias is None else head.bias[vocabulary]
    weight = head.weight[vocabulary].to(head.dtype)
    return head._replace(weight=weight, bias=bias, start=head.start + vocabulary.start)


def _tiles(rows: Rows, head: Head, buffer: Tensor) -> Iterator[tuple[slice, tuple[Any, ...]]]:
    """Slices of tokens with what both kernels take of their tile, the products in buffer first."""
    for tokens in slices(len(rows.targets), SIZES.tokens):
        hidden = rows.hidden[tokens]
        shape = (len(hidden), len(head.weight))
        x = _product(buffer[: shape[0] * shape[1]].view(shape), hidden, head.weight.t())
        of_rows = (rows.targets[tokens], rows.inv_t[tokens])
        yield tokens, (x, x.stride(0), *shape, head.start, *of_rows, head.bias, head.logit_scale, head.softcap)


def _buffer(rows: Rows, head: Head) -> Tensor:
    return rows.inv_t.new_empty(min(SIZES.tokens, len(rows.targets)) * min(SIZES.vocabulary, len(head.weight)))


def _split(n: int) -> int:
    """Vocabulary for which gradients by the logits of n tokens are held at a time."""
    tiles = SIZES.dlogits // max(n, 1) // SIZES.vocabulary
    return min(SIZES.split, max(tiles, 1) * SIZES.vocabulary)


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> Tensor:
    """Write a b to out, or add it. out is float32, and so are the sums inside the product, whatever a and b are."""
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
    options: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    return torch.addmm(out, a, b, beta=float(add), out=out, **options)


def _rounded_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a b to out, rounded once: a product that is half precision itself may add up parts in half precision."""
    whole = out if out.dtype == torch.float32 else a.new_empty(out.shape, dtype=torch.float32)
    _product(whole, a, b)
    if whole is not out:
        out.copy_(whole)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](*args, **constants)
