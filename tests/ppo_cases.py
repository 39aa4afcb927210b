"""A small PPO run whose completions depend on their prompt alone; everything after them is real. And what its critic
and policy say, each text passed alone and without padding, in float64.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from test_grpo_trainer import LENGTH, FixedRollouts, parity_of_sum
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

import rlvr
from rlvr.trainers import trl_bridge as bridge


class FixedPPO(rlvr.PPOTrainer):
    _generate_single_turn = FixedRollouts._generate_single_turn


def ppo_trainer(model_dir: Path, out: Path, **settings: Any) -> rlvr.PPOTrainer:
    """16 completions per rollout by default; SGD with a large rate, so that gradients show in weights.

    settings: of `rlvr.PPOConfig`, and `peft_config`.
    """
    return policy_trainer(FixedPPO, model_dir, out, **{"critic_learning_rate": 0.1, **settings})


def policy_trainer(kind: Any, model_dir: Path, out: Path, *, peft_config: Any = None, **settings: Any) -> Any:
    """A trainer of `kind`; settings: of its config."""
    args = kind.config_class(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 16,
            "max_completion_length": LENGTH,
            "learning_rate": 0.1,
            "optim": "sgd",  # Adam turns a rounding error of a zero gradient into a step
            "max_steps": 4,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 3,
            "model_init_kwargs": {"dtype": "float32"},
            **settings,
        },
    )
    rows = Dataset.from_list([{"prompt": f"{a}+{3 * b}="} for a in range(8) for b in range(8)])  # 4 rollouts
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    return kind(str(model_dir), parity_of_sum, args, rows, processing_class=tokenizer, peft_config=peft_config)


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rollouts(one: Any) -> list[dict[str, Any]]:
    """The batches that a trainer will learn from, each with `policy` and `critic` as they were then, in float64."""
    seen: list[dict[str, Any]] = []
    generate = one._generate_and_score_completions

    def remembered(inputs: Any) -> Any:
        batch = generate(inputs)
        modules = {"policy": one.model}
        if hasattr(one, "critic"):
            modules["critic"] = one.critic.module
        seen.append({**batch, **{name: exact(module) for name, module in modules.items()}})
        return batch

    one._generate_and_score_completions = remembered
    return seen


def exact(model: Any) -> Any:
    """A float64 copy of a model, with the forward of its class."""
    copy = deepcopy(model)
    vars(copy).pop("forward", None)  # refers to the original
    return copy.double()


def texts(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each row without padding: token ids of prompt and completion, and which of the latter are trained."""
    sides = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    for row, (prompt, shown, completion, said) in enumerate(zip(*(batch[side] for side in sides), strict=True)):
        trained = bridge.trained_mask(batch)[row]
        yield prompt[shown.bool()], completion[said.bool()], trained[said.bool()]


def told_values(critic: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The value of the text before each trained token, for each row."""
    found = []
    for prompt, completion, trained in texts(batch):
        ids = torch.cat([prompt, completion]).unsqueeze(0)
        hidden = critic.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1][trained]
        found.append(torch.nn.functional.linear(hidden, critic.score.weight, critic.score.bias)[:, 0])
    return found


def told_logps(policy: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The log-prob of each trained token, for each row."""
    found = []
    for prompt, completion, trained in texts(batch):
        logits = policy(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0][trained])
    return found


def in_rows(padded: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """What (B, T) says of each row's trained tokens."""
    return [x[mask] for x, mask in zip(padded, bridge.trained_mask(batch), strict=True)]


def by_step(one: Any) -> dict[str, list[Tensor]]:
    """Weights of `policy` and `critic` before training and after each optimizer step."""
    found = {"policy": [flat(one.model)], "critic": [flat(one.critic.module)]}

    class Remember(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found["policy"].append(flat(one.model))
            found["critic"].append(flat(one.critic.module))

    one.add_callback(Remember())
    return found


def history(one: Any) -> list[dict[str, float]]:
    """What was logged of each optimizer step."""
    return [entry for entry in one.state.log_history if "loss" in entry]
