"""The laboratory's pool: whatever happens to a worker, every piece of work is told of, and the rest is made."""

import os
from pathlib import Path

from tqdm import tqdm

from scripts.lab.pool import Work, _do


def _made(name: str, folder: str) -> Path:
    path = Path(folder, name)
    path.touch()
    return path


def _killed(folder: str) -> Path:
    os._exit(9)


def _wrong(folder: str) -> Path:
    raise ValueError("the first line\nand another")


def test_pool_goes_on_after_failures_and_dead_workers(tmp_path: Path):
    folder = str(tmp_path)
    work: list[Work] = [("killed", 1.0, _killed, (folder,)), ("wrong", 1.0, _wrong, (folder,))]
    work += [(f"made-{i}", 1.0, _made, (f"made-{i}", folder)) for i in range(5)]
    failed: dict[str, str] = {}
    with tqdm(total=len(work), disable=True) as bar:
        _do(work, 2, bar, failed)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"made-{i}" for i in range(5)]
    assert set(failed) == {"killed", "wrong"}
    assert failed["killed"].startswith("BrokenProcessPool") and failed["wrong"] == "ValueError: the first line"
