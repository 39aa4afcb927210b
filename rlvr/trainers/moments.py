"""Statistics of the policy's distribution that TRL's fused head does not give: a forward pass of our own, no gradient.

Only tokens of completions are projected to the vocabulary, a bounded number at a time.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr_kernels.reference import TokenStats, logit_stats

LOGITS_AT_ONCE = 2**24  # elements of float32: 64 MB for each of the few tensors that the statistics need


@torch.no_grad()
def token_moments(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_completion: int,
    *,
    temperature: float,
    batch_size: int,
    want: Collection[str],
) -> dict[str, Tensor]:
    """`rlvr_kernels.TokenStats` fields of the completions, by name, each [B, T] float32; 0 where there is padding.

    model: a Hugging Face causal model, bare or with an adapter, without its distributed wrapper.
    input_ids, attention_mask: [B, prompt + T], prompts padded on the left.   num_completion: T.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = _head(base)
    mask = attention_mask[:, -num_completion:].bool()
    found = {name: torch.zeros(mask.shape, dtype=torch.float32, device=mask.device) for name in want}
    with _evaluating(model):
        for rows in torch.arange(len(input_ids), device=mask.device).split(batch_size):
            outputs = base.base_model(input_ids=input_ids[rows], attention_mask=attention_mask[rows], use_cache=False)
            hidden = outputs.last_hidden_state[:, -num_completion - 1 : -1][mask[rows]]
            targets = input_ids[rows][:, -num_completion:][mask[rows]]
            for name, values in _in_chunks(hidden, targets, head, temperature, want).items():
                part = found[name][rows]
                part[mask[rows]] = values
                found[name][rows] = part
    return found


def mean_discriminator(moments: dict[str, Tensor]) -> Tensor:
    """E_S = sum_v p_v^2 (H + log p_v) from its moments (arXiv 2602.03392)."""
    return moments["sum_p2_logp"] + moments["entropy"] * moments["sum_p2"]


def _in_chunks(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], temperature: float, want: Collection[str]
) -> dict[str, Tensor]:
    vocabulary = head(hidden[:1]).size(-1) if len(hidden) else 1
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    parts: list[TokenStats] = [
        logit_stats(head(h), t, temperature=temperature, want=want)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        if len(h)
    ]
    if not parts:
        return {}
    return {name: torch.cat([getattr(part, name) for part in parts]).float() for name in want}


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states to logits, with the scaling and soft capping that some families apply inside their forward."""
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    scale = next((x for key in _SCALES if (x := getattr(config, key, None)) is not None), 1.0)
    if getattr(config, "logits_scaling", None) is not None:  # a divisor, but for one family
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        z = linear(hidden.to(linear.weight.dtype)).float() * scale
        return z if cap is None else cap * torch.tanh(z / cap)

    return logits


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout and gradient checkpointing, which only training mode has."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def require_whole_head(trainer: Any, why: str) -> None:
    """Refuse models whose distribution `token_moments` would get wrong, or whose head it would wait for.

    why: what asks for the moments.
    Raises: ConfigError for weights sharded over ranks (ZeRO-3, FSDP), prompt-learning adapters and images.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ConfigError(f"{why} reads the whole language-model head, which FSDP and ZeRO-3 shard: use ZeRO-2 or DDP")
    if (
        getattr(trainer.model, "active_peft_config", None) is not None
        and trainer.model.active_peft_config.is_prompt_learning
    ):
        raise ConfigError(f"{why} does not see the virtual tokens of a prompt-learning adapter: use LoRA")
    if trainer._is_vlm:
        raise ConfigError(f"{why} takes no images: remove it")
