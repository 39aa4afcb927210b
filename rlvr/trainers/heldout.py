"""Held-out reward with an interval: the number that says whether training helped."""

import math

import torch
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
