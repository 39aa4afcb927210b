"""Whether a run lives: from what it wrote last, for whoever only sees its directory."""

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


@dataclass(frozen=True, slots=True)
class Status:
    """detail: a sentence for a person, "" if there is nothing to say."""

    state: State
    detail: str = ""


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
    if beat is not None and now - beat > SILENT:
        return Status(
            "dead", f"no sign of life for {_span(now - beat)}: its process was killed, or its machine is gone"
        )
    if beat is None and silent > max(patience, DEAD_AFTER):
        return Status("dead", f"nothing was recorded for {_span(silent)}, and the run has no heartbeat")
    if last_time is None or last_time < started:
        return Status("running", f"no step for {_span(silent)}: the first may take long" if silent > SILENT else "")
    if beat is not None and silent > max(patience, STALLED_AFTER):
        usual = f"; a step usually takes {_span(usual_step_seconds)}" if usual_step_seconds else ""
        return Status("stalled", f"its process lives, but nothing was recorded for {_span(silent)}{usual}")
    return Status("running")


def _heartbeat(run_dir: Path) -> float | None:
    try:
        return (run_dir / HEARTBEAT).stat().st_mtime
    except OSError:
        return None


def _span(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} seconds"
