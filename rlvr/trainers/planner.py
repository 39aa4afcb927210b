"""`rlvr plan`: reads a model's configuration and a recipe, says what fits."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from rlvr.errors import ConfigError, unknown
from rlvr.planning.settings import HELP, Settings, settings_from
from rlvr.planning.table import describe

MACHINES = ("gpus", "nodes", "gpu_memory", "prompt_length")  # what is no key of a recipe


def plan(words: Sequence[str]) -> str:
    """The plan that the words of a command line ask for. Raises: ConfigError."""
    flags = vars(_parser().parse_args(_checked(words)))
    config = flags.pop("config", None)
    settings = settings_from({} if config is None else read_recipe(config), flags)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rlvr.trainers.model_shape import read_shape  # torch and transformers, after a look at the words

    of_run = ["--config", config or "RECIPE.yaml"]
    for name, value in flags.items():
        if name not in MACHINES and not (name == "critic" and value == "none"):
            of_run += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return describe(read_shape(settings), settings, of_run)


def read_recipe(path: str) -> dict[str, Any]:
    """Raises: ConfigError."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"config={path!r} holds no `key: value` lines")
    return recipe


def _checked(words: Sequence[str]) -> Sequence[str]:
    """Refuse an unknown flag with the nearest names, as a recipe does. Raises: ConfigError."""
    known = {f.name for f in fields(Settings)} | {"model", "config", "help"}
    for word in words:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in known:
            raise unknown("setting", name, known)
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see rlvr plan --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlvr plan",
        usage="rlvr plan (--model NAME_OR_DIR | --config YAML) [--gpus N] [--gpu_memory GIB] [--KEY X ...]",
        description="Say how much GPU memory a run takes by how it is launched, and the simplest launch that fits.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="a recipe, from which the rest is taken")
    for one in fields(Settings):
        names = ["--model", "--model_name_or_path"] if one.name == "model_name_or_path" else [f"--{one.name}"]
        kind = next((t for t in (bool, int, float) if one.type in (t, t | None)), str)
        text = HELP[one.name] + (f" ({one.default})" if one.default not in (None, "") else "")
        options: dict[str, Any] = {"type": _boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        parser.add_argument(*names, dest=one.name, help=text.replace("%", "%%"), metavar="X", **options)
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() == "true"
