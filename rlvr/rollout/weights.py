"""The policy's weights under the names of its base checkpoint, as an engine loads them."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlvr.errors import ConfigError

_PEFT_PREFIX = "base_model.model."


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the base checkpoint, tensor) of every weight of an unwrapped model, adapters merged.

    Without PEFT the tensors are the parameters themselves. An adapted layer gives a merged copy, made one layer at a
    time and never written to the model: merging and unmerging in place would round the frozen weights at each sync.
    Tied tensors come once.
    Raises: RuntimeError for weights partitioned by ZeRO-3; ConfigError for an adapter that does not merge into a
    checkpoint of the base model's form.
    """
    if "peft" not in sys.modules:
        yield from _whole(model.named_parameters())
        return
    from peft import PeftModel

    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ConfigError(f"peft_type={model.active_peft_config.peft_type} has no merged weights; use LoRA")
    _require_one_embedding(model)
    seen: set[int] = set()
    for name, tensor in _merged_tree(model, ""):
        if isinstance(tensor, nn.Parameter):  # a merged copy may be freed, and its id be used again
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
        yield name.removeprefix(_PEFT_PREFIX), tensor


def _merged_tree(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Walk a module that holds PEFT layers; prefix ends in a dot."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        yield from _merged_layer(module, prefix)
    elif isinstance(module, ModulesToSaveWrapper):
        trained = module.modules_to_save[module.active_adapters[0]]
        yield from _whole(trained.named_parameters(prefix.removesuffix(".")))
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise ConfigError(f"{type(module).__name__} at {prefix} cannot be merged; use modules_to_save instead")
    else:
        yield from _whole((prefix + name, p) for name, p in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            yield from _merged_tree(child, f"{prefix}{name}.")


def _require_one_embedding(model: Any) -> None:
    """Refuse to adapt one of two tied matrices: the merged model would need a second one, which engines drop."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        raise ConfigError(
            "target_modules or modules_to_save names an embedding of a model with tied embeddings, so the merged "
            "weights would not fit its checkpoint; leave embed_tokens and lm_head out"
        )


@torch.no_grad()
def _merged_layer(layer: Any, prefix: str) -> list[tuple[str, Tensor]]:
    """The base layer's parameters with its active adapters added, as copies; the layer is left bit-identical."""
    base = layer.get_base_layer()
    own = dict(_whole(base.named_parameters()))
    list(_whole(layer.named_parameters()))
    if layer.merged or layer.disable_adapters or not getattr(layer, "merges", True):
        return [(prefix + name, parameter) for name, parameter in own.items()]
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    layer.merge()
    try:
        return [(prefix + name, parameter.detach().clone()) for name, parameter in own.items()]
    finally:
        layer.unmerge()
        for name, parameter in own.items():
            parameter.data.copy_(before[name])


def _whole(parameters: Any) -> Iterator[tuple[str, Tensor]]:
    """Pass (name, parameter) through, refusing what ZeRO-3 keeps on other ranks."""
    for name, parameter in parameters:
        if hasattr(parameter, "ds_id") and parameter.numel() != parameter.ds_numel:
            raise RuntimeError(
                f"{name} is partitioned by ZeRO stage 3, so this rank does not hold it: use ZeRO stage 2, or gather "
                "it before the weight sync (deepspeed.zero.GatheredParameters)"
            )
        yield name, parameter
