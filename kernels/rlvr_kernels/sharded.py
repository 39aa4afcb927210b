"""Heads whose weight is spread over ranks: gathered for the forward pass, let go, and gathered again for the backward.

Data-parallel shards (FSDP2's DTensors, DeepSpeed's ZeRO-3) are gathered whole: each rank has tokens of its own. Every
rank takes part in every gathering, so each one calls the head and uses the result in its loss, without tokens too.
Shards of a vocabulary (tensor parallelism) stay where they are: each rank sums over its part and the sums are merged.

Neither DTensor nor DeepSpeed is imported before there is a parameter of theirs: each takes a second or more.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_kernels.sums import merge


@contextmanager
def gathered(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The whole weight and bias as plain tensors, for as long as the block lasts; not copied if they are whole."""
    with _fetched(weight, bias), torch.no_grad():
        yield _whole(weight), None if bias is None else _whole(bias)


def _fetched(*parameters: Tensor | None) -> AbstractContextManager[None]:
    """What ZeRO-3 partitioned, at hand in a block; what its engine has fetched already is for the engine to free."""
    away = [p for p in parameters if p is not None and _is_away(p)]
    if not away:
        return nullcontext()
    from deepspeed import zero

    fetched: AbstractContextManager[None] = zero.GatheredParameters(away)
    return fetched


def _is_away(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a parameter, and its engine has not fetched it."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name != "AVAILABLE"


def _whole(parameter: Tensor) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    return whole


def scattered(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a gathered parameter in the layout of the parameter.

    ZeRO-3 takes the whole gradient and reduces it by itself, as FSDP2 does with a parameter that it has gathered. A
    DTensor is one that nobody else reduces: it gets the average over the ranks of its mesh. That is what FSDP2 and DDP
    give the other parameters, and where all ranks have the same tokens (tensor parallelism) it is the gradient itself.
    Raises: RuntimeError if ZeRO-3 cannot take the gradient, its engine not knowing that the parameter was used.
    """
    if grad is None or parameter is None:
        return None
    if _is_away(parameter):
        raise RuntimeError(
            "a head partitioned by ZeRO-3 was used beside the forward pass of the model that DeepSpeed wraps: call "
            "token_stats inside it, with the weight as an attribute of its module, or without gradient by the weight"
        )
    if not hasattr(parameter, "full_tensor"):
        return grad
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    parts = DTensor.from_local(grad, mesh, [Partial("avg")] * mesh.ndim, run_check=False)
    return parts.redistribute(placements=parameter.placements)


def merged(sums: Tensor, targets: Tensor, start: int, size: int, group: dist.ProcessGroup) -> Tensor:
    """Sums [8, N] over the vocabulary of all ranks of a group, from those over each rank's shard: one all-gather.

    targets: [N], numbers in the whole vocabulary.   start, size: of this rank's shard; they travel with the sums.
    Raises: ValueError, on all ranks, if the shards are no whole vocabulary or a target is beyond it.
    """
    place = sums.new_zeros(len(sums), 1)
    place[0], place[1] = start, size
    mine = torch.cat([sums, place], 1)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    both = torch.stack(parts, 1)
    shards = sorted((int(first), int(rows)) for first, rows in both[:2, :, -1].T.tolist())
    end = 0
    for first, rows in shards:
        if first != end:
            raise ValueError(f"vocab_start: shards (first row, rows) {shards} leave a gap or overlap at {end}")
        end += rows
    if bool((targets >= end).any()):
        raise ValueError(f"targets has {int(targets.max())}: want numbers in [0, {end}) or ignore_index")
    return merge(both[..., :-1])
