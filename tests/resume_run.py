"""A training run that may be killed at a named moment; started by test_resume_exact.py in a process of its own."""

import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import rlvr
from rlvr.monitor import recorder
from rlvr.trainers import checkpoints, resuming

KINDS = {"grpo": rlvr.GRPOTrainer, "ppo": rlvr.PPOTrainer}
LENGTH = 6


def odd_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


def train(kind: str, model_dir: str, out: str, settings: dict[str, Any], moment: str = "", at: int = 0) -> None:
    """Go on from the newest checkpoint, if there is one, to the end; or kill this process the `at`th time that
    `moment` comes.
    """
    torch.set_num_threads(1)
    random.seed(os.getpid())  # nothing may depend on where the global generators stood
    one = trainer(kind, model_dir, out, **settings)
    if moment:
        MOMENTS[moment](one, at)
    one.train(resume_from_checkpoint="auto")
    one.export(f"{out}/model")
    one.close()


def trainer(kind: str, model_dir: str, out: str, **settings: Any) -> Any:
    """Real sampling by transformers, AdamW, 5 rollouts per epoch."""
    cls = KINDS[kind]
    args = cls.config_class(
        output_dir=out,
        **{
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "steps",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 3,
            "model_init_kwargs": {"dtype": "float32"},
            **settings,
        },
    )
    prompts = args.generation_batch_size // args.num_generations
    rows = Dataset.from_list([{"prompt": f"{n}+{7 * n}="} for n in range(5 * prompts + 1)])
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    heldout = rows.select(range(2)) if args.eval_strategy != "no" else None
    one = cls(model_dir, odd_share, args, rows, heldout, processing_class=tokenizer)
    if args.load_best_model_at_end:  # a reward that shrinks, so that the first checkpoint is the best
        measure = one.evaluate
        one.evaluate = lambda *a, **k: {**measure(*a, **k), "eval_heldout/reward": -float(one.state.global_step)}
    return one


class Bomb:
    """Kills the process at its `at`th call, before or after what it stands for."""

    def __init__(self, function: Any, at: int, after: bool = False) -> None:
        self.function, self.left, self.after = function, at, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            die()
        result = self.function(*args, **kwargs)
        if self.left == 0:
            die()
        return result


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def method(name: str, after: bool = False) -> Any:
    """A kill in a method of the trainer."""

    def arm(one: Any, at: int) -> None:
        setattr(one, name, Bomb(getattr(one, name), at, after))

    return arm


def in_module(module: Any, name: str, after: bool = False) -> Any:
    def arm(one: Any, at: int) -> None:
        setattr(module, name, Bomb(getattr(module, name), at, after))

    return arm


def while_generating(one: Any, at: int) -> None:
    """After some tokens of a rollout, so that random numbers have been drawn."""
    one.model.prepare_inputs_for_generation = Bomb(one.model.prepare_inputs_for_generation, at)


def while_deleting(one: Any, at: int) -> None:
    """After the first file of an old checkpoint."""
    delete, count = shutil.rmtree, Bomb(lambda: None, at)

    def rmtree(folder: Path, **options: Any) -> None:
        if folder.exists() and folder.name.startswith("discarded"):
            next(path for path in folder.rglob("*") if path.is_file()).unlink()
            count()
        delete(folder, **options)

    checkpoints.shutil.rmtree = rmtree


def disk_full(name: str, room: int) -> Any:
    """From the `at`th call of a method on, no file may grow beyond `room` bytes: a real error of the kernel."""

    def arm(one: Any, at: int) -> None:
        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        method, calls = getattr(one, name), itertools.count(1)
        setattr(one, name, lambda *a, **k: (fill() if next(calls) == at else None, method(*a, **k))[1])

    return arm


MOMENTS = {
    "generating": while_generating,
    "scoring": method("_calculate_rewards", after=True),
    "accumulating": method("_compute_loss", after=True),
    "before the optimizer steps": method("close_step", after=True),
    "weights written": method("_save_optimizer_and_scheduler"),
    "optimizer written": method("_save_rng_state"),
    "checkpoint written": in_module(checkpoints, "_sync"),
    "checkpoint named": in_module(resuming, "rotate"),
    "deleting an old one": while_deleting,
    "recording": in_module(recorder, "append"),
    "disk full for a checkpoint": disk_full("_save_checkpoint", 50_000),  # of 100 kB and more
    "disk full for its optimizer": disk_full("_save_optimizer_and_scheduler", 150_000),
    "disk full for records": disk_full("_compute_loss", 2_000),
}


def rank_of(one: Any) -> int:
    return int(one.accelerator.process_index)


def main(kind: str, model_dir: str, out: str, settings: str, rank: str, moment: str, at: str) -> None:
    """`train` as one of several processes; one of them, `rank`, meets the moment. `poison`: NaN in its loss then."""
    torch.set_num_threads(1)
    one = trainer(kind, model_dir, out, **json.loads(settings))
    mine = one.accelerator.process_index == int(rank)
    if moment == "poison":
        compute = one._compute_loss
        factor = lambda: math.nan if mine and one.state.global_step + 1 == int(at) else 1.0  # noqa: E731
        one._compute_loss = lambda *arguments: compute(*arguments) * factor()
    elif moment and mine:
        MOMENTS[moment](one, int(at))
    one.train(resume_from_checkpoint="auto")
    one.export(f"{out}/model")
    if one.args.load_best_model_at_end:
        torch.save(sum(p.detach().double().sum() for p in one.model.parameters()), f"{out}/sum-{rank_of(one)}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
