"""What the documentation holds: pages, code blocks, commands, links; and how each command is checked."""

import argparse
import contextlib
import os
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml

import rlvr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "docsite"))

import docstrings as docstrings  # noqa: E402
import laboratory as laboratory  # noqa: E402
import methods as methods  # noqa: E402

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "PAPERS")),
]
RECORDS = [ROOT / "LOG.md", ROOT / "CHANGELOG.md"]  # of their day: links are checked, commands are not
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}((?:python|rlvr|accelerate) .*)$", re.MULTILINE)
INLINE = re.compile(r"`((?:rlvr|make|python) [^`\n]+)`")
GENERATED = {ROOT / "docs" / place: text for place, text in methods.pages().items()}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return GENERATED.get(page) or page.read_text()


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text_of(page)) if kind == language]


def commands(page: Path) -> list[str]:
    """The lines of its bash blocks, and commands that stand alone in an indented block."""
    joined = [block.replace("\\\n", " ") for block in blocks(page, "bash")]
    lines = [line for block in joined for line in block.splitlines()]
    lines += INDENTED.findall(text_of(page).replace("\\\n", " "))
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def all_commands() -> Iterator[tuple[str, str]]:
    """(page, command), each command once."""
    seen: set[str] = set()
    for page in [*PAGES, *GENERATED]:
        for line in commands(page):
            if (words := shlex.join(shlex.split(line, comments=True))) not in seen:
                seen.add(words)
                yield name_of(page), line


# ------------------------------------------------------------------------------------------- how a command is checked

STANDS_FOR = {"HOST": "127.0.0.1", "R": "0", "RECIPE.yaml": "recipes/gsm8k_lora.yaml"}


def words_of(line: str) -> list[str]:
    """Of a shell line without comment, loop and leading VARIABLE=value; placeholders are filled in."""
    words = shlex.split(re.sub(r"^while .*?; do (.*?); done", r"\1", line), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return [STANDS_FOR.get(word, word) for word in words]


def check(line: str) -> None:
    """Fails for a command that its program would not understand."""
    words = words_of(line)
    program = Path(words[0]).name
    if program not in PROGRAMS:
        raise AssertionError(f"{line!r}: no check is known for {program}; add one to tests/docs_cases.py")
    PROGRAMS[program](words[1:])


def make(words: Sequence[str]) -> None:
    target, *settings = words
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"
    for setting in settings:
        name, _, value = setting.partition("=")
        assert name == "ARGS"
        given = shlex.split(value)
        if target == "quickstart":
            recipe(["recipes/grpo.py", "--config", "recipes/quickstart.yaml", *given])
        elif target == "test":
            pytest_command(given)
        else:
            script([{"lab": "scripts/entropy_lab.py", "bench": "scripts/bench_step.py"}[target], *given])


def rlvr_command(words: Sequence[str]) -> None:
    from rlvr.cli import _parser
    from rlvr.trainers import checkpoint_choice, planner

    if words[0] == "plan" and "--help" not in words:
        planner._parser().parse_args(planner._checked(words[1:]))
    elif words[0] == "select-checkpoint":
        flags = [word for word in words[1:] if "*" not in word]
        checkpoint_choice._Parser((checkpoint_choice.ChoiceConfig, rlvr_tasks())).parse_args_into_dataclasses(
            flags, return_remaining_strings=True
        )
    elif "--help" not in words:
        _parser().parse_args(words)


def rlvr_tasks() -> Any:
    from rlvr.tasks import TaskConfig

    return TaskConfig


def recipe(words: Sequence[str]) -> None:
    """recipes/*.py with its flags, which are parsed as a run would."""
    from rlvr.trainers.launch import parse_arguments
    from rlvr.trainers.sft import SFTConfig

    script, *flags = words
    assert (ROOT / script).is_file(), script
    config_class = {"ppo.py": rlvr.PPOConfig, "mole_sft.py": SFTConfig}.get(Path(script).name, rlvr.GRPOConfig)
    for i, word in enumerate(flags):
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word
            flags[i] = str(ROOT / word)
    if config_class is SFTConfig and not torch.accelerator.is_available():
        flags += ["--use_cpu", "true"]
    parse_arguments(config_class, flags)


def accelerate(words: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    arguments = launch_command_parser().parse_args([word for word in words[1:] if word != "..."])
    file = yaml.safe_load((ROOT / arguments.config_file).read_text()) if arguments.config_file else {}
    precision = arguments.mixed_precision or file.get("mixed_precision", "no")
    with patch.dict(os.environ, ACCELERATE_MIXED_PRECISION=precision):  # as the launched process has it
        recipe([arguments.training_script, *arguments.training_script_args])


def torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    arguments = get_args_parser().parse_args(words)
    recipe([arguments.training_script, *arguments.training_script_args])


def python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        known = {"pytest": pytest_command, "verl.trainer.main_ppo": verl_overrides}
        known[words[1]](words[2:])
    elif words[0].startswith("recipes/"):
        recipe(words)
    else:
        script(words)


class _Parsed(BaseException):
    """Ends a script as soon as it has read its arguments."""


def script(words: Sequence[str]) -> None:
    """scripts/*.py, run until their arguments are read."""
    path = ROOT / words[0]
    if "ArgumentParser" not in path.read_text():
        assert path.is_file() and len(words) == 1, f"{words[0]} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise _Parsed

    handler = signal.getsignal(signal.SIGTERM)
    with (
        patch.object(argparse.ArgumentParser, "parse_args", parsed),
        patch.object(sys, "argv", list(words)),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        patch.dict(os.environ),
        contextlib.suppress(_Parsed),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as refused:
            raise AssertionError(f"{shlex.join(words)} is refused: {refused}") from None
        finally:
            signal.signal(signal.SIGTERM, handler)


def pytest_command(words: Sequence[str]) -> None:
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).is_file(), word


def verl_overrides(words: Sequence[str]) -> None:
    """Names below `policy_loss` are those of the integration; their values are an objective."""
    from rlvr.integrations.verl import LOSS_MODE, objective

    given = dict(
        word.lstrip("+").removeprefix("actor_rollout_ref.actor.policy_loss.").split("=", 1) for word in words[1:]
    )
    assert given.pop("_target_") == "rlvr.integrations.verl.policy_loss" and given.pop("loss_mode") == LOSS_MODE
    objective(given.pop("surrogate", None), yaml.safe_load(given.pop("controls", "[]")))
    assert not given


def vllm_serve(words: Sequence[str]) -> None:
    """`trl vllm-serve`: its flags are fields of TRL's ScriptArguments."""
    from dataclasses import fields

    from trl.scripts.vllm_serve import ScriptArguments

    assert words[0] == "vllm-serve"
    names = {f.name for f in fields(ScriptArguments)}
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= names


def ignored(words: Sequence[str]) -> None:
    """Not ours, or of the shell."""


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "make": make,
    "rlvr": rlvr_command,
    "accelerate": accelerate,
    "torchrun": torchrun,
    "python": python,
    "pytest": pytest_command,
    "trl": vllm_serve,
    "pip": ignored,
    "pre-commit": ignored,
    "source": ignored,
}


# -------------------------------------------------------------------------------------------------------------- links

LINK = re.compile(r"(!?)\[[^\]\n]*\]\((?!https?:|mailto:)([^)\s#]*)(#[^)\s]*)?\)")


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """(target, anchor) of the links of a page to files of the repository."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))
    for _, target, anchor in LINK.findall(text):
        yield (page.parent / target).resolve() if target else page, anchor.removeprefix("#")


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
