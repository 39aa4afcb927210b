"""What entropy control costs: seconds per training step against stock TRL, both sides in one run.

    OMP_WAIT_POLICY=passive python scripts/bench_step.py --model models/SmolLM2-135M-Instruct --rounds 12

Same model, prompts, seed, completion lengths and transformers rollouts on every side. All sides are alive at once and
take turns after each rollout and its two optimizer steps, so that a change of the machine's speed meets all of them;
the order rotates. A turn lasts from the beginning of a rollout to the beginning of the side's next one: logging and
records are in it. The figure is the median over rounds of the ratio to stock TRL in the same round, with quartiles.
"""

import argparse
import contextlib
import os
import tempfile
import threading
import time
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import rlvr

THERMOSTAT = {"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0}
SIDES: dict[str, dict[str, Any] | None] = {
    "stock TRL": None,
    "no control": {},
    "no diagnostics": {"diagnostics": False},
    "clip_cov": {"controls": [{"name": "clip_cov", "low": 0.0}]},
    "kl_cov, thermostat": {"controls": ["kl_cov"], "thermostat": THERMOSTAT},
    "steer": {"controls": ["steer"]},
    "clip_b": {"controls": ["clip_b"]},
    "clip_v": {"controls": ["clip_v"]},
    "high_entropy": {"controls": ["high_entropy"]},
    "entropy_bonus": {"controls": ["entropy_bonus"]},
    "entropy_advantage": {"controls": ["entropy_advantage"]},
    "token_budget": {"controls": [{"name": "token_budget", "tokens": 64}]},
    "probe of 2": {"probe_sequences": 2},
}


class Turns:
    """Lets one side work at a time, in an order that rotates, and times its turns."""

    def __init__(self, sides: list[str], rounds: int) -> None:
        self.order = [side for i in range(rounds) for side in sides[i % len(sides) :] + sides[: i % len(sides)]]
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self._next = 0
        self._change = threading.Condition()

    def wait(self, side: str) -> None:
        with self._change:
            self._change.wait_for(lambda: self._next >= len(self.order) or self.order[self._next] == side)

    def done(self, side: str, seconds: float) -> None:
        with self._change:
            self.seconds[side].append(seconds)
            self._next += 1
            self._change.notify_all()


class Turn(TrainerCallback):
    """Waits for the side's turn before each rollout; a rollout serves two optimizer steps."""

    def __init__(self, side: str, turns: Turns) -> None:
        self.side, self.turns = side, turns
        self._began: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 2 == 0:
            self._end()
            self.turns.wait(self.side)
            self._began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._began is not None:
            self.turns.done(self.side, time.perf_counter() - self._began)


def share_of_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def build(side: str, folder: str, turns: Turns, options: argparse.Namespace) -> Any:
    """The side's trainer, ready to train for all rounds."""
    settings = SIDES[side]
    config: Any = trl.GRPOConfig if settings is None else rlvr.GRPOConfig
    args = config(
        output_dir=f"{folder}/{side}",
        per_device_train_batch_size=options.batch,
        num_generations=8,
        num_iterations=2,
        max_completion_length=options.length,
        generation_kwargs={"min_new_tokens": options.length},
        max_steps=options.rounds * 2,
        optim="sgd",  # all sides live at once; Adam's states would not fit, and would only make the shares smaller
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **(settings or {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(20) for b in range(20)])
    trainer: Any = trl.GRPOTrainer if settings is None else rlvr.GRPOTrainer
    return trainer(model, share_of_digits, args, rows, processing_class=tokenizer, callbacks=[Turn(side, turns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), help="which of: " + ", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=12, help="rollouts per side; the first is a warm-up")
    parser.add_argument("--batch", type=int, default=8, help="completions per step")
    parser.add_argument("--length", type=int, default=16, help="tokens per completion")
    options = parser.parse_args()
    sides = ["stock TRL", *(side for side in options.sides if side != "stock TRL")]
    turns = Turns(sides, options.rounds)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        trainers = [build(side, folder, turns, options) for side in sides]
        with contextlib.redirect_stdout(nowhere):
            threads = [threading.Thread(target=trainer.train) for trainer in trainers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    print(f"{'side':<18} {'median s per rollout and 2 steps':>34} {'against stock, median (quartiles)':>36}")
    for side, seconds in turns.seconds.items():
        ratios = [a / b - 1 for a, b in zip(seconds[1:], turns.seconds["stock TRL"][1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4) if any(ratios) else (0.0, 0.0, 0.0)
        print(f"{side:<18} {median(seconds[1:]):>34.3f} {middle:>+19.1%} ({low:+.1%} to {high:+.1%})")


if __name__ == "__main__":
    main()
