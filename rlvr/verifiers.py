"""Verifiers: functions (completion, answer, **row) -> score. They run in the workers of a VerifierPool, never here.

None of them limits its own time or memory: the pool does. A verifier that cannot judge raises; it never returns 0 for
"I do not know".
"""

import contextlib
import importlib
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from rlvr.child_process import import_path
from rlvr.errors import ConfigError

Verify = Callable[..., Any]

OUTPUT = 1 << 20  # bytes of a program's output that a verifier is shown

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, nested braces included; None when there is none."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i]
    return None


def extract_answer(completion: str, num_lines: int = 1) -> str:
    r"""The answer a completion gives, stripped: what a verifier that wants a bare answer is shown.

    The last <answer>...</answer> if there is one, else the content of the last \boxed{...}, else the first
    `num_lines` lines from the first line that is not blank (what a few-shot plain completion starts with).
    `num_lines` is the number of lines of the reference answer: grids span several. "" when there is nothing.
    """
    tagged = _ANSWER_TAG.findall(completion)
    if tagged:
        return tagged[-1].strip()
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed.strip()
    return "\n".join(completion.strip().splitlines()[:num_lines]).strip()


def encode_entry(value: Any) -> str:
    """JSON that keeps tuples, sets and dict keys that are not strings, so that an entry comes back as it was.

    Raises TypeError for a value of any other type.
    """

    def tag(x: Any) -> Any:
        if isinstance(x, tuple):
            return {"__tuple__": [tag(v) for v in x]}
        if isinstance(x, (set, frozenset)):
            return {"__set__": [tag(v) for v in sorted(x, key=repr)]}
        if isinstance(x, list):
            return [tag(v) for v in x]
        if isinstance(x, dict) and not all(isinstance(k, str) for k in x):
            return {"__pairs__": [[tag(k), tag(v)] for k, v in x.items()]}
        return {k: tag(v) for k, v in x.items()} if isinstance(x, dict) else x

    return json.dumps(tag(value))


def decode_entry(text: str) -> Any:
    """The inverse of `encode_entry`."""

    def untag(x: dict[str, Any]) -> Any:
        if "__tuple__" in x:
            return tuple(x["__tuple__"])
        if "__set__" in x:
            return set(x["__set__"])
        return dict(x["__pairs__"]) if "__pairs__" in x else x

    return json.loads(text, object_hook=untag)


def math_verifier() -> Verify:
    r"""1.0 when math-verify finds the completion's final expression equal to the reference, else 0.0.

    The final expression is the content of <answer> tags if there are any, else whatever math-verify takes for final:
    \boxed{...}, "the answer is ...", the last expression or number. Several boxes count as one set, so guessing twice
    does not pay. Raises ValueError for a reference that math-verify cannot read.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns on every call that its own timeouts are off

    def read(text: str) -> list[Any]:
        wrapped = text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"
        return parse(wrapped, parsing_timeout=None) or parse(text, parsing_timeout=None)

    reference = lru_cache(maxsize=1024)(read)

    def judge(completion: str, answer: str, **_: Any) -> float:
        expected = reference(answer)
        if not expected:
            raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
        tagged = _ANSWER_TAG.findall(completion)
        given = read(tagged[-1].strip()) if tagged else parse(completion, parsing_timeout=None)
        return float(verify(expected, given, timeout_seconds=None))

    judge("\\boxed{\\frac{1}{2}}", "0.5")  # the first call builds the grammar: pay for it before the clock runs
    return judge


def reasoning_gym_verifier(task: str, task_kwargs: dict[str, Any], binary: bool) -> Verify:
    """The `score_answer` of a reasoning-gym task, given `extract_answer(completion)` and the row's `entry`.

    binary: 1.0 iff the score is at least 1, else 0.0. Otherwise the task's own score in [0, 1], which for many tasks
    is above 0 for a wrong answer: for having the right format, or for containing the right one.
    """
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, seed=0, size=1, **task_kwargs)

    def judge(completion: str, answer: str, *, entry: str, **_: Any) -> float:
        rebuilt = decode_entry(entry)
        given = extract_answer(completion, num_lines=max(1, len((rebuilt["answer"] or "").splitlines())))
        score = float(dataset.score_answer(given, rebuilt))
        return float(score >= 1.0) if binary else score

    return judge


def import_verifier(spec: str, columns: Collection[str] | None = None) -> Verify:
    """The function that `module:function` names, called with only the row columns it has parameters for.

    columns: the columns its rows will have, when they are known.
    Raises: ConfigError naming `reward` when it cannot be imported, cannot be called as f(completion, answer), or has
    a further parameter without a default that is none of `columns`.
    """
    module, _, name = spec.partition(":")
    if module == "__main__" or not name:
        raise ConfigError(
            f"reward={spec!r} must be 'module:function' in a module that can be imported: move it to a file"
        )
    added = [entry for entry in import_path() if entry not in sys.path]
    sys.path.extend(added)
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"reward={spec!r} cannot be imported ({type(error).__name__}: {error}): fix the name or the module"
        ) from error
    finally:
        for entry in added:
            sys.path.remove(entry)
    if not callable(function):
        raise ConfigError(
            f"reward={spec!r} is a {type(function).__name__}, not a function: name one f(completion, answer)"
        )
    return _with_its_columns(spec, function, columns)


def _with_its_columns(spec: str, function: Verify, columns: Collection[str] | None) -> Verify:
    """`function` called as f(completion, answer, **those columns of the row that it has parameters for)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin without a signature
        return lambda completion, answer, **row: function(completion, answer)
    extra = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in extra if p.default is p.empty]
    try:
        inspect.signature(function).bind("", "", **dict.fromkeys(required))
    except TypeError as error:
        raise ConfigError(f"reward={spec!r} must accept (completion, answer, **row): {error}") from None
    missing = [name for name in required if columns is not None and name not in columns]
    if missing:
        present = ", ".join(sorted(columns or ()))
        raise ConfigError(f"reward={spec!r} wants the columns {', '.join(missing)}; columns present: {present}")
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in extra}
    return lambda completion, answer, **row: function(
        completion, answer, **{name: value for name, value in row.items() if every or name in names}
    )


def verifier_by_domain(domains: dict[str, dict[str, Any]]) -> Verify:
    """Judges each row as its task does: all tasks of a run in one process.

    domains: the task's {verify, kwargs, stop} by the row's `domain`; a completion is cut where `stop` begins.
    `verifier_columns` of a row is the JSON text of the columns that its own task has besides the answer.
    """
    verifiers = {name: build_verifier(task["verify"], task["kwargs"]) for name, task in domains.items()}

    def judge(completion: str, answer: str, *, domain: str, verifier_columns: str, **_: Any) -> float:
        stop = domains[domain]["stop"]
        judged = completion.split(stop, 1)[0] if stop else completion
        score: float = verifiers[domain](judged, answer, **json.loads(verifier_columns))
        return score

    return judge


BUILTIN: dict[str, Callable[..., Verify]] = {"math_verify": math_verifier, "reasoning_gym": reasoning_gym_verifier}


def build_verifier(name: str, kwargs: dict[str, Any]) -> Verify:
    """A verifier by built-in name and keyword arguments, or by `module:function` (which takes none)."""
    if name == "by_domain":
        return verifier_by_domain(**kwargs)
    return BUILTIN[name](**kwargs) if name in BUILTIN else import_verifier(name)


def run_program(
    source: str, stdin: str = "", timeout: float = 5.0, command: Sequence[str] = (sys.executable, "-I")
) -> "subprocess.CompletedProcess[str]":
    """What a program printed and how it ended: for verifiers of code, whose limits hold for the program, too.

    It runs in a folder and a session of its own, which end with it. One that takes more than `timeout` seconds ends
    with -9 (SIGKILL), so it failed like any other; a verifier's own time must be longer than its programs' together.
    command: what is given the file; a sandbox goes here, e.g. ("bwrap", ..., "python3").
    Returns: at most OUTPUT bytes of stdout and of stderr.   Raises: OSError if `command` cannot be started.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,  # not pipes: their readers would hold what a flood writes
        tempfile.TemporaryFile() as err,
    ):
        path = Path(folder, "program")
        path.write_bytes(source.encode(errors="replace"))
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        started = subprocess.Popen(
            [*command, str(path)], cwd=folder, stdin=given, stdout=out, stderr=err, start_new_session=True
        )
        try:
            started.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            code = started.wait()
        said = [_start_of(stream) for stream in (out, err)]
    return subprocess.CompletedProcess(started.args, code, *said)


def _start_of(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read(OUTPUT).decode(errors="replace")
