"""A small PPO run whose completions depend on their prompt alone; everything after them is real."""

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from test_grpo_trainer import LENGTH, parity_of_sum
from transformers import AutoTokenizer

import rlvr


class FixedPPO(rlvr.PPOTrainer):
    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        completions = []
        for i, ids in enumerate(prompt_ids):
            source = random.Random(f"{ids} {i % self.num_generations}")
            completions.append([source.randrange(3, 100) for _ in range(source.randint(1, LENGTH))])
        return completions, None


def ppo_trainer(model_dir: Path, out: Path, *, peft_config: Any = None, **settings: Any) -> rlvr.PPOTrainer:
    """16 completions per rollout by default; SGD with a large rate, so that gradients show in weights."""
    args = rlvr.PPOConfig(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 16,
            "max_completion_length": LENGTH,
            "learning_rate": 0.1,
            "critic_learning_rate": 0.1,
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
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)])  # 4 rollouts
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    return FixedPPO(str(model_dir), parity_of_sum, args, rows, processing_class=tokenizer, peft_config=peft_config)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
