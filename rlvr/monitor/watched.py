"""One run that is looked at again and again: a file is read when it has changed, and of steps.jsonl what is new."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlvr.monitor.history import EAGER, History
from rlvr.monitor.payloads.prompts import PromptTable
from rlvr.monitor.payloads.view import View, last_time, usual_step_seconds, without_nulls
from rlvr.monitor.records import EVALS, GROUPS, PROMPTS, RUN, TOKENS, read_evals, read_run, token_steps
from rlvr.monitor.status import run_status

Key = tuple[int, ...] | None


class Watched:
    """The records of a run directory, whole or being written.

    history.lock: to be held around `look` and `prompts`, and while what they return is used.
    """

    def __init__(self, id: str, name: str, run_dir: str | Path, eager: int = EAGER) -> None:
        """eager: bytes of new steps that are read at once, see History."""
        self.id, self.name, self.run_dir = id, name, Path(run_dir)
        self.history = History(run_dir, eager)
        self._kept: dict[str, tuple[Key, Any]] = {}
        self._prompts: PromptTable | None = None

    def look(self, now: float | None = None) -> View:
        """What is known of the run now. Raises: ConfigError for a damaged file."""
        run: dict[str, Any] = self._once(RUN, lambda run_dir: without_nulls(read_run(run_dir)))
        self.history.refresh()
        table = self.history.table
        evals: list[dict[str, Any]] = self._once(EVALS, read_evals)
        steps: list[int] = self._once(TOKENS, token_steps)
        last = last_time(table, evals)
        status = run_status(self.run_dir, run, last, usual_step_seconds(table), time.time() if now is None else now)
        keys = [key for key, _ in self._kept.values()]
        state = repr((self.name, self.history.key, self._key(GROUPS), self._key(PROMPTS), keys, status.state))
        return View(
            id=self.id,
            name=self.name,
            run_dir=self.run_dir,
            run=run,
            table=table,
            status=status,
            num_steps=self.history.num_steps,
            read=self.history.read,
            evals=evals,
            token_steps=steps,
            version=hashlib.blake2b(state.encode(), digest_size=6).hexdigest(),
        )

    def prompts(self) -> PromptTable:
        """What the groups of all rollouts earned. Raises: ConfigError for a damaged file."""
        if self._prompts is None:
            self._prompts = PromptTable(self.run_dir)
        self._prompts.refresh()
        return self._prompts

    def _once(self, name: str, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the run directory, read again when the file or folder of this name has changed."""
        key = self._key(name)
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = (key, read(self.run_dir))
        return self._kept[name][1]

    def _key(self, name: str) -> Key:
        try:
            found = os.stat(self.run_dir / name)
        except OSError:
            return None
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
