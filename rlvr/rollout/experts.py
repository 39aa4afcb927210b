"""Experts inside vLLM: what a mixture of LoRA experts adds to a linear layer is added there, too.

Which experts act depends on the token, so they cannot be merged into weights, and vLLM has no layer for them. Forward
hooks on vLLM's linear layers call the training modules themselves: what they have learned is there at once, without a
copy. vLLM fuses layers that read the same input (q, k and v; gate and up); each part's experts are added to its slice.
A hook runs in eager mode in this process only: a CUDA graph would not have it, and a server has other modules.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlvr.errors import ConfigError

Parts = list[tuple[int, int, nn.Module]]  # first column, width, experts


def attach_experts(model: nn.Module, experts: Mapping[str, nn.Module]) -> None:
    """Add hooks to vLLM's model, of one process without tensor parallelism.

    experts: by the name of their linear layer in the checkpoint; each maps [N, in] to [N, out].
    Raises: ConfigError for experts whose layer vLLM's model has not.
    """
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    left = dict(experts)
    for name, layer in model.named_modules():
        parent, _, own = name.rpartition(".")
        if not own or not hasattr(layer, "weight"):
            continue
        names = [f"{parent}.{part}" for part in packed.get(own, [own])]
        widths = list(getattr(layer, "output_partition_sizes", ())) or [layer.weight.size(0)]
        if len(names) == 1:  # fused in the checkpoint, too
            widths = [sum(widths)]
        found = [left.pop(part, None) for part in names]
        if all(one is None for one in found):
            continue
        if len(widths) != len(names):
            raise ConfigError(f"vLLM's {name} has {len(widths)} parts for {', '.join(names)}: set use_vllm: false")
        starts = [sum(widths[:i]) for i in range(len(widths))]
        parts = [(s, w, one) for s, w, one in zip(starts, widths, found, strict=True) if one is not None]
        layer.register_forward_hook(_hook(parts))
    if left:
        first = next(iter(left))
        raise ConfigError(
            f"vLLM's {type(model).__name__} has no layer {first}, which has experts: set use_vllm: false"
        )


def _hook(parts: Parts) -> Any:
    @torch.no_grad()
    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        whole, *rest = output if isinstance(output, tuple) else (output,)
        whole = whole.clone()
        for start, width, experts in parts:
            training = experts.training
            experts.eval()  # no dropout in what is sampled from
            whole[..., start : start + width] += experts(args[0]).to(whole.dtype)
            experts.train(training)
        return (whole, *rest) if isinstance(output, tuple) else whole

    return add
