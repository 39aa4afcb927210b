"""From the name of a task to where its rows come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlvr.errors import ConfigError, unknown

FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
GYM_PREFIX = "reasoning_gym:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where rows come from: reasoning-gym (`name` its task), a file (`name` its path) or the hub (`name` a repo)."""

    kind: Literal["gym", "file", "hub"]
    name: str
    subset: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    clean_answer: Callable[[str], str] = str


def final_number(solution: str) -> str:
    """GSM8K: what follows the last "####", without thousands separators; all of it when there is no mark."""
    return solution.rpartition("####")[2].strip().replace(",", "")


NAMED = {
    "gsm8k": Source(kind="hub", name="openai/gsm8k", subset="main", heldout_split="test", clean_answer=final_number),
    "math_500": Source(kind="hub", name="HuggingFaceH4/MATH-500", split="test"),
    "dapo_math_17k": Source(kind="hub", name="BytedTsinghua-SIA/DAPO-Math-17k"),
}


def gym_names() -> set[str]:
    """The names of all reasoning-gym tasks (imports reasoning_gym: 1 to 2 s)."""
    import reasoning_gym  # noqa: F401  (its import fills the table)
    from reasoning_gym.factory import DATASETS

    return set(DATASETS)


def gym_config_class(name: str) -> Any:
    """The configuration dataclass of a reasoning-gym task."""
    from reasoning_gym.factory import DATASETS

    return DATASETS[name][1]


def resolve(task: str) -> Source:
    """The source that `task` names. Raises: ConfigError with the nearest known names."""
    if task in NAMED:
        return NAMED[task]
    suffix = Path(task).suffix.lower()
    if suffix in FILE_FORMATS:
        return Source(kind="file", name=task)
    bare = task.removeprefix(GYM_PREFIX)
    if "/" in bare:
        if task.startswith(("/", ".", "~")) or task.count("/") != 1 or Path(task).exists():
            raise ConfigError(f"task={task!r} is not a file of a known type: use one of {', '.join(FILE_FORMATS)}")
        return Source(kind="hub", name=task)
    names = gym_names()
    if bare in names:
        return Source(kind="gym", name=bare)
    raise unknown("task", task, names if task.startswith(GYM_PREFIX) else names | NAMED.keys())
