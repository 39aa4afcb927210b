"""The one shape every source of rows is brought into, and the reading of files and hub datasets into it."""

import glob
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError
from rlvr.tasks.names import FILE_FORMATS, Source

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "ground_truth")
VERL_ANSWER = "reward_model.ground_truth"


@dataclass(frozen=True, slots=True)
class Row:
    """One problem. `messages` is the conversation it came as, if it came as one; `question` its last user message."""

    question: str
    answer: str
    messages: list[dict[str, str]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes two rows the same problem."""
        return self.question if self.messages is None else json.dumps([m["content"] for m in self.messages])


def read_dataset(source: Source, data_files: str | None, split: str) -> Any:
    """The `datasets.Dataset` of one split. Raises: ConfigError when a file is missing or the data cannot be loaded."""
    import datasets

    path = data_files or (source.name if source.kind == "file" else None)
    label = "data_files" if data_files else "task"
    try:
        if path is None:
            return datasets.load_dataset(source.name, source.subset, split=split)
        paths = sorted(glob.glob(str(Path(path).expanduser())))
        suffix = Path(path).suffix.lower()
        if suffix not in FILE_FORMATS:
            raise ConfigError(f"{label}={path!r} is not a file of a known type: use one of {', '.join(FILE_FORMATS)}")
        if not paths:
            raise ConfigError(
                f"{label}={path!r} names no file: fix the path (the working directory is {str(Path.cwd())!r})"
            )
        return datasets.load_dataset(FILE_FORMATS[suffix], data_files=paths, split="train")
    except ConfigError:
        raise
    except Exception as error:  # datasets raises many types, all of which mean that there is no data
        where = path or f"{source.name} (split {split!r})"
        hint = "" if path else "; without a network, give data_files a local copy"
        detail = (_broken_json(paths) if path else None) or _reason(error)
        raise ConfigError(f"{label}={where!r} cannot be loaded: {detail}{hint}") from error


def _reason(error: BaseException) -> str:
    """What went wrong first: datasets wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _broken_json(paths: Iterable[str]) -> str | None:
    """The first place in JSON files that is no row, in words."""
    for path in paths:
        if FILE_FORMATS[Path(path).suffix.lower()] != "json":
            continue
        content = Path(path).read_bytes()
        if not content.strip():
            return f"{path!r} is empty"
        whole = content.lstrip().startswith(b"[")  # one list of rows, or a row per line
        for number, text in enumerate([content] if whole else content.splitlines(), 1):
            try:
                fits = not text.strip() or isinstance(json.loads(text), list if whole else dict)
            except ValueError as error:
                place, why = ("", error) if whole else (f" line {number}", getattr(error, "msg", error))
                return f"{path!r}{place} is not JSON ({why}): fix or remove it"
            if not fits:
                return f"{path!r} line {number} is no mapping of columns: fix or remove it"
    return None


def choose_columns(names: Iterable[str], prompt: str | None, answer: str | None, verl: bool) -> tuple[str, str]:
    """The columns of prompt and answer: as asked, or found by name. Raises: ConfigError listing those present."""
    present = list(names)
    if prompt is None:
        prompt = next((name for name in PROMPT_COLUMNS if name in present), None)
    if answer is None:
        answer = VERL_ANSWER if verl else next((name for name in ANSWER_COLUMNS if name in present), None)
    for field_name, value, tried in (
        ("prompt_column", prompt, PROMPT_COLUMNS),
        ("answer_column", answer, ANSWER_COLUMNS),
    ):
        if value is None:
            raise ConfigError(
                f"{field_name}=None: no column is named {' or '.join(tried)}; columns present: {', '.join(present)}"
            )
        if value not in present and value.partition(".")[0] not in present:
            raise ConfigError(f"{field_name}={value!r} is not a column; columns present: {', '.join(present)}")
    assert prompt is not None and answer is not None
    return prompt, answer


def to_rows(
    dataset: Any, prompt: str, answer: str, clean: Callable[[str], str], keep: bool, where: str
) -> tuple[list[Row], int]:
    """Rows with distinct problems (the first of each), and how many rows repeated one.

    keep: whether the other columns come along, for a user's verifier.   where: file or split, for messages.
    Raises: ConfigError for no rows at all, for a row that is not what it should be, or for empty prompts or answers
    (how many, and the first of them). Rows are counted from 1.
    """
    needed = {name if name in dataset.column_names else name.partition(".")[0] for name in (prompt, answer)}
    wanted = dataset.column_names if keep else sorted(needed)
    found: dict[str, Row] = {}
    bad: dict[str, list[int]] = {"prompt_column": [], "answer_column": []}
    for number, record in _numbered(dataset.select_columns(wanted), where):
        try:
            row = _to_row(record, prompt, answer, clean, keep)
        except ConfigError as error:
            raise ConfigError(f"{error}, in row {number} of {where}: fix or remove it") from None
        if not row.question.strip():
            bad["prompt_column"].append(number)
        elif not row.answer.strip():
            bad["answer_column"].append(number)
        else:
            found.setdefault(row.key, row)
    for (field_name, rows), column in zip(bad.items(), (prompt, answer), strict=True):
        if rows:
            raise ConfigError(
                f"{field_name}={column!r} is empty in {len(rows)} of {len(dataset)} rows, the first is row {rows[0]} "
                f"of {where}: fix or remove them"
            )
    if not found:
        raise ConfigError(f"prompt_column={prompt!r}: {where} has no rows")
    return list(found.values()), len(dataset) - len(found)


def _numbered(dataset: Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Its rows, counted from 1. datasets decodes some of their values only now."""
    number = 0
    try:
        for number, record in enumerate(dataset, 1):
            yield number, record
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"row {number + 1} of {where} cannot be read: {_reason(error)}") from error


def _to_row(record: dict[str, Any], prompt: str, answer: str, clean: Callable[[str], str], keep: bool) -> Row:
    asked, expected = _pick(record, prompt), _pick(record, answer)
    if isinstance(expected, (list, dict)):
        raise ConfigError(f"answer_column={answer!r} holds a {type(expected).__name__}, not one answer")
    missing = expected is None or (isinstance(expected, float) and math.isnan(expected))
    text = "" if missing else clean(str(expected))
    columns = {k: v for k, v in record.items() if k != "prompt"} if keep else {}
    if asked is None or isinstance(asked, str):
        return Row(asked or "", text, None, columns)
    if not isinstance(asked, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in asked):
        raise ConfigError(f"prompt_column={prompt!r} holds neither text nor a list of {{role, content}}")
    messages = [{"role": m["role"], "content": m["content"] or ""} for m in asked]
    for message in messages:
        if not isinstance(message["content"], str):
            raise ConfigError(f"prompt_column={prompt!r} has a message whose content is no text")
    if messages and messages[-1]["role"] != "user":
        raise ConfigError(
            f"prompt_column={prompt!r} ends with a message of the role {messages[-1]['role']!r}, not user"
        )
    return Row(messages[-1]["content"] if messages else "", text, messages, columns)


def _pick(record: dict[str, Any], column: str) -> Any:
    """A column's value; a.b reaches into the struct a."""
    value: Any = record
    for part in [column] if column in record else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
