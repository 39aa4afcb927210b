"""One RL run on the base model, by the product's own trainers, and what is read out of its records."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import rlvr
from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_run
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.policy import PolicyTrainer

from .countdown import COMPLETION_LENGTH, draw_prompts, reward

RUNS = Path("runs/lab/runs")
PROMPTS, GROUP, UPDATES = 32, 8, 4  # of a rollout
PROBLEMS = 100 * PROMPTS  # at least, also for shorter runs, which are then the first part of longer ones
HELD_OUT_PROMPTS = 256
TRAINERS = {"grpo": rlvr.GRPOTrainer, "ppo": rlvr.PPOTrainer}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabRun:
    """part: of the suite.   name: of the method.   algorithm: of TRAINERS.   settings: fields of the trainer's
    configuration that the method sets.   rollouts: 4 steps each.   numbers: how many a problem has.   samples: of each
    held-out prompt after training; 0: no evaluation.   stops: rollouts after which they are asked, too, 0: before
    training; that changes nothing in what is trained.
    """

    name: str
    part: str = "compare"
    algorithm: str = "grpo"
    seed: int = 0
    settings: Mapping[str, Any]
    rollouts: int = 100
    numbers: tuple[int, ...] = (3,)
    samples: int = 64
    stops: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        """Runs of other lengths lie elsewhere."""
        return RUNS / f"{self.part}-{self.rollouts}" / f"{self.name}-seed{self.seed}"


def perform(run: LabRun, base: Path) -> Path:
    """Train and evaluate, unless the run is there already; returns its directory. Raises: as `is_made`."""
    if is_made(run, base):
        return run.path
    if run.path.exists():
        shutil.rmtree(run.path)  # interrupted; a run takes a minute and repeats exactly
    trainer = make_trainer(run, base, described(run, base))
    trainer.train()
    if run.samples:
        trainer.evaluate()
    return run.path


def is_made(run: LabRun, base: Path) -> bool:
    """Whether the run is finished. Raises: ConfigError if what is finished there is a run of other settings."""
    if not finished(run):
        return False
    held, wanted = read_run(run.path)["config"], {**described(run, base), **setting(run)}
    if any(held.get(name) != value for name, value in wanted.items()):
        raise ConfigError(f"{run.path} holds a run with other settings: move it away, or choose another name")
    return True


def finished(run: LabRun) -> bool:
    """Whether the run is there whole, its evaluation included."""
    held = read_run(run.path)
    if held.get("status") != "finished" or not run.samples:
        return held.get("status") == "finished"
    return any(one["step"] == held["config"]["max_steps"] for one in read_evals(run.path))


def described(run: LabRun, base: Path) -> dict[str, Any]:
    """What is kept of the run in its run.json, and must agree for it to be taken as made."""
    return {
        "lab_algorithm": run.algorithm,
        "lab_base": str(base),
        "lab_numbers": list(run.numbers),
        "lab_rollouts": run.rollouts,
        "lab_samples": run.samples,
        "lab_settings": json.dumps(run.settings),
        **({"lab_stops": list(run.stops)} if run.stops else {}),
    }


def make_trainer(run: LabRun, base: Path, run_config: Mapping[str, Any]) -> PolicyTrainer:
    drawn = max(run.rollouts * PROMPTS, PROBLEMS)
    problems = draw_prompts(False, run.numbers, drawn, np.random.default_rng(1000 + run.seed))
    trainer = TRAINERS[run.algorithm](
        AutoModelForCausalLM.from_pretrained(base),
        reward,
        config(run),
        Dataset.from_dict({"prompt": problems}),
        Dataset.from_dict({"prompt": held_out_prompts(run.numbers)}),
        processing_class=AutoTokenizer.from_pretrained(base),
        run_config={**run_config, "task_description": f"Countdown, {' or '.join(map(str, run.numbers))} numbers"},
    )
    trainer.add_callback(_Stops(run.stops))
    return trainer


def held_out_prompts(numbers: tuple[int, ...] = (3,)) -> list[str]:
    """Those of every run."""
    return draw_prompts(True, numbers, HELD_OUT_PROMPTS, np.random.default_rng(12345))


class _Stops(TrainerCallback):
    """Asks for an evaluation after these rollouts."""

    def __init__(self, rollouts: Collection[int]) -> None:
        self.steps = {count * UPDATES for count in rollouts}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step in self.steps


def config(run: LabRun) -> PolicyConfig:
    """The laboratory's setting, with what the run changes."""
    return TRAINERS[run.algorithm].config_class(
        output_dir=str(run.path), report_to="none", **{**setting(run), **run.settings}
    )


def setting(run: LabRun) -> dict[str, Any]:
    """Fields of the trainer's configuration that the run does not set itself."""
    common = {
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
        "num_generations_eval": run.samples or 1,
        "eval_on_start": 0 in run.stops,
        "seed": run.seed,
        "record_sequences": 0,
        # What a model of .3 million parameters does not need, and would cost more than the model.
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return {name: value for name, value in common.items() if name not in run.settings}
