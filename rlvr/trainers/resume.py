"""Which checkpoint a run continues from."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from rlvr.errors import ConfigError

NEWEST = ("true", "latest", "last")


def resolve_checkpoint(output_dir: str, requested: str | bool | None) -> str | None:
    """The checkpoint's directory, or None to start anew.

    requested: None or False, a directory, or True / "true" / "latest" for the newest checkpoint in `output_dir`.
    Raises: ConfigError if there is no such checkpoint.
    """
    if requested is None or requested is False or str(requested).lower() == "false":
        return None
    if requested is True or str(requested).lower() in NEWEST:
        newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if newest is None:
            raise ConfigError(
                f"resume_from_checkpoint: output_dir={output_dir!r} holds no checkpoint; start without the flag, in "
                "an empty directory, or give a checkpoint's path"
            )
        return newest
    if not (Path(str(requested)) / "trainer_state.json").is_file():
        raise ConfigError(f"resume_from_checkpoint={requested!r} is not a checkpoint: it has no trainer_state.json")
    return str(requested)


def checkpoint_step(checkpoint: str) -> int:
    """The optimizer step after which the checkpoint was written."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])
