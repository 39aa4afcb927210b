"""The policy's weights under the names of its base checkpoint, as an engine loads them."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlvr.errors import ConfigError

_PEFT_PREFIX = "base_model.model."


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the base checkpoint, tensor) of every weight of an unwrapped model, adapters merged.

    Without PEFT the tensors are the parameters themselves. An adapted layer gives a merged copy, made one layer at a
    time and never written to the model: merging and unmerging in place would round the frozen weights at each sync.
    Tied tensors come once. Weights that ZeRO-3 or FSDP2 shards are whole while they are looked at, one tensor or one
    adapted layer at a time; every rank must ask for all of them, in step with the others.
    Raises: ConfigError for an adapter that does not merge into a checkpoint of the base model's form.
    """
    if "peft" not in sys.modules:
        for name, parameter in _whole(model.named_parameters()):
            yield name, _full(parameter)
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
        yield name.removeprefix(_PEFT_PREFIX), _full(tensor)


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


def _merged_layer(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The base layer's parameters with its active adapters added, as copies; the layer is left bit-identical."""
    own = [(prefix + name, parameter) for name, parameter in layer.get_base_layer().named_parameters()]
    if layer.merged or layer.disable_adapters or not getattr(layer, "merges", True):
        yield from _whole(own)
        return
    with _gathered(layer.parameters()), torch.no_grad():
        before = [parameter.detach().clone() for _, parameter in own]
        layer.merge()
        try:
            merged = [(name, parameter.detach().clone()) for name, parameter in own]
        finally:
            layer.unmerge()
            for (_, parameter), old in zip(own, before, strict=True):
                parameter.data.copy_(old)
    yield from merged


def _whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter as named, whole until the next one is asked for."""
    for name, parameter in parameters:
        with _gathered([parameter]):
            yield name, parameter


@contextlib.contextmanager
def _gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """Have on every rank what ZeRO-3 partitions, for as long as this lasts; changes to it are dropped."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _full(tensor: Tensor) -> Tensor:
    """Of a tensor that FSDP2 shards, all of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
