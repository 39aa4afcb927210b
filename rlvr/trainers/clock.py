"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OUTSIDE_OF_STEPS = ("evaluation", "checkpoint")


class PhaseClock:
    """Seconds per phase; a nested phase's seconds are its own and not its parent's, so phases add up to the whole."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    @property
    def doing(self) -> str:
        """The phase at hand, "" outside of all; another thread may ask. An evaluation's rollout is an evaluation."""
        phases = tuple(self._stack)
        return next((phase for phase in phases if phase in OUTSIDE_OF_STEPS), phases[-1] if phases else "")

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, every call of it under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Seconds since the last `take`, by phase."""
        self._charge()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
