"""The parts of verl 0.9.1 that rlvr touches, in verl's signatures, for machines without verl.

test_verl.py compares each of them with the real one wherever verl is installed.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

POLICY_LOSS_REGISTRY: dict[str, Callable[..., Any]] = {}


def register_policy_loss(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorator(func: Callable[..., Any]) -> Callable[..., Any]:
        POLICY_LOSS_REGISTRY[name] = func
        return func

    return decorator


def get_policy_loss_fn(name: str) -> Callable[..., Any]:
    return POLICY_LOSS_REGISTRY[name]


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> torch.Tensor:
    sums, lengths = (loss_mat * loss_mask).sum(dim=-1), loss_mask.sum(dim=-1)
    if loss_agg_mode == "token-sum":
        return sums.sum() * dp_size
    if loss_agg_mode == "token-mean":
        return sums.sum() / (loss_mask.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    if loss_agg_mode == "seq-mean-token-mean":
        sums = sums / (lengths + 1e-8)
    mean = sums.sum() / ((lengths > 0).sum() if global_batch_size is None else global_batch_size) * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        mean = mean / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return mean


class Config(Mapping[str, Any]):
    """verl's BaseConfig: attributes, `get`, and a field that is set once stays as it is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"Field '{name}' is frozen and cannot be modified")
        super().__setattr__(name, value)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __iter__(self) -> Any:
        return iter(self.__dataclass_fields__)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(eq=False)
class PolicyLossConfig(Config):
    loss_mode: str = "vanilla"
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1
    dro_beta: float | None = None
    rollout_correction: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class ActorConfig(Config):
    strategy: str = ""
    rollout_n: int = 1
    ppo_micro_batch_size_per_gpu: int | None = None
    clip_ratio: float = 0.2
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    policy_loss: Any = field(default_factory=PolicyLossConfig)
    clip_ratio_c: float = 3.0
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    global_batch_info: dict[str, Any] = field(default_factory=dict)


def no_padding_2_padding(tensor: torch.Tensor, data: Any) -> torch.Tensor:
    """Nothing to do: the fake engine's output is padded."""
    return tensor


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """The call of the registered loss; entropy bonus and KL, which verl adds afterwards, are left out."""
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        config.global_batch_info[name] = data[name]
    config.global_batch_info["loss_scale_factor"] = config.loss_scale_factor
    return get_policy_loss_fn(config.policy_loss.get("loss_mode", "vanilla"))(
        old_log_prob=data["old_log_probs"],
        log_prob=no_padding_2_padding(model_output["log_probs"], data),
        advantages=data["advantages"],
        response_mask=data["response_mask"].to(bool),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=data.get("rollout_is_weights", None),
    )


losses = core_algos = sys.modules[__name__]  # `from verl.workers.utils import losses`


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module in verl's place, for the length of a test."""
    POLICY_LOSS_REGISTRY.clear()
    monkeypatch.setattr(losses, "ppo_loss", ppo_loss)  # and back, when rlvr has wrapped it
    for place in ("verl.trainer.ppo.core_algos", "verl.workers.config", "verl.workers.utils.losses"):
        parts = place.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), losses)
