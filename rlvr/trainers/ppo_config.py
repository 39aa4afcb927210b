"""What a PPO run is, checked before any model is loaded."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import SchedulerType

from rlvr.errors import ConfigError
from rlvr.trainers.batches import completions_per_rollout
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.surrogate_choice import trl_default

OWN_COPY, SHARED = "copy", "shared"  # other values of `critic` name a model


@dataclass
class PPOConfig(PolicyConfig):
    """PolicyConfig, with the critic and what makes advantages of its values.

    Epochs over a rollout are TRL's `num_iterations`, minibatches its `generation_batch_size` over
    per_device_train_batch_size * gradient_accumulation_steps * processes.
    """

    smallest_group: ClassVar[int] = 1

    num_generations: int | None = field(
        default=1, metadata={"help": "Completions per prompt; a critic needs no group, so one is enough."}
    )
    critic: str = field(
        default=OWN_COPY,
        metadata={
            "help": "copy: a value head on its own copy of the policy's backbone. shared: a value head on the "
            "policy's backbone. Else a model or directory that reads the policy's tokens, such as a saved critic."
        },
    )
    critic_lora: bool | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of the critic, of the policy's settings. Default: with use_peft."},
    )
    critic_learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate of the critic, under lr_scheduler_type."}
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps, first of all, that train the critic alone (value pre-training, VC-PPO)."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token, in [0, 1]."})
    lam: float = field(default=1.0, metadata={"help": "GAE's lambda of the policy's advantages, in [0, 1]."})
    critic_lam: float | None = field(
        default=None,
        metadata={"help": "GAE's lambda of the critic's returns (decoupled GAE, VC-PPO: 1.0). Default: lam."},
    )
    length_adaptive_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Let the policy's lambda be 1 - 1 / (alpha * length) of each completion, not lam (VAPO: 0.05)."
        },
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale the advantages of a rollout's tokens to mean 0 and variance 1."}
    )
    kl_reward_coef: float = field(
        default=0.0,
        metadata={"help": "Each token's reward loses this times log pi_old - log pi_ref; `beta` is in the loss."},
    )
    cliprange_value: float | None = field(
        default=0.5,
        metadata={"help": "How far a value may move from the rollout's before its loss stops pulling; 0: no limit."},
    )
    vf_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the value loss in the policy's, with critic: shared. Default: 0.1."},
    )

    def _check_fields(self) -> None:
        super()._check_fields()
        self._check_numbers()
        self._check_critic()
        for name in ("scale_rewards", "multi_objective_aggregation"):
            value = getattr(self, name)
            if value != trl_default(name):
                raise ConfigError(f"{name}={value} is of groups, PPO's advantages are of a critic: unset it")
        if self.lr_scheduler_type in _OF_METRICS:
            raise ConfigError(
                f"lr_scheduler_type={SchedulerType(self.lr_scheduler_type).value} follows a metric, and a critic has "
                "none: choose another"
            )
        if self.fp16:
            raise ConfigError("fp16=True: the critic's gradients are not scaled; use bf16, or float32 weights")
        if self.use_trl_head and self.critic == SHARED:
            raise ConfigError("critic=shared reads hidden states, which TRL's head hides: set use_trl_head: false")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ConfigError("PPO's critic is not sharded by FSDP: use DeepSpeed (recipes/accelerate/zero2.yaml)")

    def _check_numbers(self) -> None:
        may_be_none = ("critic_lam", "length_adaptive_alpha", "cliprange_value", "vf_coef")
        bounds = {
            **dict.fromkeys(("gamma", "lam", "critic_lam"), (0.0, 1.0, "in [0, 1]")),
            **dict.fromkeys(("kl_reward_coef", "cliprange_value", "vf_coef"), (0.0, _MOST, ">= 0")),
            **dict.fromkeys(("length_adaptive_alpha", "critic_learning_rate"), (_LEAST, _MOST, "> 0")),
        }
        for name, (low, high, must_be) in bounds.items():
            value = getattr(self, name)
            if not (_is_number(value) and low <= value <= high) and not (value is None and name in may_be_none):
                raise ConfigError(f"{name}={value!r}: must be a number {must_be}")
        alpha = self.length_adaptive_alpha
        if alpha is not None and self.lam != type(self).lam:
            raise ConfigError(f"lam={self.lam} has no effect with length_adaptive_alpha={alpha}: unset one of them")

    def _check_critic(self) -> None:
        if not isinstance(self.critic, str):
            raise ConfigError(f"critic={self.critic!r}: must be copy, shared or the name of a model")
        if self.critic == SHARED:
            if self.critic_warmup_steps:
                raise ConfigError(
                    f"critic_warmup_steps={self.critic_warmup_steps} freezes the backbone that critic=shared trains: "
                    "use critic: copy, or 0"
                )
            if self.critic_lora is not None:
                raise ConfigError(f"critic_lora={self.critic_lora} has no effect with critic=shared: unset it")
            self.vf_coef = 0.1 if self.vf_coef is None else self.vf_coef
        elif self.vf_coef is not None:
            raise ConfigError(
                f"vf_coef={self.vf_coef} has no effect on a critic with an optimizer of its own: use "
                "critic_learning_rate, or critic: shared"
            )

    def _resolve(self) -> None:
        """TRL's own checks ask for groups of at least two; for them, a rollout without groups is one."""
        group: int = self.num_generations or 1
        if group == 1:
            if (whole := completions_per_rollout(self)) < 2:
                size = f"per_device_train_batch_size={self.per_device_train_batch_size}"
                raise ConfigError(f"{size} gives {whole} completion per rollout: give at least 2")
            self.num_generations = whole
        self.num_generations_eval: int | None = self.num_generations_eval or group
        super()._resolve()
        self.num_generations = group
        self._check_warmup()

    def check_data(self, columns: Sequence[str], rows: int) -> None:
        super().check_data(columns, rows)
        self._check_warmup()  # stages have set max_steps

    def _check_warmup(self) -> None:
        steps, unit = self.critic_warmup_steps, max(1, round(self.updates_per_rollout))
        if type(steps) is not int or steps < 0 or steps % unit:
            raise ConfigError(
                f"critic_warmup_steps={steps}: must be whole rollouts of {unit} optimizer step(s), so a multiple of it"
            )
        if 0 < self.max_steps <= steps:
            raise ConfigError(f"critic_warmup_steps={steps} leaves none of max_steps={self.max_steps} to the policy")

    @property
    def advantages_line(self) -> str:
        """Where advantages come from, for the header."""
        lam = f"{self.lam:g}" if self.length_adaptive_alpha is None else f"1 - 1 / ({self.length_adaptive_alpha:g} l)"
        apart = "" if self.critic_lam is None else f", critic's lambda {self.critic_lam:g}"
        return f"GAE, gamma {self.gamma:g}, lambda {lam}{apart}"


_OF_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_LEAST, _MOST = sys.float_info.min, sys.float_info.max


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
