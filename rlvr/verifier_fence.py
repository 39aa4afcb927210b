"""A fence around the process that judges: limits, a folder and an environment of its own, and a guard.

The guard is the worker's parent. Whatever the verifier starts is its descendant, for orphans are given to it, and ends
with the worker. A fence stops accidents and clumsy programs. It is not a sandbox: see docs/security.md.
"""

import contextlib
import ctypes
import math
import os
import resource
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

from rlvr.child_process import write_message
from rlvr.errors import ConfigError, unknown

INTERVAL = 0.1  # seconds between two looks at how many processes there are, and at whether the trainer lives
SHOWN = 1 << 16  # bytes of a worker's output that are passed on to stderr; the rest is read and dropped
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
OWN = ("HOME", "TMPDIR")  # variables that name the worker's folder
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of prctl


@dataclass(frozen=True, slots=True)
class Limits:
    """What a verifier may take; None is no limit.

    memory_gib: address space of each process.   file_mib: size of each file.   processes: how many may run at a time
    beside the worker's own.   environment: names of variables of the trainer that are passed on.
    Raises: ConfigError naming the field, its value and the fix.
    """

    memory_gib: float | None = 8.0
    file_mib: float | None = 64.0
    processes: int | None = 64
    environment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("memory_gib", "file_mib"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ConfigError(f"verifier_limits.{name}={value!r} must be a number above 0, or null for no limit")
        count = self.processes
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ConfigError(f"verifier_limits.processes={count!r} must be an integer of at least 0, or null")
        names = self.environment
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n and "=" not in n for n in names):
            raise ConfigError(f"verifier_limits.environment={names!r} must be a list of names, e.g. [HF_HOME]")
        object.__setattr__(self, "environment", tuple(names))

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Limits":
        """From a user's mapping. Raises: ConfigError for an unknown key, too."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown("verifier_limits", str(name), known)
        return cls(**settings)

    def variables(self) -> dict[str, str]:
        """The whole environment of a worker: no other variable of this process is in it."""
        names = (*PASSED_ON, *self.environment)
        mine = {name: os.environ[name] for name in names if name in os.environ}
        return {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **mine}


def enter_fence(limits: Limits, parent: int, replies: BinaryIO) -> str:
    """Go on as the worker, inside the fence; the process that called stays behind as its guard and never returns.

    parent: the trainer's id; the guard ends with it.   replies: where the guard says how the worker ended, {ended}.
    Returns: the worker's folder, which the guard removes.
    """
    guard, alarm = os.getpid(), _alarm(signal.SIGTERM, signal.SIGCHLD)
    folder = tempfile.mkdtemp(prefix="rlvr-verifier-")
    _prctl(_SET_CHILD_SUBREAPER, 1)
    output, stream = os.pipe()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(output)
        _become_worker(limits, guard, folder, stream)
        return folder
    os.close(stream)
    try:
        how = _watch(worker, _Output(output), alarm, limits, parent)
    finally:
        _end_all()
        shutil.rmtree(folder, ignore_errors=True)
    if how is not None:
        with contextlib.suppress(OSError):
            write_message(replies, {"ended": how})
    os._exit(0)


def _become_worker(limits: Limits, guard: int, folder: str, stream: int) -> None:
    os.setsid()
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    for standard in (1, 2):
        os.dup2(stream, standard)
    os.close(stream)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # when the machine runs out of memory, rather this process than the training
    _limit(resource.RLIMIT_CORE, 0)
    if limits.memory_gib is not None:
        _limit(resource.RLIMIT_AS, int(limits.memory_gib * (1 << 30)))
    if limits.file_mib is not None:
        _limit(resource.RLIMIT_FSIZE, int(limits.file_mib * (1 << 20)))
    os.environ.update({name: folder for name in OWN if name not in limits.environment})
    tempfile.tempdir = None  # the guard's


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _watch(worker: int, output: "_Output", alarm: int, limits: Limits, parent: int) -> str | None:
    """Until the worker has ended or must: how, or None where nobody asks (the pool stops it, or the trainer died)."""
    while True:
        sources = [alarm, output.source] if output.open else [alarm]
        ready, _, _ = select.select(sources, [], [], INTERVAL)
        if alarm in ready and signal.SIGTERM in os.read(alarm, 4096):
            return None
        output.pass_on()
        status = _reap().get(worker)
        if status is not None:
            output.pass_on()
            return ending(os.waitstatus_to_exitcode(status))
        if os.getppid() != parent:
            return None
        if limits.processes is not None and len(descendants([os.getpid()])) - 1 > limits.processes:
            return f"more than {limits.processes} processes (verifier_limits.processes)"


class _Output:
    """What the worker prints: as much as SHOWN goes to stderr, so that a flood fills neither log nor pipe."""

    def __init__(self, source: int) -> None:
        self.source, self.open, self._room = source, True, SHOWN
        os.set_blocking(source, False)

    def pass_on(self) -> None:
        for _ in range(16):  # at most 1 MiB before the guard looks at other things
            try:
                chunk = os.read(self.source, 1 << 16)
            except BlockingIOError:
                return
            if not chunk:
                self.open = False
                return
            if self._room > 0:
                shown = chunk[: self._room]
                self._room -= len(shown)
                end = b"" if self._room else b"\n[this verifier process has printed enough: the rest is dropped]\n"
                with contextlib.suppress(OSError):
                    os.write(2, shown + end)


def descendants(roots: Iterable[int], spared: Collection[int] = ()) -> list[int]:
    """Ids of the children of `roots`, of their children and so on; not those of `spared` nor what these started."""
    found: list[int] = []
    ahead = list(roots)
    while ahead:
        parent = ahead.pop()
        children = [pid for pid in _children(parent) if pid not in spared]
        found += children
        ahead += children
    return found


def _children(parent: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in os.listdir(f"/proc/{parent}/task"):
            with open(f"/proc/{parent}/task/{task}/children") as children:
                found += map(int, children.read().split())
    return found


def end_descendants(roots: Collection[int], spared: Collection[int] = ()) -> None:
    """Kill them, and what they start meanwhile, and reap those that are this process's own."""
    deadline = time.monotonic() + 5.0
    while (left := descendants(roots, spared)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)


def _end_all() -> None:
    """Of the guard. Whole groups first: a process that forks faster than it is found cannot leave its group so."""
    for pid in descendants([os.getpid()]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(pid)
            if group != os.getpgrp():
                os.killpg(group, signal.SIGKILL)
    end_descendants([os.getpid()])


def _reap() -> dict[int, int]:
    """Wait status by id of the children that have ended."""
    found = {}
    with contextlib.suppress(ChildProcessError):
        while (done := os.waitpid(-1, os.WNOHANG))[0]:
            found[done[0]] = done[1]
    return found


def ending(code: int) -> str:
    """In words what `subprocess` calls a return code."""
    if code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"signal {names.get(-code, -code)}"


def _alarm(*numbers: signal.Signals) -> int:
    """A descriptor from which the numbers of the signals that arrived can be read."""
    alarm, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return alarm


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
