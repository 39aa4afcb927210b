"""What entropy control costs: seconds per training step against stock TRL, both sides in one run.

    python scripts/bench_step.py --model models/SmolLM2-135M-Instruct --rounds 3 --steps 4

Same model, prompts, seed, completion lengths and transformers rollouts on every side. Sides take turns in an order
that
rotates between rounds; the first step of each turn is a warm-up. The ratio is between medians over all measured steps.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import rlvr

SIDES: dict[str, list[Any] | None] = {
    "stock TRL": None,
    "rlvr, no control": [],
    "rlvr, clip_cov": [{"name": "clip_cov", "low": 0.0}],
    "rlvr, kl_cov": [{"name": "kl_cov"}],
}


class StepTimer(TrainerCallback):
    """Seconds from the beginning of each optimizer step to that of the next: rollout, logging and records included."""

    def __init__(self) -> None:
        self._begins: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self._begins)]


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def run(side: str, options: argparse.Namespace) -> list[float]:
    """Seconds of the measured steps of one turn."""
    controls = SIDES[side]
    config: Any = trl.GRPOConfig if controls is None else rlvr.GRPOConfig
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            num_generations=8,
            num_iterations=2,
            max_completion_length=options.length,
            generation_kwargs={"min_new_tokens": options.length},
            max_steps=options.steps * 2 + 3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **({"controls": controls} if controls else {}),
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        rows = Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(20) for b in range(20)])
        timer = StepTimer()
        trainer: Any = trl.GRPOTrainer if controls is None else rlvr.GRPOTrainer
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            trainer(model, share_of_digits, args, rows, processing_class=tokenizer, callbacks=[timer]).train()
    # A rollout serves two steps; a pair of them is one measurement.
    return [a + b for a, b in zip(timer.seconds[2::2], timer.seconds[3::2], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="measured rollouts per turn, two optimizer steps each")
    parser.add_argument("--batch", type=int, default=16, help="completions per step")
    parser.add_argument("--length", type=int, default=32, help="tokens per completion")
    options = parser.parse_args()
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    sides = list(SIDES)
    for turn in range(options.rounds):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            seconds[side] += run(side, options)
            print(
                f"round {turn + 1} {side}: {', '.join(f'{s:.2f}' for s in seconds[side][-options.steps :])} s",
                flush=True,
            )
    stock = median(seconds["stock TRL"])
    print(f"\n{'side':<18} {'median s per rollout and 2 steps':>34} {'against stock':>14}")
    for side in sides:
        middle = median(seconds[side])
        print(f"{side:<18} {middle:>34.3f} {(middle / stock - 1) * 100:>+13.1f}%")


if __name__ == "__main__":
    main()
