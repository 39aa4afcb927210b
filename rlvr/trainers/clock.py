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
        self._stack: list[tuple[str, float]] = []  # each with when it began
        self._since = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1][0]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append((name, self._since))
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    @property
    def doing(self) -> tuple[str, float]:
        """The phase at hand, "" outside of all, and since when, as of time.perf_counter; another thread may ask.

        What an evaluation or a checkpoint consists of is part of it. Other phases begin anew after one within them.
        """
        phases, since = tuple(self._stack), self._since
        whole = next((entry for entry in phases if entry[0] in OUTSIDE_OF_STEPS), None)
        return whole or (phases[-1][0] if phases else "", since)

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
