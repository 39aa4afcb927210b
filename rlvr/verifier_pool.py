"""A pool of killable verifier processes.

A verifier may hang inside C code, call os._exit, or run out of memory; alarms work on the main thread only. So each
completion is judged in a process that can be killed, inside a fence, and what went wrong is counted instead of being
scored 0. A row whose judging ends its process is tried once more, for the process may have been killed from outside.
"""

import contextlib
import logging
import os
import selectors
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlvr.child_process import pack
from rlvr.errors import ConfigError
from rlvr.verifier_fence import Limits, ending
from rlvr.verifier_process import START_SECONDS, WorkerProcess

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one row: a finite `value`, or None with the kind of `failure` and a message."""

    value: float | None
    failure: Literal["timeout", "error"] | None = None
    message: str = ""


class VerifierPool:
    """Judges rows in `workers` subprocesses, `timeout` seconds of wall clock per row.

    verify: "math_verify", "reasoning_gym" or "module:function"; kwargs: arguments of a built-in verifier.
    limits: of each worker.
    Workers start at the first call to `score`, persist, and are replaced when they hang or die. Safe to call from
    any thread (calls take turns); each rank of a distributed run has a pool of its own.
    Raises: ConfigError from `score` when workers repeatedly cannot start.
    """

    def __init__(
        self,
        verify: str,
        workers: int = 4,
        timeout: float = 10.0,
        kwargs: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
    ):
        self.verify, self.workers, self.timeout, self.limits = verify, workers, timeout, limits or Limits()
        self._kwargs = dict(kwargs or {})
        self._pool: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._pending: deque[int] = deque()  # rows of the call at hand
        self._retried: set[int] = set()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop, self._pool, os.getpid())

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per row, in order. A row holds `completion` and `answer` (str) and what else JSON can hold."""
        with self._lock:
            verdicts: list[Verdict | None] = [None] * len(rows)
            pending = self._pending = deque(range(len(rows)))
            self._retried = set()
            try:
                # Who died since the last call is replaced before it gets a row.
                for key, _ in self._selector.select(0):
                    self._read(key.data, verdicts)
                while pending or any(worker.item is not None for worker in self._pool):
                    while len(self._pool) < min(self.workers, len(rows)):
                        self._start()
                    for worker in self._pool:
                        if worker.idle and pending:
                            self._assign(worker, pending, rows, verdicts)
                    if pending or any(worker.item is not None for worker in self._pool):
                        self._step(verdicts)
            except BaseException:  # a row left in flight would answer for a row of the next call
                self._close()
                raise
        return [verdict for verdict in verdicts if verdict is not None]

    def close(self) -> None:
        """Stop the workers. A later call to `score` starts new ones."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for worker in self._pool:
            self._selector.unregister(worker.output)
        self._failed_starts = 0
        _stop(self._pool, os.getpid())

    def _start(self) -> None:
        setup = {"verify": self.verify, "kwargs": self._kwargs, "parent": os.getpid(), "limits": asdict(self.limits)}
        worker = WorkerProcess(pack(setup), self.limits.variables())
        self._pool.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _retire(self, worker: WorkerProcess) -> int:
        """Kill a worker and start its successor, which imports the verifier while the others go on."""
        self._selector.unregister(worker.output)
        self._pool.remove(worker)
        code = worker.kill()
        self._start()
        return code

    def _assign(
        self,
        worker: WorkerProcess,
        pending: deque[int],
        rows: Sequence[Mapping[str, Any]],
        verdicts: list[Verdict | None],
    ) -> None:
        """Give `worker` the next row that can be sent; a row JSON cannot hold is an error of its own."""
        while pending:
            item = pending.popleft()
            try:
                message = pack({"row": dict(rows[item])})
            except (TypeError, ValueError) as error:
                verdicts[item] = Verdict(None, "error", f"{type(error).__name__}: row cannot be sent: {error}")
                continue
            worker.give(item, message, self.timeout)
            return

    def _step(self, verdicts: list[Verdict | None]) -> None:
        """Wait for the next message, death or deadline, and deal with all that is due."""
        active = [worker for worker in self._pool if not worker.idle]
        wait = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        if any(worker.unsent for worker in active):
            wait = min(wait, 0.01)
        for key, _ in self._selector.select(wait):
            self._read(key.data, verdicts)
        now = time.monotonic()
        for worker in [w for w in self._pool if not w.idle]:
            worker.flush()
            if worker.deadline > now:
                continue
            if worker.item is None:
                self._start_failed(worker, f"not ready after {START_SECONDS:.0f} s")
                continue
            verdicts[worker.item] = Verdict(None, "timeout", f"TimeoutError: no verdict after {self.timeout:g} s")
            self._retire(worker)

    def _read(self, worker: WorkerProcess, verdicts: list[Verdict | None]) -> None:
        """Deal with what a worker has sent."""
        try:
            message = worker.receive()
        except EOFError:  # its guard died
            self._ended(worker, "", verdicts)
        except ValueError as error:
            self._ended(worker, f"a reply that cannot be read ({error})", verdicts)
        else:
            if message is None:
                return
            if "ended" in message:
                self._ended(worker, message["ended"], verdicts)
            elif "fatal" in message:
                self._start_failed(worker, message["fatal"])
            elif "ready" in message:
                worker.ready, self._failed_starts = True, 0
            elif worker.item is not None:
                said = message.get("error", "")
                verdicts[worker.item] = Verdict(message.get("value"), "error" if said else None, said)
                worker.item = None
                if said.startswith("MemoryError"):  # what filled its memory may still be there
                    self._retire(worker)

    def _ended(self, worker: WorkerProcess, how: str, verdicts: list[Verdict | None]) -> None:
        """how: "" where nobody can say. Its row is tried once more: it may have been killed for another's memory."""
        item = worker.item
        if not worker.ready:
            self._start_failed(worker, f"it ended with {how or 'no word'} while it started")
            return
        code = self._retire(worker)
        if item is not None and item not in self._retried:
            self._retried.add(item)
            self._pending.append(item)
        elif item is not None:
            what = f"the verifier's process ended with {how or ending(code)}"
            verdicts[item] = Verdict(None, "error", f"WorkerDied: {what}")

    def _start_failed(self, worker: WorkerProcess, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise ConfigError(
                f"reward={self.verify!r} cannot start in a worker process: {' '.join(reason.split())}; there it has "
                "the limits of verifier_limits, and of your environment what verifier_limits.environment lists"
            )
        logger.warning("a worker of verifier %r did not start and is replaced: %s", self.verify, reason)
        self._retire(worker)


def _stop(pool: list[WorkerProcess], owner: int) -> None:
    """Let idle workers leave by themselves for a moment, then kill what is left. A forked copy leaves them alone."""
    if os.getpid() != owner:
        return
    for worker in pool:
        if worker.process.stdin is not None:
            worker.process.stdin.close()
    patience = time.monotonic() + 1.0
    for worker in pool:
        if worker.idle:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=max(0.0, patience - time.monotonic()))
        worker.kill()
    pool.clear()
