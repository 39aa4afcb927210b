"""How completions are dealt out: TRL's divisibility rules, said with the nearest valid values."""

import math
import os
from typing import TYPE_CHECKING

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig


def check_batches(args: "PolicyConfig") -> None:
    """Before TRL resolves the batch sizes. Raises: ConfigError."""
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_iterations",
        "generation_batch_size",
        "steps_per_generation",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        raise ConfigError("generation_batch_size and steps_per_generation say the same thing twice: set one")
    one_forward, processes = args.per_device_train_batch_size * announced_processes(), announced_processes()
    if args.generation_batch_size is not None:
        unit = math.lcm(one_forward, args.num_generations)
        if args.generation_batch_size % unit:
            raise ConfigError(
                f"generation_batch_size={args.generation_batch_size} must be a multiple of {unit} (whole "
                f"micro-batches of {one_forward} on {processes} process(es) and whole groups of num_generations="
                f"{args.num_generations}): nearest are {_nearest(args.generation_batch_size, unit)}"
            )
        return
    total = completions_per_rollout(args)
    if total % args.num_generations:
        micro_batches = args.steps_per_generation or args.gradient_accumulation_steps
        unit = args.num_generations // math.gcd(args.num_generations, processes * micro_batches)
        raise ConfigError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} gives {total} completions per "
            f"rollout ({processes} process(es), {micro_batches} micro-batches), no whole groups of num_generations"
            f"={args.num_generations}: nearest are {_nearest(args.per_device_train_batch_size, unit)}"
        )


def check_resolved_batches(args: "PolicyConfig") -> None:
    """After TRL has resolved the batch sizes. Raises: ConfigError."""
    at_once, samples = args.per_device_eval_batch_size * args.world_size, args.num_generations_eval
    samples = samples or args.num_generations
    if args.use_vllm and args.vllm_mode == "server" and at_once % samples:
        raise ConfigError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size} gives {at_once} completions at once, "
            f"no whole groups of num_generations_eval={samples}: nearest are {_nearest(at_once, samples)} in all"
        )
    micro_batches = args.num_iterations * args.steps_per_generation
    if micro_batches % args.gradient_accumulation_steps and args.gradient_accumulation_steps % micro_batches:
        raise ConfigError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} and micro-batches per rollout "
            f"{micro_batches} (steps_per_generation * num_iterations): one must divide the other"
        )


def announced_processes() -> int:
    """Processes of the run, as launchers announce them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def completions_per_rollout(args: "PolicyConfig") -> int:
    """Over all processes, also before TRL has resolved the batch sizes."""
    if args.generation_batch_size is not None:
        return int(args.generation_batch_size)
    micro_batches = args.steps_per_generation or args.gradient_accumulation_steps
    return int(args.per_device_train_batch_size * announced_processes() * micro_batches)


def _nearest(value: int, unit: int) -> str:
    """The multiples of unit around value, as text."""
    below = value // unit * unit
    return f"{below} and {below + unit}" if below else str(unit)
