"""Stages of a run: which tasks give the prompts of which optimizer steps, and in which shares."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlvr.errors import ConfigError, unknown

if TYPE_CHECKING:
    from rlvr.tasks.config import TaskConfig

RUN_WIDE = (
    "verifier_timeout",
    "verifier_workers",
    "verifier_limits",
)  # of the one pool of processes that judges all tasks


@dataclass(frozen=True, slots=True)
class Part:
    """A task of a stage.   domain: its name.   share: of the stage's prompts, in (0, 1]; those of a stage sum to 1.

    where: its place in the settings, such as `stages[1].tasks[0]`, for messages.
    """

    domain: str
    share: float
    task: "TaskConfig"
    where: str


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` optimizer steps in a row on prompts of `parts`."""

    steps: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Entries:
    """Parts from the entries of `stages`.   make: TaskConfig.   defaults: the settings that stand beside `stages`."""

    make: "Callable[..., TaskConfig]"
    defaults: Mapping[str, Any]

    def part(self, where: str, entry: Any, own: tuple[str, ...]) -> Part:
        """own: keys that an entry may have besides the settings of a task."""
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}={entry!r} must be a mapping, e.g. {{task: gsm8k}}")
        for name in entry:
            if name in RUN_WIDE:
                raise ConfigError(f"{where}.{name}={entry[name]!r} concerns all tasks: set {name} beside stages")
            if name not in self.defaults and name not in own:
                raise unknown(f"{where} key", str(name), {*self.defaults, *own} - {*RUN_WIDE})
        settings = dict(entry)
        domain, share = settings.pop("domain", settings.get("task")), settings.pop("share", 1.0)
        for name, value in (("task", settings.get("task")), ("domain", domain)):
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where}.{name}={value!r} must be a name")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
            raise ConfigError(f"{where}.share={share!r} must be a number above 0, relative to the other tasks' shares")
        try:
            return Part(domain, share, self.make(**{**self.defaults, **settings}), where)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None


def parse_stages(stages: Any, entries: Entries) -> tuple[Stage, ...]:
    """The stages that a list, or its JSON text, describes. A name is one domain, with equal settings in all stages.

    Raises: ConfigError naming the place, such as `stages[1].tasks[0].task_kwargs`.
    """
    if isinstance(stages, str):
        try:
            stages = json.loads(stages)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f'stages={stages!r} is not JSON ({error}): write e.g. \'[{{"steps": 100, "task": "gsm8k"}}]\''
            ) from None
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"stages={stages!r} must be a list of mappings, e.g. [{{steps: 100, task: gsm8k}}]")
    parsed = tuple(_stage(f"stages[{i}]", stage, entries) for i, stage in enumerate(stages))
    first: dict[str, Part] = {}
    for part in (part for stage in parsed for part in stage.parts):
        same = first.setdefault(part.domain, part)
        if part.task != same.task:
            raise ConfigError(
                f"{part.where}.domain={part.domain!r} is also the name of {same.where}, whose settings differ: "
                "give one of them a domain of its own"
            )
    return parsed


def _stage(where: str, stage: Any, entries: Entries) -> Stage:
    if not isinstance(stage, Mapping):
        raise ConfigError(f"{where}={stage!r} must be a mapping, e.g. {{steps: 100, task: gsm8k}}")
    settings = dict(stage)
    steps = settings.pop("steps", None)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{where}.steps={steps!r} must be an integer of at least 1: the stage's optimizer steps")
    if "tasks" not in settings:
        return Stage(steps, (entries.part(where, settings, ("domain",)),))
    tasks = settings.pop("tasks")
    for name in settings:
        raise ConfigError(f"{where}.{name} stands beside tasks: put it into the entries of {where}.tasks")
    if not isinstance(tasks, list) or not tasks:
        raise ConfigError(f"{where}.tasks={tasks!r} must be a list of mappings, e.g. [{{task: gsm8k, share: 0.5}}]")
    parts = [entries.part(f"{where}.tasks[{i}]", task, ("domain", "share")) for i, task in enumerate(tasks)]
    names = [part.domain for part in parts]
    for part in parts:
        if names.count(part.domain) > 1:
            raise ConfigError(f"{part.where}.domain={part.domain!r} is twice in {where}: add up their shares")
    total = sum(part.share for part in parts)
    return Stage(steps, tuple(replace(part, share=part.share / total) for part in parts))
