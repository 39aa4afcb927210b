"""Held-out reward with an interval: the number that says whether training helped."""

import math
from typing import Any

import torch
import trl
from torch import Tensor


def heldout_reward(rewards: Tensor, samples: int) -> dict[str, float]:
    """Mean reward and the half width of its 95 % interval.

    rewards [P * k]: k samples of a prompt stand together; NaN where a sample could not be scored.   samples: k.
    The interval is over prompts (their means are independent, samples of one prompt are not): 1.96 std / sqrt(P).
    """
    per_prompt = rewards.double().view(-1, samples).nanmean(dim=1)
    per_prompt = per_prompt[~per_prompt.isnan()]
    if per_prompt.numel() == 0:
        return {"heldout/reward": math.nan, "heldout/reward_ci95": math.nan}
    spread = per_prompt.std(correction=1) if per_prompt.numel() > 1 else torch.tensor(math.nan)
    return {
        "heldout/reward": float(per_prompt.mean()),
        "heldout/reward_ci95": float(1.96 * spread / math.sqrt(per_prompt.numel())),
    }


class HeldOutTrainer(trl.GRPOTrainer):
    """TRL's trainer with an evaluation that samples and scores, and computes no loss: what counts is the reward."""

    run_callback: Any  # what records an evaluation
    _rewards: Tensor | None  # set by _calculate_rewards, over all ranks

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Sample and score a held-out batch."""
        prompts = [row["prompt"] for row in inputs]
        _, ids, _, completions, *_ = self._generate(prompts)
        self._calculate_rewards(inputs, prompts, completions, ids)
        assert self._rewards is not None
        self._heldout.append(self._rewards)
        self._pending_metrics.clear()  # what the reward functions logged would be counted to the next training rollout
        self._pending_extra_logs.clear()
        return None, None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """TRL's loop plus `heldout/reward` with its interval over prompts, recorded in the run directory.

        Random numbers are the evaluation's own, the same each time: measuring does not change what is trained.
        """
        self._heldout: list[Tensor] = []
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed + 1 + self.accelerator.process_index)
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        samples = self.num_generations_eval
        prompts = min(len(dataloader.dataset), sum(map(len, self._heldout)) // samples)
        held = heldout_reward(torch.cat(self._heldout)[: prompts * samples], samples)  # the rest pads the last batch
        self.run_callback.record_eval(held, {"prompts": prompts, "samples_per_prompt": samples})
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in held.items()})
        return output
