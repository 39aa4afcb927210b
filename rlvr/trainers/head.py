"""Gives a Hugging Face model a forward that returns statistics of tokens instead of logits.

It is the model's own forward with one more argument, so that DDP, DeepSpeed, FSDP and adapters wrap it like any
other.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlvr_kernels
from rlvr.errors import ConfigError


class Asked(NamedTuple):
    """Which statistics of which tokens. rows, columns, targets: [N].

    columns: negative, from the end: what the model puts in front of its input (virtual tokens) does not matter.
    """

    rows: Tensor
    columns: Tensor
    targets: Tensor
    want: tuple[str, ...]


class Measured(NamedTuple):
    """stats: [N] in the order asked for.   router_loss: load balancing of experts, with output_router_logits=True.
    value: [N], with a value head.
    """

    stats: rlvr_kernels.TokenStats
    router_loss: Tensor | None
    value: Tensor | None  # in the singular: DeepSpeed calls an output's `values`


def add_token_stats(
    model: Any,
    *,
    temperature: float,
    float32: bool = False,
    value_head: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """`model(..., token_stats=Asked)` returns Measured; without that argument the forward is what it was.

    Only the asked positions are projected to the vocabulary.
    model: a causal language model, without adapter or distributed wrapper.   float32: the head's matrix products are
    in float32, whatever the dtypes of model and autocast.   value_head: of a critic that shares the backbone, from
    hidden states [N, D] to values [N]; not a part of the model, so that the model stays what its checkpoint says.
    """
    before = model.forward
    config = model.config.get_text_config()
    softcap, scale = _first(config, SOFT_CAPS), _logit_scale(config)
    takes_positions = "position_ids" in signature(type(model).forward).parameters

    @wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(self: Any, *args: Any, token_stats: Asked | None = None, **kwargs: Any) -> Any:
        if token_stats is None:
            return before(*args, **kwargs)
        kwargs.pop("labels", None)  # an adapter passes it on, as None
        kwargs["use_cache"] = False
        if takes_positions and "position_ids" not in kwargs:  # by default padding counts, though not in generation
            kwargs["position_ids"] = positions(kwargs["attention_mask"])
        outputs = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        hidden = outputs.last_hidden_state
        here = hidden.device
        hidden = hidden[token_stats.rows.to(here), token_stats.columns.to(here)].to(weight.device)
        device = hidden.device.type
        with torch.autocast(device, enabled=not float32 and torch.is_autocast_enabled(device)):
            stats = rlvr_kernels.token_stats(
                hidden.float() if float32 else hidden,
                weight,
                token_stats.targets.to(weight.device),
                temperature=temperature,
                bias=bias,
                softcap=softcap,
                logit_scale=scale,
                want=token_stats.want,
            )
        stats = rlvr_kernels.TokenStats(*(x if x is None else x.to(token_stats.rows.device) for x in stats))
        balanced = kwargs.get("output_router_logits")
        router_loss = _router_loss(outputs, config, kwargs.get("attention_mask")) if balanced else None
        return Measured(stats, router_loss, None if value_head is None else value_head(hidden))

    model.forward = MethodType(forward, model)


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] of rows that may be padded on the left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@torch.no_grad()
def check_token_stats(model: Any, temperature: float) -> None:
    """Compare with the logits of the model's own forward on a few tokens: some families do more in their head than
    weight, bias, scale and soft cap.

    model: bare or with an adapter, with `add_token_stats` and whole weights.   Raises: ConfigError if they differ.
    """
    device = model.get_output_embeddings().weight.device
    ids = torch.arange(2, 10, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    columns = torch.arange(-len(ids[0]), -1, device=device)
    asked = Asked(torch.zeros_like(columns), columns, ids[0, 1:], ("logps",))
    mask = torch.ones_like(ids)
    found = model(input_ids=ids, attention_mask=mask, token_stats=asked).stats.logps
    logits = model(input_ids=ids, attention_mask=mask).logits[0, :-1]
    model.train(training)
    want = (logits.float() / temperature).log_softmax(-1).gather(-1, asked.targets[:, None].to(logits.device))[:, 0]
    apart = float((found.to(want) - want).abs().max())
    rounding = 8 * torch.finfo(logits.dtype).eps * float(logits[logits.isfinite()].abs().max()) / temperature
    if not apart <= 1e-3 + rounding:
        raise ConfigError(
            f"{type(model).__name__}'s head does more than rlvr_kernels knows: log-probs differ by {apart:.2g} nats "
            "from its own logits; set use_trl_head: true if TRL knows it"
        )


def _first(config: Any, keys: tuple[str, ...]) -> float | None:
    return next((float(x) for key in keys if (x := getattr(config, key, None)) is not None), None)


def _logit_scale(config: Any) -> float:
    """What some families multiply their logits by, before the soft cap."""
    scale, divisor = _first(config, SCALES), getattr(config, "logits_scaling", None)
    if scale is not None or divisor is None:
        return 1.0 if scale is None else scale
    return float(divisor if config.model_type == "hyperclovax" else 1 / divisor)  # the one family that multiplies


def _router_loss(outputs: Any, config: Any, attention_mask: Tensor | None) -> Tensor:
    """Mixtral's load-balancing loss, as TRL takes it of all families of experts."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    loss: Tensor = load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, attention_mask)
    return loss


def require_own_passes(trainer: Any, why: str) -> None:
    """Refuse what needs a pass of our own over a few sequences, or moments, where that cannot be had.

    Raises: ConfigError under FSDP, with images and with TRL's head.   why: what needs it.
    """
    if trainer.is_fsdp_enabled:
        raise ConfigError(f"{why} passes sequences beside the wrapper that FSDP puts around the model: use DeepSpeed")
    if trainer.args.use_trl_head:
        raise ConfigError(f"{why} needs statistics that TRL's head does not give: set use_trl_head: false")
    if trainer._is_vlm:
        raise ConfigError(f"{why} takes no images: remove it")


def shards_parameters(trainer: Any) -> bool:
    """Whether each rank holds only a part of each weight, so that all must run the same forward passes."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))
