"""The shape of a model for `rlvr.planning`, from its configuration alone.

What a pass keeps is not written down for each architecture: the model's own forward and backward run on tensors
without data, and the storages that are alive are added up.
"""

import copy
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from rlvr.errors import ConfigError
from rlvr.planning.memory import ModelShape, Passes
from rlvr.planning.settings import Settings


def read_shape(settings: Settings) -> ModelShape:
    """Raises: ConfigError for a name without a readable configuration of a language model."""
    config = read_config(settings.model_name_or_path)
    text = config.get_text_config()
    model = without_data(config, settings)
    base = model.base_model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    adapters = trained if settings.use_peft else 0
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = max((part for part in base.modules() if isinstance(part, nn.ModuleList)), key=len)
    return ModelShape(
        parameters=total - adapters,
        adapters=adapters,
        layers=text.num_hidden_layers,
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        hidden=text.hidden_size,
        vocabulary=model.get_output_embeddings().weight.size(0),
        tied=bool(text.tie_word_embeddings),
        cached=2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * width,
        passes=passes(config, settings, in_half=False),
        passes_in_half=passes(config, settings, in_half=True),
    )


def read_config(name: str) -> Any:
    """Raises: ConfigError."""
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=os.path.isdir(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model={name!r} is no model directory or hub name: {reason}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"model={name!r} is a {config.model_type}: give a causal language model")
    return config


def without_data(config: Any, settings: Settings, in_half: bool = False) -> Any:
    """The model, with its adapters, on the meta device."""
    name = "bfloat16" if in_half or settings.dtype == "auto" else settings.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, name), attn_implementation="sdpa")
    if settings.use_peft:
        try:
            lora = LoraConfig(
                r=settings.lora_r, target_modules=settings.lora_target_modules, task_type="CAUSAL_LM", lora_dropout=0.0
            )
            adapted = get_peft_model(model, lora, autocast_adapter_dtype=not in_half)
        except ValueError as error:
            reason = " ".join(str(error).split())[:150]
            raise ConfigError(f"lora_target_modules={settings.lora_target_modules!r}: {reason}") from error
        if settings.gradient_checkpointing:
            adapted.enable_input_require_grads()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def passes(config: Any, settings: Settings, *, in_half: bool) -> Passes:
    """Of a micro-batch at its longest: measured with one and with two layers, the others as the second."""
    layers = config.get_text_config().num_hidden_layers
    with _quiet():
        try:
            one, two = (_traced(_shortened(config, n), settings, in_half) for n in (1, 2))
        except (RuntimeError, NotImplementedError) as error:  # float32 experts have no grouped product without data
            fix = "set dtype bfloat16" if settings.dtype == "float32" else "choose another model"
            raise ConfigError(
                f"model={settings.model_name_or_path!r}: a {config.model_type} of {settings.dtype} cannot be run "
                f"without data; {fix}"
            ) from error
    return Passes(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


@contextmanager
def _quiet() -> Iterator[None]:
    """What cannot be run is told in one line, not in a log, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shortened(config: Any, layers: int) -> Any:
    """The last layers: the first ones of some mixtures of experts are dense."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[-layers:]
    return short


def _traced(config: Any, settings: Settings, in_half: bool) -> Passes:
    backbone = without_data(config, settings, in_half).base_model
    batch, length = settings.per_device_train_batch_size, settings.length
    with FakeTensorMode():
        _give_shapes(backbone)
        ids = torch.zeros(batch, length, dtype=torch.long)
        # Prompts are padded on the left, so that there is a mask, which attention keeps.
        mask = torch.ones(batch, 1, length, length, dtype=torch.bool)
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        with LiveBytes([*backbone.parameters(), *backbone.buffers(), *gradients]) as live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.computes_in_bf16 and not in_half):
                inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": ids, "use_cache": False}
                hidden = backbone(**inputs).last_hidden_state
            forward, saved = live.peak, live.now
            hidden.backward(torch.empty_like(hidden))
            return Passes(forward, saved, live.peak)


def _give_shapes(module: nn.Module) -> None:
    """Parameters, with gradients, and buffers of the meta device become tensors of a FakeTensorMode on the CPU."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = shaped = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                if p.requires_grad:
                    shaped.grad = torch.empty(p.shape, dtype=p.dtype)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are alive: now, and at the peak.   known: tensors that do not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {id(s): s for s in (x.untyped_storage() for x in known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self.now += size
        self._alive[key] = weakref.ref(storage, gone)
