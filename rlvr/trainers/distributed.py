"""The core's view of the process group, on accelerate."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from rlvr.types import Mean


class AcceleratorReduce:
    """`rlvr.types.Reduce` over the ranks of an accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def sum(self, x: Tensor) -> Tensor:
        return self._accelerator.reduce(x, reduction="sum") if self._accelerator.num_processes > 1 else x

    def gather(self, x: Tensor) -> Tensor:
        """x [n, ...], n differs between ranks."""
        if self._accelerator.num_processes == 1:
            return x
        lengths = self._accelerator.gather(torch.tensor([x.size(0)], device=x.device))
        if not int(lengths.max()):
            return x
        padded = x.new_zeros((int(lengths.max()), *x.shape[1:]))
        padded[: x.size(0)] = x
        parts = self._accelerator.gather(padded).split(padded.size(0))
        return torch.cat([part[:n] for part, n in zip(parts, lengths.tolist(), strict=True)])


def reduce_means(means: Mapping[str, Mean], accelerator: Accelerator) -> dict[str, Mean]:
    """All metrics of a step in one reduction; every rank must have the same keys."""
    if not means:
        return {}
    names = sorted(means)
    device = accelerator.device
    table = torch.stack([torch.stack([means[n].total.to(device), means[n].count.to(device)]) for n in names])
    table = AcceleratorReduce(accelerator).sum(table.to(_accumulator_dtype(device))).cpu()
    return {n: Mean(total, count) for n, (total, count) in zip(names, table, strict=True)}


def _accumulator_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
