"""The z-loss on the routers of a mixture of experts; its load-balancing loss is TRL's `router_aux_loss_coef`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr.mole.router import z_loss


def router_z_loss(router_logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """mean over layers and tokens of (logsumexp_e z_e)^2, a scalar.

    router_logits: of each layer, [B * S, E].   mask: [B, S], 1 for tokens that are no padding.
    Ref: Zoph et al. 2022, arXiv 2202.08906, Eq. 5; C3PO: arXiv 2506.14731, Eq. 6.
    """
    valid = mask.flatten().bool()
    per_layer = [z_loss(z.reshape(-1, z.size(-1)).float(), valid.to(z.device)) for z in router_logits]
    return torch.stack([x.to(per_layer[0].device) for x in per_layer]).mean()


class RouterZLoss:
    """Catches the router logits of each training forward of a Hugging Face model, bare or with an adapter.

    Raises: ConfigError if the model has no routers that report their logits.
    """

    def __init__(self, model: Any, coef: float) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(base.config.get_text_config(), "output_router_logits"):
            raise ConfigError(f"router_z_loss_coef={coef}: {type(base).__name__} has no expert routers; set it to 0")
        # Not by the configuration: it is saved with the model, and generation with padded prompts fails under it.
        base.base_model.register_forward_pre_hook(self._ask, with_kwargs=True)
        base.base_model.register_forward_hook(self._catch, with_kwargs=True)
        self.coef = coef
        self._caught: Tensor | None = None

    def _ask(self, module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "output_router_logits": True} if torch.is_grad_enabled() else kwargs

    def _catch(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._caught = router_z_loss(output.router_logits, kwargs["attention_mask"])

    def take(self) -> Tensor:
        """The z-loss of the last forward with gradient, before its coefficient."""
        assert self._caught is not None
        caught, self._caught = self._caught, None
        return caught
