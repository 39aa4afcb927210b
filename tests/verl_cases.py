"""What the tests of the verl integration run over: a micro-batch in verl's tensors, and a call of the loss."""

from typing import Any

import torch
from torch import Tensor

from rlvr.integrations.verl import policy_loss, rlvr_loss, with_entropy

B, T = 7, 9
Batch = dict[str, Tensor]


def actor(section: dict[str, Any] | None = None, **options: Any) -> Any:
    """verl's actor configuration, whose `policy_loss` section is ours."""
    from verl.workers.config import ActorConfig

    loss = policy_loss(loss_mode="rlvr", **(section or {}))
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=loss, **options)


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """(B, T) tensors as verl hands them to a loss; row 2 has no valid token, padding holds large numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[2] = False
    old = -2 * draw(B, T).abs()
    values = {
        "old_log_prob": old,
        "log_prob": old + 0.3 * draw(B, T),
        "advantages": draw(B, 1).expand(B, T).clone(),
        "entropy": draw(B, T).abs(),
        "rollout_is_weights": draw(B, T).exp(),
    }
    values = {name: torch.where(mask, x, 50.0).to(dtype) for name, x in values.items()}
    values["log_prob"].requires_grad_()
    return {**values, "response_mask": mask}


def run(config: Any, values: Batch, *, weights: bool = False, entropy: bool = True) -> tuple[Tensor, dict[str, float]]:
    """The loss, called as verl's `ppo_loss` calls it, within our wrapper of that."""

    def call(config: Any, model_output: Batch, data: Batch, dp_group: Any = None) -> Any:
        return rlvr_loss(
            old_log_prob=data["old_log_prob"],
            log_prob=data["log_prob"],
            advantages=data["advantages"],
            response_mask=data["response_mask"],
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=data["rollout_is_weights"] if weights else None,
        )

    return with_entropy(call, lambda x, data: x)(config, {"entropy": values["entropy"]} if entropy else {}, values)


def grad_of(loss: Tensor, values: Batch) -> Tensor:
    return torch.autograd.grad(loss, values["log_prob"], retain_graph=True)[0]
