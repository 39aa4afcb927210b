"""Held-out reward with an interval: the number that says whether training helped."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from torch import Tensor

from rlvr.diagnostics import pass_at_k
from rlvr.trainers.clock import PhaseClock


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


def domain_rewards(rewards: Tensor, samples: int, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """`heldout_reward` and the number of prompts of each domain. rewards [P * k], domains [P * k]: of every sample."""
    found = {}
    for domain in sorted(set(domains)):
        mine = torch.tensor([name == domain for name in domains], device=rewards.device)
        found[domain] = {**heldout_reward(rewards[mine], samples), "prompts": int(mine.sum()) // samples}
    return found


def pass_rates(rewards: Tensor, samples: int, threshold: float) -> dict[int, float]:
    """pass@k by k, for powers of two up to `samples`, over the prompts with that many scored samples.

    rewards [P * samples]: samples of a prompt stand together; NaN where a sample could not be scored.
    threshold: the least reward of a correct completion.
    """
    per_prompt = rewards.view(-1, samples)
    scored, correct = (~per_prompt.isnan()).sum(dim=1), (per_prompt >= threshold).sum(dim=1)
    rates, k = {}, 1
    while k <= samples:
        enough = scored >= k
        if enough.any():
            rates[k] = float(pass_at_k(scored[enough], correct[enough], k).mean())
        k *= 2
    return rates


class HeldOutTrainer(trl.GRPOTrainer):
    """TRL's trainer with an evaluation that samples and scores, and computes no loss: what counts is the reward."""

    clock: PhaseClock
    run_callback: Any  # what records an evaluation
    _rewards: Tensor | None  # set by _calculate_rewards, over all ranks

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Sample and score a held-out batch."""
        prompts = [row["prompt"] for row in inputs]
        _, ids, _, completions, *_ = self._generate(prompts)
        self._calculate_rewards(inputs, prompts, completions, ids)
        assert self._rewards is not None
        self._heldout.append(self._rewards)
        if "domain" in inputs[0]:
            self._domains += gather_object([row["domain"] for row in inputs])
        self._pending_metrics.clear()  # what the reward functions logged would be counted to the next training rollout
        self._pending_extra_logs.clear()
        return None, None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """TRL's loop plus `heldout/reward` with its interval over prompts, recorded in the run directory.

        Random numbers are the evaluation's own, the same each time: measuring does not change what is trained.
        """
        self.run_callback.start_eval()
        self._heldout: list[Tensor] = []
        self._domains: list[str] = []
        with self.clock.phase("evaluation"), torch.random.fork_rng():
            torch.manual_seed(self.args.seed + 1 + self.accelerator.process_index)
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        samples = self.num_generations_eval
        prompts = min(len(dataloader.dataset), sum(map(len, self._heldout)) // samples)
        rewards = torch.cat(self._heldout)[: prompts * samples]  # the rest pads the last batch
        held = heldout_reward(rewards, samples)
        rates = pass_rates(rewards, samples, self.args.pass_reward)
        held |= {f"heldout/pass_at_{k}": rate for k, rate in rates.items()}
        details: dict[str, Any] = {"prompts": prompts, "samples_per_prompt": samples}
        if self._domains:
            details["domains"] = domain_rewards(rewards, samples, self._domains[: prompts * samples])
        if metric_key_prefix != "eval":
            details["name"] = metric_key_prefix
        self.run_callback.record_eval(held, details)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in held.items()})
        return output
