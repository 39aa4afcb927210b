"""load_task: a TaskConfig becomes two disjoint datasets and the reward function that judges them."""

import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlvr.errors import ConfigError
from rlvr.rewards import VerifierReward
from rlvr.tasks.config import TaskConfig
from rlvr.tasks.gym import generate
from rlvr.tasks.names import Source, resolve
from rlvr.tasks.prompts import PromptFormat, choose_format
from rlvr.tasks.rows import Row, choose_columns, read_dataset, to_rows
from rlvr.tasks.schedule import Stage
from rlvr.tasks.stages import join
from rlvr.verifier_pool import VerifierPool
from rlvr.verifiers import import_verifier

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

GYM_TRAIN_SIZE = 2000
RESERVED_COLUMNS = frozenset(
    {
        "prompts",
        "completions",
        "completion",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
    }
)


@dataclass(frozen=True)
class Task:
    """A task ready for a trainer.

    train, heldout: columns `prompt` (str or list of messages), `question` (str), `answer` (str, "" for a generated
    puzzle without a single reference answer) and what the verifier needs besides. No question is in both.
    reward: TRL's reward-function signature. describe: one line for the run's header.
    schedule: which prompts are trained on when; then train has the columns `stage` (its number) and `domain` (str),
    and heldout has `domain`. Empty for a task without stages.
    """

    name: str
    train: "datasets.Dataset"
    heldout: "datasets.Dataset | None"
    reward: Callable[..., list[float | None]]
    describe: str
    schedule: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """The rows of one task, and how they are judged: verify and kwargs of a VerifierPool, stop of a VerifierReward."""

    train: "datasets.Dataset"
    heldout: "datasets.Dataset | None"
    verify: str
    kwargs: dict[str, Any]
    stop: str | None
    describe: str
    note: str


@dataclass(frozen=True, slots=True)
class _Split:
    """Rows with distinct problems throughout: solved examples, held-out, train."""

    shots: list[Row]
    heldout: list[Row]
    train: list[Row]
    note: str = ""


def load_task(config: TaskConfig) -> Task:
    """Load or generate the rows of a task, or of all tasks of its stages, and start nothing: verifier processes start
    at the first reward.

    The same config gives the same rows in every process. Held-out rows and examples do not depend on `train_size`.
    Raises: ConfigError for missing columns, empty data, empty prompts or answers, or too few distinct problems.
    """
    judges = f"{config.verifier_timeout:g} s, {config.verifier_workers} processes per rank"
    if config.schedule:
        joined = join(config.schedule, _load_domains(config.schedule))
        reward = _reward(config, "by_domain", {"domains": joined.verifiers}, joined.columns, stop=None)
        describe = f"{joined.describe}; {judges}"
        return Task("stages", joined.train, joined.heldout, reward, describe, config.schedule)
    task = _load(config)
    columns = [name for name in task.train.column_names if name != "prompt"]
    reward = _reward(config, task.verify, task.kwargs, columns, task.stop)
    describe = f"{task.describe}, {judges}" + (f"; {task.note}" if task.note else "")
    return Task(name=config.task, train=task.train, heldout=task.heldout, reward=reward, describe=describe)


def _reward(
    config: TaskConfig, verify: str, kwargs: dict[str, Any], columns: Sequence[str], stop: str | None
) -> VerifierReward:
    pool = VerifierPool(verify, config.verifier_workers, config.verifier_timeout, kwargs, config.limits)
    return VerifierReward(pool, columns, stop)


def _load_domains(schedule: Sequence[Stage]) -> dict[str, LoadedTask]:
    """Each task of the schedule once, by domain."""
    loaded: dict[str, LoadedTask] = {}
    for part in (part for stage in schedule for part in stage.parts if part.domain not in loaded):
        try:
            loaded[part.domain] = _load(part.task)
        except ConfigError as error:
            raise ConfigError(f"{part.where}.{error}") from error
    return loaded


def _load(config: TaskConfig) -> LoadedTask:
    source = resolve(config.task)
    verifier = config.reward
    if verifier == "auto":
        verifier = "reasoning_gym" if source.kind == "gym" else "math_verify"
    split = _gym_split(config, source, verifier) if source.kind == "gym" else _data_split(config, source)
    everything = [*split.shots, *split.heldout, *split.train]
    layout = choose_format(config, verifier, any(row.messages is not None for row in everything))
    train = _dataset(split.train, split.shots, layout)
    if ":" in config.reward:
        import_verifier(config.reward, train.column_names)
        _check_sendable(config, train[0])
    kwargs = {}
    if verifier == "reasoning_gym":
        kwargs = {"task": source.name, "task_kwargs": config.task_kwargs, "binary": config.binary_reward}
    if split.note:
        logger.warning("task %s: %s", config.task, split.note)
    style = "chat" if layout.chat else "plain"
    return LoadedTask(
        train=train,
        heldout=_dataset(split.heldout, split.shots, layout) if split.heldout else None,
        verify=verifier,
        kwargs=kwargs,
        stop=layout.stop if config.num_shots else None,
        describe=f"{config.task}: {len(split.train)} train and {len(split.heldout)} held-out {style} prompts, "
        f"{len(split.shots)} shots; verifier {verifier}",
        note=split.note,
    )


def _gym_split(config: TaskConfig, source: Source, verifier: str) -> _Split:
    assert isinstance(config.task_kwargs, dict)
    aside = config.num_shots + config.heldout_size
    wanted = aside + (config.train_size or GYM_TRAIN_SIZE)
    rows = generate(source.name, config.task_kwargs, config.task_seed, wanted)
    unanswered = sum(not row.answer for row in rows)
    if unanswered and verifier == "math_verify":
        raise ConfigError(
            f"reward='math_verify': {unanswered} rows of {source.name} have no reference answer: use reward=auto"
        )
    if any(not row.answer for row in rows[: config.num_shots]):
        raise ConfigError(
            f"num_shots={config.num_shots}: {source.name} has rows without a reference answer to show: set it to 0"
        )
    _check_enough(config, len(rows), f"{source.name} with these task_kwargs")
    return _Split(rows[: config.num_shots], rows[config.num_shots : aside], rows[aside:])


def _data_split(config: TaskConfig, source: Source) -> _Split:
    local = config.data_files is not None or source.kind == "file"
    heldout_name = None if local or not config.heldout_size else (config.heldout_split or source.heldout_split)
    split_name = config.task_split or source.split
    rows, repeated = _read(config, source, split_name)
    notes = [f"{repeated} rows repeat an earlier problem and are left out"] if repeated else []
    random.Random(f"{config.task_seed}").shuffle(rows)
    separate: list[Row] = []
    if heldout_name is not None and heldout_name != split_name:
        separate, _ = _read(config, source, heldout_name)
        random.Random(f"{config.task_seed}").shuffle(separate)
        if len(separate) < config.heldout_size:
            raise ConfigError(
                f"heldout_size={config.heldout_size}: split {heldout_name!r} has {len(separate)} distinct problems: "
                "lower it"
            )
        separate = separate[: config.heldout_size]
        held = {row.key for row in separate}
        kept = [row for row in rows if row.key not in held]
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept)} train rows are held-out problems and are left out")
        rows = kept
    _check_enough(config, len(rows) + len(separate), config.data_files or source.name)
    shots, rest = rows[: config.num_shots], rows[config.num_shots :]
    heldout = separate or rest[: config.heldout_size]
    train = (rest if separate else rest[config.heldout_size :])[: config.train_size]
    return _Split(shots, heldout, train, "; ".join(notes))


def _read(config: TaskConfig, source: Source, split: str) -> tuple[list[Row], int]:
    dataset = read_dataset(source, config.data_files, split)
    nested = dataset.features.get("reward_model")
    verl = isinstance(nested, dict) and "ground_truth" in nested
    prompt, answer = choose_columns(dataset.column_names, config.prompt_column, config.answer_column, verl)
    own = ":" in config.reward
    clash = sorted(RESERVED_COLUMNS & set(dataset.column_names)) if own else []
    if clash:
        raise ConfigError(
            f"task={config.task!r} has columns named {', '.join(clash)}, which the trainer passes itself: rename them"
        )
    local = config.data_files or (source.name if source.kind == "file" else None)
    where = repr(local) if local else f"{source.name}, split {split!r}"
    return to_rows(dataset, prompt, answer, source.clean_answer, own, where)


def _check_enough(config: TaskConfig, available: int, what: str) -> None:
    """Raises ConfigError unless shots, held-out and train rows can all be distinct."""
    train = config.train_size or 1
    needed = train + config.heldout_size + config.num_shots
    if available < needed:
        most = available - config.heldout_size - config.num_shots
        room = f"train_size can be {most} at most" if most > 0 else "lower heldout_size or num_shots"
        raise ConfigError(
            f"train_size={config.train_size} with heldout_size={config.heldout_size} and num_shots={config.num_shots} "
            f"needs {needed} distinct problems, but {what} has {available}: {room}"
        )


def _check_sendable(config: TaskConfig, row: dict[str, Any]) -> None:
    """Raises ConfigError for a column whose values cannot be sent to a verifier process as JSON."""
    for name, value in row.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ConfigError(f"task={config.task!r}: column {name!r} cannot be sent to a verifier: {error}") from None


def _dataset(rows: Sequence[Row], shots: Sequence[Row], layout: PromptFormat) -> "datasets.Dataset":
    import datasets

    records: list[dict[str, Any]] = [
        {**row.columns, "prompt": layout.build(row, shots), "question": row.question, "answer": row.answer}
        for row in rows
    ]
    return datasets.Dataset.from_list(records)
