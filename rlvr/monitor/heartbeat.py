"""Says from beside a run that it lives, and when it does not get on."""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

from rlvr.alarm import Alert
from rlvr.monitor.status import HEARTBEAT

logger = logging.getLogger(__name__)

EVERY = 10.0  # seconds
USUAL_STEPS = 10  # a step may take so many times as long as usual
REMEMBERED = 1000  # steps


class Heartbeat:
    """A thread that renews the time of the file `heartbeat`, and notices when no optimizer step is completed.

    A stall is told once, by a line of the log and by `tell`; the next step that is completed gets it as its alert.

    folder: of the run.   stall_after: seconds; but a stall takes at least 10 times the median of the last 1000 steps;
    infinite: none is ever told.   doing: what the run is at, "" if that is not known; called in the thread.
    tell: called in the thread with the alert and the step at hand.   every: seconds between two beats.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int = 0,
        stall_after: float = 600.0,
        doing: Callable[[], str] = lambda: "",
        tell: Callable[[int, Alert], None] = lambda step, alert: None,
        every: float = EVERY,
    ) -> None:
        self._path = Path(folder) / HEARTBEAT
        self._step, self._stall_after, self._every = step, stall_after, every
        self._doing, self._tell = doing, tell
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._since, self._told = time.monotonic(), False
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._alerts: list[Alert] = []
        self._beat()
        self._thread = threading.Thread(target=self._run, name="rlvr-heartbeat", daemon=True)
        self._thread.start()

    def step_done(self, step: int) -> list[Alert]:
        """An optimizer step is completed. Returns what is to stand in its record."""
        now = time.monotonic()
        with self._lock:
            self._seconds.append(now - self._since)
            self._step, self._since, self._told = step, now, False
            alerts, self._alerts = self._alerts, []
        return alerts

    def close(self) -> None:
        """End the thread and remove the file."""
        self._stop.set()
        self._thread.join(5.0)  # a dead file system may hold it; it is a daemon
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.wait(min(self._every, max(self._stall_after / 4, 0.01))):
            self._beat()
            try:
                self._look()
            except Exception:  # whatever `doing` or `tell` meet, the run goes on and is seen to
                logger.warning("the watch for stalls failed", exc_info=True)

    def _beat(self) -> None:
        now = time.time()
        with contextlib.suppress(OSError):  # a full disk is told by who writes records
            self._path.touch()
            os.utime(self._path, (now, now))

    def _look(self) -> None:
        with self._lock:
            waited = time.monotonic() - self._since
            usual = median(self._seconds) if self._seconds else 0.0
            if self._told or waited <= max(self._stall_after, USUAL_STEPS * usual):
                return
            self._told = True
            step, doing = self._step, self._doing()
            since = f"after step {step}" if step else "since the run began"
            at = f"; the run is at: {doing}" if doing else ""
            alert = Alert("stall", f"no optimizer step was completed for {waited:.0f} s {since}{at}")
            self._alerts.append(alert)
        logger.warning("%s", alert.message)
        self._tell(step + 1, alert)
