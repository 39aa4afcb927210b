"""Checkpoints that are whole or not there: written aside, made durable, then renamed."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

ASIDE = ".partial"  # in the output_dir: what is not yet or no longer a checkpoint; may be deleted at any time
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Oldest first."""
    found = (path.parent for path in Path(output_dir).glob(f"checkpoint-*/{STATE}"))
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=checkpoint_number)


def checkpoint_number(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def clear_aside(output_dir: str | Path) -> Path:
    """An empty folder to write in."""
    aside = Path(output_dir, ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def commit(written: Path, final: Path) -> None:
    """Give a folder that was written aside its name. A kill, or a power failure, leaves the old one or the new one,
    or for the moment between two renames neither; never a part of one.
    """
    for path in written.rglob("*"):
        if path.is_file():
            _sync(path)
    if final.exists():
        discard(final)
    os.rename(written, final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder, which loses its name first: half of it is no checkpoint."""
    aside = Path(folder.parent, ASIDE, f"discarded-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def rotate(output_dir: str | Path, limit: int | None, keep: Collection[str | None] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest, nor one whose path is in `keep`."""
    checkpoints = complete_checkpoints(output_dir)
    kept = {str(Path(path)) for path in keep if path} | {str(path) for path in checkpoints[-1:]}
    spare = [path for path in checkpoints if str(path) not in kept]
    excess = len(checkpoints) - limit if limit is not None and limit > 0 else 0
    for path in spare[: max(excess, 0)]:
        discard(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
