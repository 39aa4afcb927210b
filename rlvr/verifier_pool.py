"""A pool of killable verifier processes.

A verifier may hang inside C code, call os._exit, or run out of memory; alarms work on the main thread only. So each
completion is judged in a process that can be killed, and what went wrong is counted instead of being scored 0.
"""

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlvr.child_process import child_command, pack, unpack

logger = logging.getLogger(__name__)

START_SECONDS = 180.0  # to import a verifier; a busy machine is slow, and this is not the time limit of an item
MAX_FAILED_STARTS = 3
_READ_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one row: a finite `value`, or None with the kind of `failure` and a message."""

    value: float | None
    failure: Literal["timeout", "error"] | None = None
    message: str = ""


class _Worker:
    """One subprocess with at most one row in flight. Its pipes never block the trainer."""

    def __init__(self, setup: bytes):
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.process = subprocess.Popen(
            child_command("rlvr.verifier_worker:main"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a process group of its own: killed with its children, deaf to Ctrl-C
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._inbox = bytearray()
        self._outbox = setup
        self.flush()

    @property
    def idle(self) -> bool:
        return self.ready and self.item is None

    @property
    def unsent(self) -> bool:
        return bool(self._outbox)

    def give(self, item: int, message: bytes, timeout: float) -> None:
        """Start row number `item`; its clock of `timeout` seconds starts now."""
        self.item, self.deadline, self._outbox = item, time.monotonic() + timeout, message
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes. A broken pipe is left for `receive` to notice."""
        try:
            while self._outbox:
                self._outbox = self._outbox[os.write(self.input, self._outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outbox = b""

    def receive(self) -> dict[str, Any] | None:
        """The next complete message, or None if there is none yet. Raises EOFError when the process has gone."""
        try:
            chunk = os.read(self.output, _READ_SIZE)
        except BlockingIOError:
            return unpack(self._inbox)
        if not chunk:
            raise EOFError
        self._inbox += chunk
        return unpack(self._inbox)

    def kill(self) -> int:
        """Kill the process with its children and reap it; its exit code, minus the signal if it died of one."""
        if self.process.returncode is None:  # not reaped: its id, and so its group's, is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        return code


class VerifierPool:
    """Judges rows in `workers` subprocesses, `timeout` seconds of wall clock per row.

    verify: "math_verify", "reasoning_gym" or "module:function"; kwargs: arguments of a built-in verifier.
    Workers start at the first call to `score`, persist, and are replaced when they hang or die. Safe to call from
    any thread (calls take turns); each rank of a distributed run has a pool of its own.
    Raises: RuntimeError from `score` when workers repeatedly cannot start.
    """

    def __init__(self, verify: str, workers: int = 4, timeout: float = 10.0, kwargs: Mapping[str, Any] | None = None):
        self.verify, self.workers, self.timeout = verify, workers, timeout
        self._kwargs = dict(kwargs or {})
        self._pool: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop, self._pool, os.getpid())

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict per row, in order. A row holds `completion` and `answer` (str) and what else JSON can hold."""
        with self._lock:
            verdicts: list[Verdict | None] = [None] * len(rows)
            pending = deque(range(len(rows)))
            try:
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
        worker = _Worker(pack({"verify": self.verify, "kwargs": self._kwargs, "parent": os.getpid()}))
        self._pool.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _retire(self, worker: _Worker) -> int:
        """Kill a worker and start its successor, which imports the verifier while the others go on."""
        self._selector.unregister(worker.output)
        self._pool.remove(worker)
        code = worker.kill()
        self._start()
        return code

    def _assign(
        self,
        worker: _Worker,
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

    def _read(self, worker: _Worker, verdicts: list[Verdict | None]) -> None:
        try:
            message = worker.receive()
        except EOFError:
            item = worker.item
            if not worker.ready:
                self._start_failed(worker, "died while it started")
                return
            code = self._retire(worker)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if item is not None:
                verdicts[item] = Verdict(None, "error", f"WorkerDied: the verifier's process ended with {how}")
            return
        if message is None:
            return
        if "fatal" in message:
            self._start_failed(worker, message["fatal"])
        elif "ready" in message:
            worker.ready, self._failed_starts = True, 0
        elif worker.item is not None:
            error = message.get("error", "")
            verdicts[worker.item] = Verdict(message.get("value"), "error" if error else None, error)
            worker.item = None

    def _start_failed(self, worker: _Worker, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(f"verifier {self.verify!r} cannot start in a worker process: {reason}")
        logger.warning("a worker of verifier %r did not start and is replaced: %s", self.verify, reason)
        self._retire(worker)


def _stop(pool: list[_Worker], owner: int) -> None:
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
