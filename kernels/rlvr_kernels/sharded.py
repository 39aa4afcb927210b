"""Heads whose weight is spread over ranks: gathered for the forward pass, let go, and gathered again for the backward.

Data-parallel shards (FSDP2's DTensors, DeepSpeed's ZeRO-3) are gathered whole: each rank has tokens of its own. Shards
of a vocabulary (tensor parallelism) stay where they are: each rank sums over its part and the sums are merged.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from rlvr_kernels.sums import merge


@contextmanager
def gathered(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The whole weight and bias as plain tensors, for as long as the block lasts."""
    zero3: Any = nullcontext()
    if hasattr(weight, "ds_id"):
        import deepspeed

        zero3 = deepspeed.zero.GatheredParameters([p for p in (weight, bias) if p is not None])
    with zero3, torch.no_grad():
        yield _whole(weight), None if bias is None else _whole(bias)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def scattered(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a gathered parameter in the layout of the parameter: for a DTensor, summed over its ranks."""
    if grad is None or not isinstance(parameter, DTensor):
        return grad
    mesh = parameter.device_mesh
    whole = DTensor.from_local(grad, mesh, [Partial()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements)


def merged(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums [8, N] over the vocabulary of all ranks of a group, from those over each rank's shard: one all-gather."""
    if group is None:
        return sums
    parts = sums.new_empty(dist.get_world_size(group), *sums.shape)
    dist.all_gather_into_tensor(parts, sums.contiguous(), group=group)
    return merge(parts.transpose(0, 1))
