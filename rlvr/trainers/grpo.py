"""GRPO: the advantage of a completion is its reward relative to its group's."""

from typing import Any

import torch

from rlvr.advantages import leave_one_out
from rlvr.trainers.config import GRPOConfig
from rlvr.trainers.policy import PolicyTrainer


class GRPOTrainer(PolicyTrainer):
    """TRL's GRPOTrainer under entropy controls. Same arguments, with `args` a `rlvr.GRPOConfig`; see PolicyTrainer.

    With no controls its weights equal stock TRL's, exactly with `use_trl_head` and up to rounding without.
    Differs from TRL: sequences that are masked out whole leave the mean over sequences.
    """

    config_class = GRPOConfig
    args: GRPOConfig

    def _set_advantages(self, batch: dict[str, Any]) -> None:
        if self.args.advantage_estimator == "leave_one_out":
            rewards = self._rewards
            assert rewards is not None
            group = torch.arange(rewards.numel(), device=rewards.device) // self.num_generations
            batch["advantages"] = self._mine(leave_one_out(rewards, group))
