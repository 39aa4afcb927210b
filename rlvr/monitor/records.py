"""Reads a run directory, also while the run is writing.

    run.json                     config, versions, git commit, started, status, resumed
    steps.jsonl                  {"step", "time", "tokens", "metrics", ...}, one line per optimizer step
    evals.jsonl                  {"step", "time", "metrics", ...}, one line per evaluation
    tokens/step-000012.parquet   a sample of rollouts, one row per sequence, one list per token-level column
    checkpoint-12/               Hugging Face checkpoints, written by the trainer

`time` is in Unix seconds; `tokens` counts the tokens trained on since the start of the run; `entropy_by_position`,
where recorded, holds mean entropy and token count of bins of positions that begin at `edges`; `routers` likewise the
routers' Tsallis entropy, share of soft-routed tokens and expert load of each of `layers`, and entropy and load by bins
of positions in the text; `alerts` is what the run said of a step in words; an evaluation with a `name` is of other
rows than the run's own. The files are strict
JSON: a metric that is not finite is written as the string "NaN", "Infinity" or "-Infinity", and read back as that
float.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError

RUN, STEPS, EVALS, TOKENS = "run.json", "steps.jsonl", "evals.jsonl", "tokens"
TOKEN_FILE = re.compile(r"step-(\d+)\.parquet")


def holds_run(run_dir: str | Path) -> bool:
    """Whether the directory has the records of a run."""
    return any((Path(run_dir) / name).exists() for name in (RUN, STEPS))


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """run.json, or {} if there is none. Raises: ConfigError if it is not JSON."""
    path = Path(run_dir) / RUN
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore it or delete it") from error


def read_steps(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of steps.jsonl in order, [] if there are none. Safe while the run is writing.

    Raises: ConfigError for a damaged line that is not the last.
    """
    return [record for _, record in read_lines(Path(run_dir) / STEPS)]


def read_evals(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of evals.jsonl in order, [] if there are none. Raises: as read_steps."""
    return [record for _, record in read_lines(Path(run_dir) / EVALS)]


def token_steps(run_dir: str | Path) -> list[int]:
    """The steps that have token-level records, ascending."""
    matches = (TOKEN_FILE.fullmatch(path.name) for path in (Path(run_dir) / TOKENS).glob("step-*.parquet"))
    return sorted(int(match[1]) for match in matches if match)


def read_tokens(run_dir: str | Path, step: int) -> list[dict[str, Any]]:
    """The token-level records of one step, one dict per sequence. Raises: FileNotFoundError if there are none."""
    import pyarrow.parquet as pq

    return pq.read_table(Path(run_dir) / TOKENS / f"step-{step:06d}.parquet").to_pylist()


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded and is finite."""
    found = [(record["step"], record["metrics"][name]) for record in records if name in record["metrics"]]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def rollout_points(records: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(entropy, reward) of each rollout, entropy of the policy that made it: at the first step that trains on it."""
    wanted = ("entropy/mean", "reward/mean")
    made = [r["metrics"] for r in records if r["metrics"].get("time/rollout", 0) > 0]
    points = [(m[wanted[0]], m[wanted[1]]) for m in made if all(name in m for name in wanted)]
    return [point for point in points if all(map(math.isfinite, point))]


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line with its record; a torn last line is left out."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            metrics, _ = record["metrics"].items(), record["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path} line {number} is damaged; delete that line") from error
        record["metrics"] = {name: float(value) if isinstance(value, str) else value for name, value in metrics}
        found.append((line, record))
    return found
