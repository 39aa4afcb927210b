"""One worker of a VerifierPool as the trainer sees it: its guard's process, two pipes, a row and a deadline."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from rlvr.child_process import child_command, unpack

START_SECONDS = 180.0  # to import a verifier; a busy machine is slow, and this is not the time limit of an item
KILL_SECONDS = 10.0  # for the guard to end what the verifier started and to remove its folder
_READ_SIZE = 1 << 16
_LONGEST = 1 << 20  # bytes of a message: a verifier that writes into the pipe must not fill the memory


class WorkerProcess:
    """One subprocess, the guard of the worker proper, with at most one row in flight. Its pipes never block the
    trainer."""

    def __init__(self, setup: bytes, environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            child_command("rlvr.verifier_worker:main"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # a process group of its own, deaf to Ctrl-C
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
        """The next complete message, or None if there is none yet. Raises EOFError when the process has gone, and
        ValueError for what is no message."""
        if (message := self._message()) is not None:
            return message
        try:
            chunk = os.read(self.output, _READ_SIZE)
        except BlockingIOError:
            return None
        if not chunk:
            raise EOFError
        self._inbox += chunk
        return self._message()

    def _message(self) -> dict[str, Any] | None:
        message = unpack(self._inbox)
        if message is not None and not self._expects(message):
            raise ValueError(f"unexpected: {message!r:.100}")
        if len(self._inbox) > _LONGEST:
            raise ValueError("it is too long")
        return message

    def _expects(self, message: Any) -> bool:
        """Whether a worker sends this, at this point: what a verifier runs in its process may write to its pipe."""
        if not isinstance(message, dict) or len(message) != 1:
            return False
        known = {"value": float, "error": str} if self.ready else {"ready": bool, "fatal": str}
        [(name, content)] = message.items()
        finite = not isinstance(content, float) or math.isfinite(content)
        return finite and type(content) is {**known, "ended": str}.get(name)

    def kill(self) -> int:
        """Have the guard end the worker with all that it started, and reap it; the guard's exit code."""
        if self.process.returncode is None:  # not reaped: its id, and so its group's, is still its own
            self.process.terminate()
            try:
                self.process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:  # the worker dies with it
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        return code
