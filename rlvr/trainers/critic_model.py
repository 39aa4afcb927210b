"""The value model: a Hugging Face model for token classification with one label, the value of the text so far.

A critic is saved and loaded as such, so that other tools read it and a reward model of the policy's family can start
it.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification
from transformers.utils import logging

from rlvr.errors import ConfigError

HUB = (
    "revision",
    "subfolder",
    "cache_dir",
    "token",
    "local_files_only",
    "trust_remote_code",
)  # where a model is found


class ValueHead(nn.Linear):
    """Hidden states [..., D] to values [..., 1], computed in float32: a bfloat16 value has two digits."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return linear(hidden.float(), self.weight.float(), bias)


def load_critic(name: str, changes: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The model `name` as a critic. What its checkpoint has not of a head starts as 0; adapters are merged.

    changes: of its configuration.   options: of from_pretrained.
    Raises: ConfigError for what is no language model, or for a checkpoint that lacks weights of its backbone.
    """
    if (adapter := _adapter(name)) is not None:
        from peft import PeftConfig, PeftModel

        base = load_critic(str(PeftConfig.from_pretrained(adapter).base_model_name_or_path), changes, **options)
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().requires_grad_(True)
    options.setdefault("trust_remote_code", False)  # not None: transformers would ask whoever is at the terminal
    known = {key: options[key] for key in HUB if key in options}
    config = _of_values(AutoConfig.from_pretrained(name, **known, **(changes or {})))
    options |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _quiet():  # a new head is no news
        critic, found = _value_class(config).from_pretrained(name, **options)
    apart = {key for key, *_ in found["mismatched_keys"]}
    new = {*found["missing_keys"], *apart}
    head = f"{_head_name(critic)}."
    if lacking := sorted(key for key in new if not key.startswith(head)):
        raise ConfigError(
            f"critic={name!r} lacks {len(lacking)} weights of its backbone, or has them in another shape, "
            f"first {lacking[0]}: give a checkpoint of a {config.model_type} model"
        )
    lost = [key for key in (*found["unexpected_keys"], *apart) if key.startswith(("score.", "classifier.", "v_head."))]
    if lost:
        warnings.warn(f"critic={name!r}: {', '.join(lost)} does not fit; the value head starts as 0", stacklevel=2)
    return _prepared(critic, new)


def _adapter(name: str) -> str | None:
    """Where the adapters of a saved critic lie, if `name` is one with adapters."""
    folders = (Path(name, "adapter"), Path(name))
    return next((str(folder) for folder in folders if (folder / "adapter_config.json").is_file()), None)


def copy_critic(policy: Any) -> Any:
    """A critic on a copy of the backbone of `policy`, a causal language model without adapter, with the value 0."""
    if not isinstance(policy, PreTrainedModel) or any(hasattr(p, "ds_id") for p in policy.parameters()):
        raise ConfigError(
            f"critic=copy cannot copy the weights of a {type(policy).__name__} (adapted, or partitioned by ZeRO): "
            "give the policy or the critic by name"
        )
    config = _of_values(deepcopy(policy.config))
    critic = _value_class(config)._from_config(config, dtype=policy.dtype)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    critic.config._name_or_path = policy.config._name_or_path
    return _prepared(critic.to(policy.device), {name for name, _ in critic.named_parameters()})


def adapted(critic: Any, peft_config: Any, **options: Any) -> Any:
    """The critic with adapters of the policy's settings but for dropout; its head is trained whole, as are the modules
    that the policy trains whole and the critic has, too.   options: of get_peft_model.
    """
    from peft import TaskType, get_peft_model

    ours = {name.rpartition(".")[2] for name, _ in critic.named_modules()}
    whole = [*(name for name in peft_config.modules_to_save or () if name in ours), _head_name(critic)]
    own = replace(deepcopy(peft_config), task_type=TaskType.TOKEN_CLS, modules_to_save=whole)
    return get_peft_model(critic, _without_dropout(own), **options)


def check_critic(name: str, tokenizer: Any) -> None:
    """Refuse a critic that does not read the policy's tokens, before anything is loaded.

    tokenizer: the policy's.   Raises: ConfigError.
    """
    try:
        config, own = _config_of(name), AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"critic={name!r} is not copy, shared, or a model with its tokenizer: {reason}") from error
    _value_class(config)
    ours, theirs = tokenizer.get_vocab(), own.get_vocab()
    if ours != theirs:
        token = min(ours.keys() ^ theirs.keys() or {t for t in ours if ours[t] != theirs[t]})
        raise ConfigError(
            f"critic={name!r} has another tokenizer than the policy: {len(theirs)} tokens instead of {len(ours)}, and "
            f"{token!r} is {theirs.get(token, 'none')} instead of {ours.get(token, 'none')}: choose one of the "
            "policy's family, or critic: copy"
        )
    rows, needed = config.get_text_config().vocab_size, max(ours.values()) + 1
    if rows < needed:
        raise ConfigError(f"critic={name!r} has vocab_size={rows}, too few for the policy's {needed} token ids")


def _config_of(name: str) -> Any:
    adapter = _adapter(name)
    if adapter is not None:
        from peft import PeftConfig

        name = str(PeftConfig.from_pretrained(adapter).base_model_name_or_path)
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _value_class(config: Any) -> type[PreTrainedModel]:
    """The family's class for token classification, made as transformers makes its own where it has none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"critic of model_type={config.model_type!r}: must be a causal language model")
    if type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return cast(type[PreTrainedModel], MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)])
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    family = next(cls for cls in causal.__mro__ if PreTrainedModel in cls.__bases__)
    name = causal.__name__.replace("ForCausalLM", "ForTokenClassification")
    home = {
        "base_model_prefix": causal.base_model_prefix,
        "__module__": causal.__module__,
    }  # transformers reads its file
    return type(name, (GenericForTokenClassification, family), home)


def with_float32_head(critic: Any) -> Any:
    """The critic, its head in float32: steps of a learning rate of 1e-5 on a bfloat16 weight round to nothing."""
    getattr(critic, _head_name(critic)).float()
    return critic


def _head_name(critic: Any) -> str:
    return next(name for name, module in critic.named_children() if getattr(module, "out_features", None) == 1)


def _prepared(critic: Any, new: Collection[str]) -> Any:
    """new: parameters that no checkpoint gave."""
    name = _head_name(critic)
    head = getattr(critic, name)
    head.__class__ = ValueHead
    _zero([parameter for key, parameter in head.named_parameters() if f"{name}.{key}" in new])
    return critic


def _of_values(config: Any) -> Any:
    config.num_labels, config.classifier_dropout = 1, 0.0
    return _without_dropout(config)


def _without_dropout(config: Any) -> Any:
    """A value must not depend on chance."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def _zero(parameters: list[nn.Parameter]) -> None:
    """Of all ranks: what rank 0 writes into parameters that ZeRO-3 has partitioned is everybody's."""
    whole: Any = nullcontext()
    if any(hasattr(p, "ds_id") for p in parameters):
        from deepspeed.runtime.zero import GatheredParameters

        whole = GatheredParameters(parameters, modifier_rank=0)
    with whole:
        for parameter in parameters:
            parameter.zero_()
