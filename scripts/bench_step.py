"""What a GRPO step takes, with entropy control and without, against stock TRL: all sides in one run.

    OMP_WAIT_POLICY=passive python scripts/bench_step.py --sides "no control" "no skipping" --idle 0.4

Same model, prompts, random numbers, completion lengths and transformers rollouts on every side, and so the same
completions and gradients, until rounding makes a side sample another token: the last column says how far the weights
are apart after the first turn, as a share of the way that stock TRL's have moved. All sides are alive at once and
take turns after each rollout and its two optimizer steps, so that a change of the machine's speed meets all of them;
the order rotates. A turn lasts from the beginning of a rollout to the beginning of the side's next one: logging and
records are in it. Figures are medians over rounds of stock TRL's time over the side's in the same round, with
quartiles: of the whole turn, and of what is left of it without generation, which is the same work on all sides.
--idle: the share of groups whose rewards are all equal, as they are where a prompt is too easy or too hard.
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
    "no skipping": {"skip_idle_sequences": False},
    "TRL's head": {"use_trl_head": True},
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
        self.seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}  # whole, generation
        self._next = 0
        self.started = threading.Barrier(len(sides))  # starting draws random numbers, which all sides share
        self._change = threading.Condition()

    def wait(self, side: str) -> None:
        with self._change:
            self._change.wait_for(lambda: self._next >= len(self.order) or self.order[self._next] == side)

    def done(self, side: str, whole: float, generation: float) -> None:
        with self._change:
            self.seconds[side].append((whole, generation))
            self._next += 1
            self._change.notify_all()


class Turn(TrainerCallback):
    """Waits for the side's turn before each rollout; a rollout serves two optimizer steps."""

    def __init__(self, side: str, turns: Turns) -> None:
        self.side, self.turns = side, turns
        self._began: float | None = None
        self._generation = 0.0
        self._rounds = 0
        self.first: dict[str, torch.Tensor] = {}  # the weights after the first turn

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % 2 == 0:
            self._end()
            if state.global_step == 2:
                self.first = {name: p.detach().clone() for name, p in model.named_parameters()}
            if state.global_step == 0:
                self.turns.started.wait()
            self.turns.wait(self.side)
            self._rounds += 1
            torch.manual_seed(self._rounds)  # the same completions on all sides
            self._began, self._generation = time.perf_counter(), 0.0

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._began is not None:
            self.turns.done(self.side, time.perf_counter() - self._began, self._generation)

    def timed(self, generate: Any) -> Any:
        """The trainer's generation, with its time kept."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation += time.perf_counter() - began

        return call


class ShareOfDigits:
    """The reward, but for the first `idle` of the completions, which all get the same."""

    __name__ = "share_of_digits"

    def __init__(self, idle: float) -> None:
        self.idle = idle

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        constant = round(self.idle * len(completions))
        return [
            0.5 if i < constant else sum(c.isdigit() for c in text) / max(1, len(text))
            for i, text in enumerate(completions)
        ]


def build(side: str, folder: str, turns: Turns, options: argparse.Namespace) -> Any:
    """The side's trainer, ready to train for all rounds."""
    settings = SIDES[side]
    config: Any = trl.GRPOConfig if settings is None else rlvr.GRPOConfig
    args = config(
        output_dir=f"{folder}/{side}",
        per_device_train_batch_size=options.batch,
        num_generations=options.group,
        num_iterations=2,
        max_completion_length=options.length,
        generation_kwargs={"min_new_tokens": options.length},
        max_steps=options.rounds * 2,
        learning_rate=1e-3,
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
    turn = Turn(side, turns)
    one = trainer(model, ShareOfDigits(options.idle), args, rows, processing_class=tokenizer, callbacks=[turn])
    one._generate = turn.timed(one._generate)
    one.turn = turn
    return one


def distance(mine: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """How far weights are from stock TRL's, as a share of the way that those have moved."""
    apart = sum(float((mine[name] - x).square().sum()) for name, x in stock.items())
    moved = sum(float((start[name] - x).square().sum()) for name, x in stock.items())
    return (apart / moved) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), help="which of: " + ", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=12, help="rollouts per side; the first is a warm-up")
    parser.add_argument("--batch", type=int, default=8, help="completions per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--idle", type=float, default=0.0, help="share of groups with equal rewards")
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
        start = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).state_dict()
        apart = [distance(trainer.turn.first, trainers[0].turn.first, start) for trainer in trainers]
    ratios = f"{'times as fast as stock':<24} {'without generation':<24}"
    print(f"{'side':<18} {'s per turn':>10} {'generation':>10}  {ratios} apart")
    reference = turns.seconds["stock TRL"][1:]
    for (side, seconds), far in zip(turns.seconds.items(), apart, strict=True):
        mine = seconds[1:]
        whole = [a[0] / b[0] for a, b in zip(reference, mine, strict=True)]
        rest = [(a[0] - a[1]) / (b[0] - b[1]) for a, b in zip(reference, mine, strict=True)]
        print(
            f"{side:<18} {median(w for w, _ in mine):>10.2f} {median(g for _, g in mine):>10.2f}  "
            f"{spread(whole):<24} {spread(rest):<24} {far:.1e}"
        )


def spread(ratios: list[float]) -> str:
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
