"""Several tasks become one: rows of the same columns, which say their domain and their stage."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlvr.errors import ConfigError
from rlvr.tasks.schedule import Part, Stage

if TYPE_CHECKING:
    import datasets

    from rlvr.tasks.load import LoadedTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The tasks of a schedule as one.   verifiers: of `verifiers.verifier_by_domain`; columns: which it reads."""

    train: "datasets.Dataset"
    heldout: "datasets.Dataset | None"
    verifiers: dict[str, dict[str, Any]]
    columns: tuple[str, ...]
    describe: str


def join(schedule: Sequence[Stage], loaded: Mapping[str, "LoadedTask"]) -> Joined:
    """Training rows stage by stage, held-out rows of all domains, and no held-out question among the training rows.

    A task of two stages has its rows in both.
    Raises: ConfigError where the tasks mix messages and plain text, or where nothing is left to train on.
    """
    import datasets

    parts = {part.domain: part for stage in reversed(schedule) for part in reversed(stage.parts)}
    _check_same_style([parts[name] for name in loaded], loaded)
    heldout = [row for name, task in loaded.items() for row in _rows(task.heldout, domain=name)]
    held = {row["question"] for row in heldout} - {""}  # a conversation may end without a question
    train = []
    for number, stage in enumerate(schedule):
        for part in stage.parts:
            rows = list(_rows(loaded[part.domain].train, domain=part.domain, stage=number))
            kept = [row for row in rows if row["question"] not in held]
            if not kept:
                raise ConfigError(
                    f"{part.where}.task={part.task.task!r}: all its train rows are held out by other tasks"
                )
            if len(kept) < len(rows):
                logger.warning("%s: %d train rows are held out by other tasks", part.where, len(rows) - len(kept))
            train += kept
    return Joined(
        train=datasets.Dataset.from_list(train),
        heldout=datasets.Dataset.from_list(heldout) if heldout else None,
        verifiers={n: {"verify": t.verify, "kwargs": t.kwargs, "stop": t.stop} for n, t in loaded.items()},
        columns=("answer", "domain", "verifier_columns"),
        describe=describe(schedule, loaded),
    )


def describe(schedule: Sequence[Stage], loaded: Mapping[str, "LoadedTask"]) -> str:
    """One line: `2 stages: 300 steps of math; 200 steps of 50 % code, 50 % science; math = ...`."""
    stages = []
    for stage in schedule:
        shares = [
            part.domain if part.share == 1 else f"{100 * part.share:.3g} % {part.domain}" for part in stage.parts
        ]
        stages.append(f"{stage.steps} steps of {', '.join(shares)}")
    tasks = [f"{name} = {task.describe}" + (f"; {task.note}" if task.note else "") for name, task in loaded.items()]
    return f"{len(schedule)} stage(s): " + "; ".join([*stages, *tasks])


def _rows(dataset: "datasets.Dataset | None", **columns: Any) -> Iterator[dict[str, Any]]:
    """Rows of equal columns. What a verifier reads besides the answer is packed: tasks may disagree on its types."""
    for row in dataset or ():
        packed = json.dumps({name: value for name, value in row.items() if name not in ("prompt", "answer")})
        shared = {name: row[name] for name in ("prompt", "question", "answer")}
        yield {**shared, **columns, "verifier_columns": packed}


def _check_same_style(parts: Sequence[Part], loaded: Mapping[str, "LoadedTask"]) -> None:
    """TRL renders a whole batch as conversations or as text, by its first prompt."""
    plain = [isinstance(loaded[part.domain].train[0]["prompt"], str) for part in parts]
    for part, is_plain in zip(parts, plain, strict=True):
        if is_plain != plain[0]:
            raise ConfigError(
                f"{part.where}.chat={part.task.chat}: {'plain text' if is_plain else 'messages'} here and "
                f"{'plain text' if plain[0] else 'messages'} in {parts[0].where}: set chat for both"
            )
