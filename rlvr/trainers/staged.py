"""A run in stages: each optimizer step on the prompts of its stage, whose domains are mixed by their shares."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from rlvr.errors import ConfigError
from rlvr.tasks.schedule import Stage
from rlvr.trainers.config import PolicyConfig

RowsByPart = Mapping[tuple[int, str], Sequence[int]]  # indices of the training rows by (stage, domain)


class Stages:
    """The prompts of a schedule in their order, for one run: one optimizer, one set of records, one pass over all.

    schedule: `Task.schedule`.   args: max_steps is set to the steps of all stages together.   train_dataset: with the
    columns `stage` and `domain`, as `load_task` gives them.
    Raises: ConfigError for stages that are no whole rollouts, or have too few prompts for one.
    Ref: Ring-lite, arXiv 2506.14731, Table 4: math before code and science, against all at once.
    """

    def __init__(self, schedule: Sequence[Stage], args: PolicyConfig, train_dataset: Dataset) -> None:
        args.max_steps = total_steps(schedule, args.max_steps, args.updates_per_rollout)
        self._per_rollout = args.generation_batch_size // args.num_generations
        rows = rows_by_part(train_dataset["stage"], train_dataset["domain"])
        check_rows(schedule, rows, self._per_rollout)
        per_stage = [round(stage.steps / args.updates_per_rollout) * self._per_rollout for stage in schedule]
        self._prompts = prompt_order(schedule, rows, per_stage, args.seed)
        self._ends = list(accumulate(stage.steps for stage in schedule))

    def sampler(self, trainer: Any) -> "StagedSampler":
        """In place of TRL's, for a trainer of `args`."""
        repeats = trainer.num_iterations * trainer.args.steps_per_generation
        return StagedSampler(
            self._prompts, group=trainer.num_generations, per_rollout=self._per_rollout, repeats=repeats
        )

    def at(self, step: int) -> int:
        """The stage of an optimizer step, both counted from 0."""
        return sum(end <= step for end in self._ends)


class StagedSampler(Sampler[int]):
    """TRL's RepeatSampler over `prompts` (row indices) in their order, so that a group stays whole and each rollout is
    given once per micro-batch that trains on it. It has no state: a resumed run skips what is trained already.

    group: completions per prompt.   per_rollout: prompts.   repeats: micro-batches per rollout, passes included.
    """

    def __init__(self, prompts: Sequence[int], *, group: int, per_rollout: int, repeats: int) -> None:
        self._prompts = prompts
        self._places = RepeatSampler(prompts, group, per_rollout, repeats, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return (self._prompts[place] for place in self._places)

    def __len__(self) -> int:
        return len(self._places)


def total_steps(schedule: Sequence[Stage], max_steps: int, updates_per_rollout: float) -> int:
    """The run's optimizer steps. Raises: ConfigError if max_steps says otherwise, or a stage ends within a rollout."""
    unit = max(1, round(updates_per_rollout))
    for number, stage in enumerate(schedule):
        if stage.steps % unit:
            below = stage.steps // unit * unit
            nearest = f"{below} and {below + unit}" if below else str(unit)
            raise ConfigError(
                f"stages[{number}].steps={stage.steps} must be whole rollouts of {unit} optimizer steps: nearest are "
                f"{nearest}"
            )
    total = sum(stage.steps for stage in schedule)
    if max_steps not in (-1, total):
        raise ConfigError(f"max_steps={max_steps}, but the stages have {total} optimizer steps together: remove it")
    return total


def rows_by_part(stages: Sequence[int], domains: Sequence[str]) -> RowsByPart:
    """The indices of the training rows by (stage, domain)."""
    found: dict[tuple[int, str], list[int]] = {}
    for index, key in enumerate(zip(stages, domains, strict=True)):
        found.setdefault(key, []).append(index)
    return found


def check_rows(schedule: Sequence[Stage], rows: RowsByPart, prompts: int) -> None:
    """Raises: ConfigError where a task has fewer prompts than its share of a rollout's."""
    for number, stage in enumerate(schedule):
        for part in stage.parts:
            needed, present = math.ceil(part.share * prompts - 1e-9), len(rows[number, part.domain])
            if present < needed:
                raise ConfigError(
                    f"{part.where}: {part.domain!r} has {present} prompts, its share of a rollout is {needed}: give "
                    "more rows (train_size), or lower its share, per_device_train_batch_size or steps_per_generation"
                )


def prompt_order(schedule: Sequence[Stage], rows: RowsByPart, per_stage: Sequence[int], seed: int) -> list[int]:
    """The row of every prompt of the run, in order.   per_stage: prompts of each stage.

    In a stage the next prompt is of the domain that is furthest behind its share, so that none is ever a whole prompt
    ahead of it; a domain's rows come in passes over all of them, each shuffled anew. A stage's prompts do not depend
    on the other stages.
    """
    order: list[int] = []
    for number, (stage, count) in enumerate(zip(schedule, per_stage, strict=True)):
        passes = [_passes(rows[number, part.domain], f"{seed}/{number}/{part.domain}") for part in stage.parts]
        drawn = [0] * len(stage.parts)
        for so_far in range(1, count + 1):
            behind = [part.share * so_far - n for part, n in zip(stage.parts, drawn, strict=True)]
            chosen = max(range(len(behind)), key=behind.__getitem__)
            drawn[chosen] += 1
            order.append(next(passes[chosen]))
    return order


def _passes(rows: Sequence[int], seed: str) -> Iterator[int]:
    shuffles = random.Random(seed)
    while True:
        yield from shuffles.sample(rows, len(rows))
