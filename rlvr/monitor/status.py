"""Whether a run lives: from what it wrote last, for whoever only sees its directory."""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "stalled", "dead", "finished", "failed", "interrupted", "unknown"]

HEARTBEAT = "heartbeat"
SILENT = 60.0  # seconds without a heartbeat, which is renewed every 10
SLOW = 10.0  # usual steps without a record
STALLED_AFTER = 300.0  # seconds without a record at least, for a run that lives
DEAD_AFTER = 600.0  # likewise, for a run that has no heartbeat
LONGEST = 500  # characters of what a heartbeat tells


@dataclass(frozen=True, slots=True)
class Status:
    """detail: a sentence for a person, "" if there is nothing to say."""

    state: State
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Beat:
    """time: of the heartbeat, Unix seconds.   doing: the phase that the run is at, "" if not known.
    since: when it began, Unix seconds, NaN if not known.   stall: what the run says of one that lasts, "" for none.
    """

    time: float
    doing: str = ""
    since: float = math.nan
    stall: str = ""


def run_status(
    run_dir: str | Path,
    run: Mapping[str, Any],
    last_time: float | None,
    usual_step_seconds: float | None,
    now: float,
) -> Status:
    """run: of run.json.   last_time: of the last record, Unix seconds.   usual_step_seconds: None if not known."""
    said = run.get("status")
    if said == "failed":
        return Status("failed", str(run.get("error") or ""))
    if said in ("finished", "interrupted"):
        return Status(said, str(run.get("error") or ""))
    if said != "running":
        return Status("unknown", "" if run else "there is no run.json")
    started = max([float(run.get("started", 0)), *(float(entry.get("time", 0)) for entry in run.get("resumed", ()))])
    silent = now - max(started, last_time or 0)
    patience = SLOW * (usual_step_seconds or 0)
    beat = _heartbeat(Path(run_dir))
    if beat is not None and now - beat.time > SILENT:
        why = "its process was killed or stopped, its machine is gone, or code in it holds the interpreter's lock"
        return Status("dead", f"no sign of life for {_span(now - beat.time)}: {why}{_said(beat, 'was')}")
    if beat is None and silent > max(patience, DEAD_AFTER):
        return Status("dead", f"nothing was recorded for {_span(silent)}, and the run has no heartbeat")
    if beat is not None and beat.stall:
        return Status("stalled", f"its process lives, but says: {beat.stall}{_said(beat, 'is', stall=False)}")
    if last_time is None or last_time < started:
        return Status("running", f"no step for {_span(silent)}: the first may take long" if silent > SILENT else "")
    limit = max(patience, STALLED_AFTER)
    if beat is not None and silent > limit and not now - beat.since <= limit:  # a phase is judged from its start
        usual = f"; a step usually takes {_span(usual_step_seconds)}" if usual_step_seconds else ""
        told = f"its process lives, but nothing was recorded for {_span(silent)}{usual}"
        return Status("stalled", told + _said(beat, "is"))
    return Status("running")


def _heartbeat(run_dir: Path) -> Beat | None:
    """None if there is none. What it tells is left out where it cannot be read: an older run's is empty."""
    path = run_dir / HEARTBEAT
    try:
        found = path.stat()
    except OSError:
        return None
    told: Any = None
    if stat.S_ISREG(found.st_mode):
        try:
            with open(path, "rb") as file:
                told = json.loads(file.read(65536))
        except (OSError, ValueError, RecursionError):
            pass
    if not isinstance(told, dict):
        return Beat(found.st_mtime)
    doing, stall = (x[:LONGEST] if isinstance(x := told.get(name), str) else "" for name in ("doing", "stall"))
    since = told.get("since")
    since = since if isinstance(since, float) and math.isfinite(since) else math.nan
    return Beat(found.st_mtime, doing, since, stall)


def _said(beat: Beat, verb: str, stall: bool = True) -> str:
    """What the run told of itself, to be put behind a sentence."""
    at = f"; it {verb} at: {beat.doing}" if beat.doing else ""
    return at + (f"; it had said: {beat.stall}" if stall and beat.stall else "")


def _span(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
