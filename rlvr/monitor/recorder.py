"""Writes a run directory; records.py describes the files and reads them."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

from rlvr import __version__
from rlvr.alarm import Alert
from rlvr.errors import ConfigError
from rlvr.monitor.files import append, replace, write_parquet
from rlvr.monitor.groups import Groups, prompt_id
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.metrics import metric
from rlvr.monitor.records import (
    EVALS,
    GROUPS,
    PROMPTS,
    RUN,
    STEPS,
    TOKEN_FILE,
    TOKENS,
    holds_run,
    read_lines,
    read_run,
)

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "vllm", "deepspeed")

_SECRETS = ("hub_token", "api_key", "password", "secret", "webhook")


class Recorder:
    """Writes the records of one run; only the main process has one. Every line is on disk when its call returns."""

    def __init__(self, run_dir: str | Path, config: Mapping[str, Any] | None = None) -> None:
        """Start a new run.   config: the resolved settings.

        Raises: ConfigError if the directory already holds a run.
        """
        check_run_dir(run_dir, resume=False)
        self._open(run_dir)
        self._write_run(_new_run(config or {}))

    @classmethod
    def resume(cls, run_dir: str | Path, step: int, config: Mapping[str, Any] | None = None) -> "Recorder":
        """Continue the run from the checkpoint of optimizer step `step`.

        Records of later steps are dropped: they will be made again. A line torn by a kill is dropped too. Every file
        is replaced whole, so a kill in here leaves a directory that can be resumed again.
        Raises: ConfigError if a file is damaged anywhere but in its last line.
        """
        check_run_dir(run_dir, resume=True)
        self = cls.__new__(cls)
        self._open(run_dir)
        records, dropped = _keep_until(self.run_dir / STEPS, step)
        _keep_until(self.run_dir / EVALS, step)
        _keep_until(self.run_dir / GROUPS, step)
        self._prompts = {record["id"] for record in _keep_until(self.run_dir / PROMPTS, step)[0]}
        _drop_token_files(self.run_dir / TOKENS, step)
        self._last_step = step
        self._tokens = records[-1]["tokens"] if records else 0
        settings = _plain(config or {})
        run = read_run(run_dir) or _new_run(settings)
        before = run.get("config", {})
        run["resumed"].append(
            {
                "step": step,
                "time": time.time(),
                "commit": _git_commit(),
                "versions": _versions(),
                "last_recorded_step": records[-1]["step"] if records else 0,
                "dropped_records": dropped,
                "changed_config": {key: value for key, value in settings.items() if before.get(key) != value},
            }
        )
        run |= {"status": "running", "error": None}
        self._write_run(run)
        return self

    def _open(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step = 0
        self._tokens = 0
        self._prompts: set[str] = set()  # ids of those that are recorded

    def record_step(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        entropy_by_position: Mapping[str, Sequence[float]] | None = None,
        routers: Mapping[str, Any] | None = None,
        alerts: Sequence[Alert] = (),
        mismatch_by_position: Mapping[str, Sequence[float]] | None = None,
        histograms: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Append the record of one optimizer step, counted from 1.

        metrics: globally reduced numbers.   entropy_by_position: "edges", "mean" and "count" of bins of positions.
        mismatch_by_position: the same.   histograms: counts in the bins of `rlvr.monitor.histograms`.
        routers: of a mixture of LoRA experts, by layer and by position, see `rlvr.monitor.records`.
        alerts: what a person should know of the step.

        Raises: ConfigError for a metric that METRICS does not name, ValueError for a step that is already recorded or
        counts that do not fit their bins.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}, which is already recorded")
        for name, counts in (histograms or {}).items():
            if len(counts) != (bins := len(HISTOGRAMS[name].edges) + 1):
                raise ValueError(f"histogram {name} has {bins} bins, got {len(counts)} counts")
        values = _numbers(metrics)
        tokens = values.get("policy/tokens", 0)
        self._tokens += 0 if isinstance(tokens, str) else int(tokens)
        self._last_step = step
        record = {"step": step, "time": time.time(), "tokens": self._tokens, "metrics": values}
        if entropy_by_position:
            record["entropy_by_position"] = _plain(entropy_by_position)
        if mismatch_by_position:
            record["mismatch_by_position"] = _plain(mismatch_by_position)
        if histograms:
            record["histograms"] = _plain(histograms)
        if routers:
            record["routers"] = _plain(routers)
        if alerts:
            record["alerts"] = [asdict(alert) for alert in alerts]
        self._append(STEPS, record)

    def record_groups(self, step: int, groups: Groups, *, texts: bool = True) -> None:
        """Append the groups of a rollout that optimizer step `step` is the first to train on, and its new prompts.

        texts: whether the texts of prompts are written, too.
        """
        known = {prompt_id(text): text for text in groups.prompts} if texts else {}
        new = [{"step": step, "id": key, "text": text} for key, text in known.items() if key not in self._prompts]
        self._append(PROMPTS, *new)
        self._prompts |= known.keys()
        record = {
            "step": step,
            "prompts": [prompt_id(text) for text in groups.prompts],
            "passed": list(groups.passed),
            "scored": list(groups.scored),
            "reward": [reward if math.isfinite(reward) else None for reward in groups.reward],
        }
        self._append(GROUPS, record)

    def record_eval(
        self, step: int, metrics: Mapping[str, SupportsFloat], details: Mapping[str, Any] | None = None
    ) -> None:
        """Append an evaluation made after optimizer step `step`; 0 is before training.

        details: what else to say about it, e.g. {"prompts": 500}.
        Raises: ConfigError for a metric that METRICS does not name.
        """
        record = {"step": step, "time": time.time(), "metrics": _numbers(metrics)}
        self._append(EVALS, _plain(details or {}) | record)

    def record_tokens(self, step: int, columns: Mapping[str, Sequence[Any]]) -> Path:
        """Write a sample of rollouts, one row per sequence; token-level columns hold one list per row.

        columns: any of sequence, prompt_index, prompt, completion, reward, advantage, token_ids, tokens (decoded, one
        string per token), entropy, logps, old_logps, rollout_logps, weight, drift, keep, covariance, predicted,
        estimator, control:NAME (see `rlvr.monitor.records`); others are kept as they are.
        Raises: ValueError if the columns differ in length.
        """
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"token columns need one value per sequence each, got {sizes}")
        rows = next(iter(sizes.values()))
        path = self.run_dir / TOKENS / f"step-{step:06d}.parquet"
        write_parquet(path, {"step": [step] * rows, **columns})
        return path

    def finish(self, status: str = "finished", error: str | None = None) -> None:
        """Say in run.json how the run ended: `finished`, `failed`, `interrupted`. A killed run stays `running`.

        error: what stopped it.
        """
        run = read_run(self.run_dir) | {"status": status, "finished": time.time(), "error": error}
        self._write_run(run)

    def _write_run(self, run: Mapping[str, Any]) -> None:
        replace(self.run_dir / RUN, json.dumps(run, indent=2, allow_nan=False).encode() + b"\n")

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        if records:
            lines = (json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
            append(self.run_dir / name, b"".join(lines))


def check_run_dir(run_dir: str | Path, resume: bool) -> None:
    """Refuse a directory that a new run would overwrite; cheap, to be called before the model is loaded.

    Raises: ConfigError if `run_dir` is a file, or holds a run that is not being resumed.
    """
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir={str(path)!r} is a file; choose another --output_dir")
    if not resume and holds_run(path):
        raise ConfigError(
            f"output_dir={str(path)!r} already holds a run; continue it with --resume_from_checkpoint "
            "or choose another --output_dir"
        )
    if not resume and (left := next(path.glob("checkpoint-[0-9]*/"), None)):
        raise ConfigError(
            f"output_dir={str(path)!r} holds {left.name}, but no run that it is of; choose another --output_dir, or "
            "start from its weights with --model_name_or_path"
        )


def _new_run(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "status": "running",
        "started": time.time(),
        "commit": _git_commit(),
        "versions": _versions(),
        "config": _plain(config),
        "resumed": [],
    }


def _git_commit() -> str | None:
    """Commit of the working directory, with `-dirty` where it has changes; None outside a git repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    versions = {"rlvr": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _numbers(metrics: Mapping[str, SupportsFloat]) -> dict[str, Any]:
    for name in metrics:
        metric(name)
    return {name: _plain(value if isinstance(value, int) else float(value)) for name, value in metrics.items()}


def _plain(value: Any, key: str = "") -> Any:
    """`value` as strict JSON: no NaN, no secrets, no objects."""
    if key.endswith(_SECRETS) and value:
        return "<redacted>"
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


def _keep_until(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Drop the records after `step`. Returns those kept, and how many were dropped."""
    lines = read_lines(path)
    kept = [(line, record) for line, record in lines if record["step"] <= step]
    if path.exists():
        replace(path, b"".join(line + b"\n" for line, _ in kept))
    return [record for _, record in kept], len(lines) - len(kept)


def _drop_token_files(folder: Path, step: int) -> None:
    for path in folder.glob("*.partial"):
        path.unlink()
    for path in folder.glob("step-*.parquet"):
        match = TOKEN_FILE.fullmatch(path.name)
        if match and int(match[1]) > step:
            path.unlink()
