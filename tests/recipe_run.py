"""A recipe made small: its method as it is, on a tiny model for two optimizer steps.

python recipe_run.py RECIPE MODEL_DIR OUT_DIR   ->  one JSON line, on vLLM, which needs a process of its own
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from toy_verifiers import share_of_ascii
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

import rlvr
from rlvr.monitor.records import read_steps
from rlvr.tasks import TaskConfig
from rlvr.trainers.config import PolicyConfig

PPO = {"ppo", "ppo_entropy_advantage", "ppo_kl_cov"}  # recipes of recipes/ppo.py, all others are of recipes/grpo.py
GROUP = 4
SMALL: dict[str, Any] = {
    "num_generations": GROUP,
    "per_device_train_batch_size": GROUP,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
    "vllm_max_model_length": 32,
    "max_steps": 2,
    "learning_rate": 1.0e-3,  # the recipes' own would hardly be seen after two steps
    "warmup_steps": 0,
    "probe_sequences": 1,
    "record_sequences": 0,
    "save_strategy": "no",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def parse(path: Path, *flags: str) -> tuple[TaskConfig, PolicyConfig, ModelConfig]:
    config_class = rlvr.PPOConfig if path.stem in PPO else rlvr.GRPOConfig
    parser = TrlParser((TaskConfig, config_class, ModelConfig))
    parsed: Any = parser.parse_args_and_config(["--config", str(path), *flags])
    return parsed


def small_config(recipe: Path, out: Path, *, updates: int, vllm: bool) -> PolicyConfig:
    """The recipe's settings with everything replaced that only says how large it is, but for updates per rollout."""
    settings = yaml.safe_load(recipe.read_text())
    settings |= {**SMALL, "output_dir": str(out / "run"), "use_vllm": vllm}
    settings.pop("steps_per_generation", None)
    settings["generation_batch_size"] = GROUP * updates // settings.get("num_iterations", 1)
    for control in settings.get("controls", []):
        if control["name"] == "token_budget":
            control["tokens"] = GROUP * SMALL["max_completion_length"] // 2
    path = out / recipe.name
    path.write_text(yaml.safe_dump(settings))
    return parse(path)[1]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [share_of_ascii(text, "") for text in completions]


def train(args: PolicyConfig, model_dir: str | Path) -> dict[str, Any]:
    """What each step recorded, and whether the weights moved and are finite."""
    rows = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(args.generation_batch_size // GROUP)])
    make = rlvr.PPOTrainer if isinstance(args, rlvr.PPOConfig) else rlvr.GRPOTrainer
    with closing(make(str(model_dir), reward, args, rows)) as trainer:
        trainer.train()
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {
        "steps": [record["metrics"] for record in read_steps(args.output_dir)],
        "moved": any(not torch.equal(value, after[name]) for name, value in before.items()),
        "finite": all(bool(value.isfinite().all()) for value in after.values()),
    }


def main(recipe: str, model_dir: str, out: str) -> None:
    updates = round(parse(Path(recipe))[1].updates_per_rollout)
    print(json.dumps(train(small_config(Path(recipe), Path(out), updates=updates, vllm=True), model_dir)))


if __name__ == "__main__":
    main(*sys.argv[1:])
