"""A short training whose completions are hostile text, told to the systems of `report_to`; stopped, and resumed."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import rlvr

HOSTILE = "<script>alert(1)</script>|\n\n# *x* `y` ![i](http://e/) &lt; | ---"
CHECKPOINT, STOPS_AFTER, STEPS, EVERY = 4, 6, 8, 2  # optimizer steps; EVERY: of a log


class HostileRollouts(rlvr.GRPOTrainer):
    """The trainer with completions that depend on the prompt alone; everything after them is real."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        whole = self._tokenizer(HOSTILE)["input_ids"]
        lengths = [
            random.Random(f"{ids} {i % self.num_generations}").randint(len(whole) - 6, len(whole))
            for i, ids in enumerate(prompt_ids)
        ]
        return [whole[:length] for length in lengths], None


class Stopped(Exception):
    pass


def train(model_dir: str | Path, out: str | Path, resume: bool = False, **settings: Any) -> HostileRollouts:
    """To the end, and evaluated once more; unless it is resumed, it stops after step STOPS_AFTER."""
    torch.set_num_threads(1)
    args = rlvr.GRPOConfig(
        output_dir=str(out),
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": len(HOSTILE) + 1,
            "num_iterations": 2,
            "max_steps": STEPS,
            "logging_steps": EVERY,
            "save_strategy": "steps",
            "save_steps": CHECKPOINT,
            "eval_strategy": "steps",
            "eval_steps": CHECKPOINT,
            "eval_on_start": True,
            "entropy_alarm": {"low": 90.0, "high": 99.0, "patience": 1},
            "controls": [{"name": "kl_cov", "fraction": 0.1}],
            "learning_rate": 1e-3,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 3,
            "model_init_kwargs": {"dtype": "float32"},
            **settings,
        },
    )
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)])
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    one = HostileRollouts(str(model_dir), odd_length, args, rows, rows.select(range(2)), processing_class=tokenizer)
    generate = one._generate_single_turn

    def stop(*arguments: Any, **options: Any) -> Any:
        if one.model.training and one.state.global_step >= STOPS_AFTER:
            raise Stopped
        return generate(*arguments, **options)

    if not resume:
        one._generate_single_turn = stop
    one.train(resume_from_checkpoint=resume)
    one.evaluate()
    return one


def odd_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) % 2) for ids in completion_ids]


if __name__ == "__main__":
    try:
        train(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    except Stopped:
        sys.exit(3)
