"""Says from beside a run that it lives, and when it does not get on."""

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from rlvr.alarm import Alert
from rlvr.monitor.status import HEARTBEAT

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds
USUAL_STEPS = 10  # a step may take so many times as long as usual
FIRST_STEP = 3  # and the first of a process so many times as long as another
REMEMBERED = 1000  # steps

Doing = tuple[str, float]  # a phase, "" if that is not known, and since when, as of time.perf_counter


def unknown() -> Doing:
    return "", -math.inf


class Heartbeat:
    """Two threads: one renews the file `heartbeat`, the other notices that a phase does not end in which no optimizer
    step is completed. A disk that hangs holds the first one only.

    A stall is told once, by a line of the log and by `tell`; the next step that is completed gets it as its alert, and
    the file has it as long as it lasts.

    folder: of the run.   stall_after: seconds of one phase within one step, three times as many before the first step
    is completed; but a stall takes at least 10 times the median of the last 1000 steps; infinite: none is ever told.
    seconds: of the steps before, as far as the run has had some.   doing: called in the threads.
    tell: called in a thread with the alert and the step at hand.   every: seconds between two beats.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int = 0,
        stall_after: float = 600.0,
        seconds: Iterable[float] = (),
        doing: Callable[[], Doing] = unknown,
        tell: Callable[[int, Alert], None] = lambda step, alert: None,
        every: float = EVERY,
    ) -> None:
        self._path = Path(folder) / HEARTBEAT
        self._step, self._stall_after = step, stall_after
        self._doing, self._tell = doing, tell
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._completed, self._is_first = time.perf_counter(), True
        self._seconds = deque((x for x in seconds if math.isfinite(x)), maxlen=REMEMBERED)
        self._told: tuple[float, str] | None = None  # when the phase began that is told of, and the message
        self._alerts: list[Alert] = []
        self._beat()
        period = min(every, max(stall_after / 4, 0.01))
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, period), name=f"rlvr-{name}", daemon=True)
            for name, work in (("heartbeat", self._beat), ("stalls", self._look))
        ]
        for thread in self._threads:
            thread.start()

    def step_done(self, step: int) -> list[Alert]:
        """An optimizer step is completed. Returns what is to stand in its record."""
        now = time.perf_counter()
        with self._lock:
            self._seconds.append(now - self._completed)
            self._step, self._completed, self._is_first, self._told = step, now, False, None
            alerts, self._alerts = self._alerts, []
        return alerts

    def close(self) -> None:
        """End the threads and remove the file."""
        self._stop.set()
        until = time.perf_counter() + 5.0  # a dead file system may hold one; they are daemons
        for thread in self._threads:
            thread.join(max(0.0, until - time.perf_counter()))
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)

    def _repeat(self, work: Callable[[], None], period: float) -> None:
        while not self._stop.wait(period):
            try:
                work()
            except Exception:  # whatever `doing` or `tell` meet, the run goes on and is seen to
                logger.warning("the watch for stalls failed", exc_info=True)

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    def _beat(self) -> None:
        doing, began = "", -math.inf
        with contextlib.suppress(Exception):  # which `_look` tells
            doing, began = self._doing()
        now, clock = time.time(), time.perf_counter()
        with self._lock:
            began = max(began, self._completed)
            stall = self._told[1] if self._told is not None and self._told[0] == began else None
            told = {"step": self._step, "doing": doing, "since": now - (clock - began), "stall": stall}
        with contextlib.suppress(OSError):  # a full disk is told by who writes records
            self._partial.write_text(json.dumps(told) + "\n")
            os.utime(self._partial, (now, now))
            os.replace(self._partial, self._path)

    def _look(self) -> None:
        doing, began = self._doing()
        with self._lock:
            now, began = time.perf_counter(), max(began, self._completed)
            usual = median(self._seconds) if self._seconds else 0.0
            least = self._stall_after * (FIRST_STEP if self._is_first else 1)
            told = self._told is not None and self._told[0] == began
            if told or now - began <= max(least, USUAL_STEPS * usual):
                return
            step = self._step
            since = f"after step {step}" if step else "since the run began"
            at = f"; the run is at: {doing}" if doing else ""
            waited = f"no optimizer step was completed for {now - self._completed:.0f} s"
            alert = Alert("stall", f"{waited} {since}{at}")
            self._told = began, alert.message
            self._alerts.append(alert)
        try:
            self._tell(step + 1, alert)
        finally:  # last: a log may be a file on a disk that hangs
            logger.warning("%s", alert.message)
