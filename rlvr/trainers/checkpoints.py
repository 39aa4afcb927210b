"""Checkpoints that are whole or not there: written aside, made durable, then renamed."""

import contextlib
import os
import re
import shutil
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


def clear(aside: Path) -> None:
    """Make an empty folder to write in."""
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def commit(written: Path, final: Path) -> None:
    """Give a folder that was written aside its name. A kill, or a power failure, leaves the old one or the new one,
    or for the moment between two renames neither; never a part of one.
    """
    for path in (*written.rglob("*"), written):
        _sync(path)
    if final.exists():
        discard(final)
    os.rename(written, final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder, which loses its name first: half of it is no checkpoint. What cannot be deleted stays aside."""
    aside = folder.parent / ASIDE / f"discarded-{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # in use, or not all could be deleted
        aside.parent.rmdir()


def rotate(output_dir: str | Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest, nor the one of the name of `best`."""
    checkpoints = complete_checkpoints(output_dir)
    kept = {path.name for path in checkpoints[-1:]} | ({Path(best).name} if best else set())
    spare = [path for path in checkpoints if path.name not in kept]
    excess = len(checkpoints) - limit if limit is not None and limit > 0 else 0
    for path in spare[: max(excess, 0)]:
        discard(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
