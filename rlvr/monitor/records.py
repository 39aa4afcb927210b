"""Reads a run directory, also while the run is writing.

    run.json                     config, versions, git commit, started, status, resumed
    steps.jsonl                  {"step", "time", "tokens", "metrics", ...}, one line per optimizer step
    evals.jsonl                  {"step", "time", "metrics", ...}, one line per evaluation
    groups.jsonl                 {"step", "prompts", "passed", "scored", "reward"}, one line per rollout
    prompts.jsonl                {"step", "id", "text"}, one line per prompt, when it is first met
    tokens/step-000012.parquet   a sample of rollouts, one row per sequence, one list per token-level column
    checkpoint-12/               Hugging Face checkpoints, written by the trainer
    trackers.json                what the run is called in the systems of report_to, where there are any
    heartbeat                    {"step", "doing", "since", "stall"}, renewed every 10 s while the run is open

`time` is in Unix seconds; `tokens` counts the tokens trained on since the start of the run; `entropy_by_position`,
where recorded, holds mean entropy and token count of bins of positions that begin at `edges`, `mismatch_by_position`
likewise the mean |trainer - engine log-prob|; `histograms` holds counts of tokens, over all ranks, in the bins of
`rlvr.monitor.histograms`; `routers` the routers' Tsallis entropy, share of soft-routed tokens and expert load of each
of `layers`, and entropy and load by bins of positions in the text; `alerts` is what the run said of a step, as
{"kind", "message"} each, with a kind of `rlvr.alarm.KINDS`; an evaluation with a `name` is of other rows than the
run's own. `heartbeat` tells the last step, what the run is at, since when, and the alert of a stall that lasts, or
null. With `record_sequences: 0` there are neither token samples nor prompts.jsonl.

The lists of groups.jsonl have an entry for each group, over all ranks, in the rollout's order: the prompt's id (the
first 12 hexadecimal digits of the SHA-256 of its text), how many completions passed, how many could be scored, and
their mean reward, null if there is none; `step` is the first that trains on the rollout. Token-level columns of
tokens/*.parquet beside the metrics of a token: `covariance`, with the means over the step's tokens; `predicted`, the
first-order change of the token's entropy by an SGD step, by the estimator of that name in `rlvr.theory`; and for each
control `control:NAME`, whether it does anything to the token (a weight within 0.01 of 1 is nothing).

The files are strict JSON: a metric that is not finite is written as the string "NaN", "Infinity" or "-Infinity", and
read back as that float.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr.alarm import KINDS, Alert
from rlvr.errors import ConfigError

RUN, STEPS, EVALS, TOKENS = "run.json", "steps.jsonl", "evals.jsonl", "tokens"
GROUPS, PROMPTS = "groups.jsonl", "prompts.jsonl"
FIELDS = {  # without which a line is damaged
    STEPS: ("step", "metrics"),
    EVALS: ("step", "metrics"),
    GROUPS: ("step", "prompts", "passed", "scored", "reward"),
    PROMPTS: ("step", "id", "text"),
}
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


def read_groups(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of groups.jsonl in order, [] if there are none. Raises: as read_steps."""
    return [record for _, record in read_lines(Path(run_dir) / GROUPS)]


def read_prompts(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of prompts.jsonl in order, [] if there are none. Raises: as read_steps."""
    return [record for _, record in read_lines(Path(run_dir) / PROMPTS)]


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


def alerts_of(record: Mapping[str, Any]) -> list[Alert]:
    """What the run told of a step. Sentences alone, of older runs, and kinds of newer ones are of the kind `other`."""
    found = []
    for entry in record.get("alerts") or ():
        told = entry if isinstance(entry, Mapping) else {"message": entry}
        kind = told.get("kind")
        found.append(Alert(kind if kind in KINDS else "other", str(told.get("message", ""))))
    return found


def rollout_points(records: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(entropy, reward) of each rollout, entropy of the policy that made it: at the first step that trains on it."""
    wanted = ("entropy/mean", "reward/mean")
    made = [r["metrics"] for r in records if r["metrics"].get("time/rollout", 0) > 0]
    points = [(m[wanted[0]], m[wanted[1]]) for m in made if all(name in m for name in wanted)]
    return [point for point in points if all(map(math.isfinite, point))]


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line of a file of FIELDS with its record; a torn last line is left out."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = {name: record[name] for name in FIELDS[path.name]}
            metrics = known.get("metrics", {}).items()
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path} line {number} is damaged; delete that line") from error
        if "metrics" in known:
            record["metrics"] = {name: float(value) if isinstance(value, str) else value for name, value in metrics}
        found.append((line, record))
    return found
