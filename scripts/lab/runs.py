"""One RL run on the base model, by the product's own trainers, and what is read out of its records."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlvr
from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_run
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.policy import PolicyTrainer

from .countdown import COMPLETION_LENGTH, draw, reward, split

RUNS = Path("runs/lab")
PROMPTS, GROUP, UPDATES = 32, 8, 4  # of a rollout
HELD_OUT_PROMPTS, HELD_OUT_SAMPLES = 256, 16
TRAINERS = {"grpo": rlvr.GRPOTrainer, "ppo": rlvr.PPOTrainer}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabRun:
    """name: of the method.   algorithm: of TRAINERS.   settings: fields of the trainer's configuration that the method
    sets.   rollouts: 4 steps each.
    """

    name: str
    algorithm: str = "grpo"
    seed: int = 0
    settings: Mapping[str, Any]
    rollouts: int = 100

    @property
    def path(self) -> Path:
        return RUNS / f"{self.name}-seed{self.seed}"


def perform(run: LabRun, base: Path) -> Path:
    """Train and evaluate, unless the run is there already; returns its directory.

    Raises: ConfigError if the directory holds a finished run of other settings.
    """
    wanted = {
        "lab_algorithm": run.algorithm,
        "lab_base": str(base),
        "lab_rollouts": run.rollouts,
        "lab_settings": json.dumps(run.settings),
    }
    before = read_run(run.path)
    if before.get("status") == "finished" and read_evals(run.path):
        if any(before["config"].get(name) != value for name, value in wanted.items()):
            raise ConfigError(f"{run.path} holds a run with other settings: move it away, or choose another name")
        return run.path
    if run.path.exists():
        shutil.rmtree(run.path)  # interrupted; a run takes minutes and repeats exactly
    trainer = make_trainer(run, base, wanted)
    trainer.train()
    trainer.evaluate()
    return run.path


def make_trainer(run: LabRun, base: Path, run_config: Mapping[str, Any]) -> PolicyTrainer:
    problems = draw(split(held_out=False), run.rollouts * PROMPTS, np.random.default_rng(1000 + run.seed))
    held_out = draw(split(held_out=True), HELD_OUT_PROMPTS, np.random.default_rng(12345))
    return TRAINERS[run.algorithm](
        AutoModelForCausalLM.from_pretrained(base),
        reward,
        config(run),
        Dataset.from_dict({"prompt": problems.prompts()}),
        Dataset.from_dict({"prompt": held_out.prompts()}),
        processing_class=AutoTokenizer.from_pretrained(base),
        run_config={**run_config, "task_description": "Countdown, 3 numbers"},
    )


def config(run: LabRun) -> PolicyConfig:
    """The laboratory's setting, with what the run changes."""
    common: dict[str, Any] = {
        "num_generations": GROUP,
        "per_device_train_batch_size": PROMPTS * GROUP // UPDATES,
        "steps_per_generation": UPDATES,
        "gradient_accumulation_steps": 1,
        "max_completion_length": COMPLETION_LENGTH,
        "max_steps": run.rollouts * UPDATES,
        "loss_type": "dapo",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5 * UPDATES,
        "per_device_eval_batch_size": 512,
        "num_generations_eval": HELD_OUT_SAMPLES,
        "seed": run.seed,
        # What a model of .3 million parameters does not need, and would cost more than the model.
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TRAINERS[run.algorithm].config_class(output_dir=str(run.path), **{**common, **run.settings})
