"""Which supervised checkpoint to start reinforcement learning from: the one whose entropy leaves it room to explore.

More epochs of supervised fine-tuning leave less entropy, and the reward of RL collapses earlier; Ring-lite reports the
best results from checkpoints of 0.3 to 0.5 nats. Measured here is the entropy of samples of the task, token by token:
what the first steps of RL will see. Ref: arXiv 2506.14731.
"""

import glob
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from rlvr.errors import ConfigError, unknown
from rlvr.tasks import Task, TaskConfig, load_task
from rlvr.trainers.checkpoint_ranking import REASONS, Measurement, Ranked, format_ranking, measure, rank
from rlvr.trainers.checkpoint_sampling import Reader, load_model, read_prompts, sample

# A checkpoint is a directory with one of these pairs.
COMPLETE = (
    ("config.json", "model*.safetensors"),
    ("config.json", "pytorch_model*.bin"),
    ("adapter_config.json", "adapter_model.*"),
)


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """How checkpoints are measured and ranked. Every field is a flag of `rlvr select-checkpoint`.

    Raises: ConfigError naming the field, its value and the fix.
    """

    _argument_group_name: ClassVar[str] = "measurement"

    samples: int = field(default=8, metadata={"help": "Completions per prompt."})
    max_tokens: int = field(default=256, metadata={"help": "Tokens a completion may have."})
    temperature: float = field(default=1.0, metadata={"help": "Of the samples and of the entropy, as RL will use it."})
    stop: str | None = field(default=None, metadata={"help": "Text of one token that ends a completion too."})
    band: list[float] = field(
        default_factory=lambda: [0.3, 0.5],
        metadata={"help": "Lowest and highest good entropy, nats per token; the default is Ring-lite's."},
    )
    pass_reward: float = field(default=1.0, metadata={"help": "Reward from which on a completion counts as correct."})
    batch_size: int = field(
        default=64, metadata={"help": "Completions generated at once; results do not depend on it."}
    )
    seed: int = field(default=0, metadata={"help": "Of the random numbers, which all checkpoints share."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the ranking to as well."})

    def __post_init__(self) -> None:
        for name, low in {"samples": 1, "max_tokens": 1, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be above 0 and finite, e.g. 1.0")
        if not math.isfinite(self.pass_reward):
            raise ConfigError(f"pass_reward={self.pass_reward} must be a finite number, e.g. 1.0")
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] < math.inf:
            shown = " ".join(f"{bound:g}" for bound in self.band)
            raise ConfigError(f"band={shown} must be two numbers, 0 <= low < high in nats, e.g. 0.3 0.5")
        if self.output is not None and not Path(self.output).expanduser().absolute().parent.is_dir():
            raise ConfigError(f"output={self.output!r} lies in a directory that does not exist: create it first")


def find_checkpoints(given: Iterable[str]) -> list[Path]:
    """The checkpoints that paths or globs name, each once: a folder's `checkpoint-*` in natural order, then itself.

    Raises: ConfigError for a path that is no directory, holds no checkpoint, or has a `checkpoint-*` without weights.
    """
    found: dict[Path, Path] = {}
    for text in given:
        paths = [Path(name) for name in glob.glob(str(Path(text).expanduser()))]
        folders = sorted(filter(Path.is_dir, paths), key=_natural)
        if not folders:
            raise ConfigError(
                f"CKPT={text!r} is not a directory: fix the path (working directory {str(Path.cwd())!r})"
            )
        for folder in folders:
            found.update((path.resolve(), path) for path in _checkpoints_in(folder))
    return list(found.values())


def _checkpoints_in(folder: Path) -> list[Path]:
    inside = sorted(filter(Path.is_dir, folder.glob("checkpoint-*")), key=_natural)
    for path in inside:
        if not _is_checkpoint(path):
            raise ConfigError(
                f"CKPT={str(path)!r} has no config.json with weights beside it: remove it or name others"
            )
    if not inside and not _is_checkpoint(folder):
        raise ConfigError(
            f"CKPT={str(folder)!r} holds no checkpoint (config.json and weights, or folders checkpoint-* with them)"
        )
    return [*inside, folder] if _is_checkpoint(folder) else inside


def _is_checkpoint(folder: Path) -> bool:
    return any(all(any(folder.glob(name)) for name in pair) for pair in COMPLETE)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorting key that puts checkpoint-20 before checkpoint-100."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        """One line, as for every other bad input, where argparse prints its usage and exits."""
        raise ConfigError(message)


def parse(words: Sequence[str]) -> tuple[ChoiceConfig, TaskConfig, list[Path]]:
    """The words after `rlvr select-checkpoint`: settings, task and checkpoints.

    Raises: ConfigError for an unknown flag, a bad value, or a path without a checkpoint.
    """
    parser = _parser()
    flags = parser._option_string_actions
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in flags:
            raise unknown("flag", word, flags)
    config, task, rest, spare = parser.parse_args_into_dataclasses(
        list(words), look_for_args_file=False, return_remaining_strings=True
    )
    if spare:
        raise ConfigError(f"{' '.join(spare)!r} belongs to no flag: name all checkpoints side by side")
    if task.heldout_size < 2:
        raise ConfigError(f"prompts={task.heldout_size} is too few for an interval: give at least 2")
    return config, task, find_checkpoints(rest.checkpoints)


def _parser() -> _Parser:
    parser = _Parser(
        (ChoiceConfig, TaskConfig),
        prog="rlvr select-checkpoint",
        usage="%(prog)s CKPT [CKPT ...] --task TASK [--FLAG VALUE ...]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="A checkpoint, a folder of them, or a glob.")
    parser.add_argument("--prompts", dest="heldout_size", type=int, metavar="N", help="Short for --heldout_size.")
    parser.set_defaults(heldout_size=64, train_size=1)  # nothing is trained; held-out rows do not depend on it
    parser._option_string_actions["--band"].nargs = 2  # "one or more" would swallow a checkpoint that follows
    return parser


def select_checkpoint(words: Sequence[str]) -> str:
    """Measure and rank the checkpoints that the words name. Returns the text to print; progress goes to stderr.

    Raises: ConfigError, before any model is loaded.
    """
    config, task_config, paths = parse(words)
    task = load_task(task_config)
    assert task.heldout is not None
    readers = [read_prompts(path, task.heldout["prompt"], config.stop) for path in paths]
    disable_progress_bar()
    measured = []
    for index, reader in enumerate(readers):
        start = time.perf_counter()
        measured.append(_measure_one(reader, task, config))
        taken = f"{measured[-1].entropy:.3f} nats, {time.perf_counter() - start:.0f} s"
        print(f"[{index + 1}/{len(readers)}] {reader.path}: {taken}", file=sys.stderr, flush=True)
    ranked = rank(measured, config.band)
    if config.output is not None:
        record = _record(ranked, config, task_config)
        Path(config.output).expanduser().write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    header = (
        f"{task.name}: {len(task.heldout)} held-out prompts x {config.samples} samples of at most {config.max_tokens} "
        f"tokens, temperature {config.temperature:g}\n"
        "entropy: nats per token; tokens: mean length; cut: share at the limit; ± 95 % interval over prompts"
    )
    return f"{header}\n\n{format_ranking(ranked, config.band)}"


def _measure_one(reader: Reader, task: Task, config: ChoiceConfig) -> Measurement:
    samples = sample(
        load_model(reader.path),
        reader,
        samples=config.samples,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    assert task.heldout is not None
    columns = {
        name: [value for value in task.heldout[name] for _ in range(config.samples)]
        for name in task.heldout.column_names
    }
    rewards = task.reward(prompts=columns.pop("prompt"), completions=samples.texts, **columns)
    return measure(str(reader.path), samples, rewards, per_prompt=config.samples, pass_reward=config.pass_reward)


def _record(ranked: Sequence[Ranked], config: ChoiceConfig, task: TaskConfig) -> dict[str, Any]:
    """What --output holds: the settings and the ranking, best first, null where there is no number."""
    rows = [{"verdict": one.verdict, "why": REASONS[one.verdict], **asdict(one.measured)} for one in ranked]
    for row in rows:
        row["pass_at_k"] = {k: _finite(value) for k, value in row["pass_at_k"].items()}
    ranking = [{name: _finite(value) for name, value in row.items()} for row in rows]
    return {"config": asdict(config), "task": asdict(task), "ranking": ranking}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
