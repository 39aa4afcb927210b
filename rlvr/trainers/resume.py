"""Which checkpoint a run continues from."""

import json
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError
from rlvr.monitor.records import holds_run
from rlvr.trainers.checkpoints import STATE, checkpoint_number, complete_checkpoints

NEWEST = ("true", "latest", "last")
AUTO = "auto"  # the newest, or from the start where there is none: for jobs that a cluster starts again


def restarts(requested: str | bool | None) -> bool:
    """Whether a run that was stopped before its first checkpoint may begin again in its output_dir."""
    return str(requested).lower() == AUTO


def resolve_checkpoint(output_dir: str, requested: str | bool | None) -> str | None:
    """The checkpoint's directory, or None to start anew.

    requested: None or False, a directory, or True / "true" / "latest" for the newest complete checkpoint in
    `output_dir`; "auto" for the same, where None is no error.
    Raises: ConfigError if there is no such checkpoint, or if continuing from it would mix two runs in `output_dir`.
    """
    if requested is None or requested is False or str(requested).lower() == "false":
        return None
    complete = complete_checkpoints(output_dir)
    if requested is True or str(requested).lower() in (*NEWEST, AUTO):
        if not complete and restarts(requested):
            return None
        if not complete:
            raise ConfigError(
                f"resume_from_checkpoint: output_dir={output_dir!r} holds no complete checkpoint; start without the "
                "flag, in an empty directory, or give a checkpoint's path"
            )
        return str(complete[-1])
    checkpoint = Path(str(requested))
    if not (checkpoint / STATE).is_file():
        raise ConfigError(f"resume_from_checkpoint={requested!r} is not a complete checkpoint: it has no {STATE}")
    if checkpoint.resolve().parent != Path(output_dir).resolve() and holds_run(output_dir):
        raise ConfigError(
            f"resume_from_checkpoint={requested!r} is of another run than output_dir={output_dir!r} holds: "
            "choose an empty output_dir"
        )
    later = [path.name for path in complete if checkpoint_number(path) > checkpoint_step(str(checkpoint))]
    if later:
        raise ConfigError(
            f"resume_from_checkpoint={requested!r}: output_dir={output_dir!r} also holds {', '.join(later)} of the "
            "run you would leave: move them away, or resume into an empty output_dir"
        )
    return str(checkpoint)


def checkpoint_step(checkpoint: str) -> int:
    """The optimizer step after which the checkpoint was written."""
    return int(json.loads((Path(checkpoint) / STATE).read_text())["global_step"])


def saved_state(checkpoint: str, callback: str) -> dict[str, Any]:
    """What a callback of this name wrote into the checkpoint by its `state`; empty if it wrote nothing."""
    saved = json.loads((Path(checkpoint) / STATE).read_text()).get("stateful_callbacks") or {}
    return dict(saved.get(callback, {}).get("attributes", {}))
