"""Reads the steps of a run while it is written: what is new at once, of a long file a sketch first."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from rlvr.errors import ConfigError
from rlvr.monitor.records import STEPS
from rlvr.monitor.table import Table, parse_step
from rlvr.monitor.tail import DAMAGE, Tail

EAGER = 4 << 20  # bytes that are read while somebody waits
SKETCH_LINES = 500
SKETCH_BYTES = 2 << 20
RETRY = 10.0  # seconds

Steps = Tail[dict[str, Any]]


class History:
    """The step records of one run.

    table: those read so far; of a long file a sketch, made of lines at evenly spaced places and the last one, until
    `read_all` has read the others.   read: share of the file that has been read.
    lock: to be held around `refresh` and while `table` is looked at.
    """

    def __init__(self, run_dir: str | Path, eager: int = EAGER, retry: float = RETRY) -> None:
        """eager: bytes of the file that `refresh` reads at most; of more it makes a sketch.

        retry: seconds until a file with more than that, which was damaged and has changed, is read again.
        """
        self.path = Path(run_dir) / STEPS
        self.lock = threading.Lock()
        self.table = Table()
        self.read = 1.0
        self.pending = False  # `read_all` has something to do
        self._eager, self._retry = eager, retry
        self._whole: tuple[Steps, Table] = (Tail(self.path, parse_step), self.table)
        self._generation = 0
        self._damage: tuple[ConfigError, float, object] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Changes whenever `table` does."""
        tail, _ = self._whole
        return (tail.key, tail.offset, self.pending)

    @property
    def num_steps(self) -> int:
        """Records in the file, of a sketch the number that the steps of its ends tell."""
        if self.table.count and self.table is not self._whole[1]:
            return int(self.table.step[-1] - self.table.step[0]) + 1
        return self.table.count

    def refresh(self) -> None:
        """Read what was appended, or all of it if the file is another one.

        Raises: ConfigError for a damaged line that is not the last.
        """
        tail, table = self._whole
        unread = tail.look()
        if tail.generation != self._generation:
            self._generation = tail.generation
            self.table = table = Table()
            self._whole = (tail, table)
        self._raise_damage(tail.key)
        self.pending = unread > self._eager
        if self.pending:
            if table.count == 0 and self.table is table:
                self.table = sketch(self.path)
            self.read = min(self.read, 0.999) if tail.offset == 0 else tail.offset / tail.size
            return
        try:
            for records in tail.read():
                table.extend(records)
        except ConfigError as error:
            self._damage = (error, time.monotonic(), tail.key)
            raise
        self.table, self.read = table, 1.0

    def read_all(self, pause: Callable[[], None] = lambda: None) -> None:
        """Read the whole file and put it in the place of what is shown. Slow: to be called without the lock.

        pause: called now and then, to let others go first.
        """
        tail, table = Tail(self.path, parse_step), Table()
        size = max(tail.look(), 1)
        try:
            for records in tail.read():
                table.extend(records)
                self.read = min(tail.offset / size, 0.999)
                pause()
        except ConfigError as error:
            with self.lock:
                self._damage, self.pending = (error, time.monotonic(), tail.key), False
            return
        table.fit()
        with self.lock:
            self._whole, self._generation = (tail, table), tail.generation
            self.table, self.read, self.pending = table, 1.0, False

    def _raise_damage(self, key: object) -> None:
        if self._damage is not None:
            error, when, damaged = self._damage
            long = self._whole[0].size > self._eager
            if key == damaged or (long and time.monotonic() - when < self._retry):
                self.pending = False
                raise error
            self._damage = None


def sketch(path: Path, lines: int = SKETCH_LINES, most: int = SKETCH_BYTES) -> Table:
    """Records at evenly spaced places of a file, and its last one.

    lines: how many; fewer if these are more than `most` bytes. Damaged ones are left out: who reads all of the file
    will say so.
    """
    table = Table()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first, last = _line_from(file, 0, size), _last_record(file, size)
        if last is None:
            return table
        usual = (len((first or last)[1]) + len(last[1])) / 2
        count = max(2, min(lines, int(most / usual)))
        found: dict[int, dict[str, Any]] = {}
        for number in range(count - 1):
            line = _line_from(file, size * number // (count - 1), size) if number else first
            if line is not None and (record := _record(line[1])) is not None:
                found[line[0]] = record
        found[last[0]] = last[2]
    table.extend([found[at] for at in sorted(found)])
    return table


def _line_from(file: BinaryIO, at: int, size: int, guess: int = 1 << 13) -> tuple[int, bytes] | None:
    """(where it begins, the line): the first whole line that begins at `at` or later."""
    begin = max(at - 1, 0)  # a line begins at `at` if the byte before ends one
    while True:
        file.seek(begin)
        data = file.read(guess)
        start = 0 if at == 0 else data.find(b"\n") + 1
        end = data.find(b"\n", start) if start or at == 0 else -1
        if end >= 0:
            return begin + start, data[start:end]
        if begin + len(data) >= size:
            return None
        guess *= 4


def _last_record(file: BinaryIO, size: int) -> tuple[int, bytes, dict[str, Any]] | None:
    """The last line that is a record."""
    guess = 1 << 14
    while True:
        begin = max(size - guess, 0)
        file.seek(begin)
        data = file.read(size - begin)
        start = 0 if begin == 0 else data.find(b"\n") + 1
        lines = data[start:].split(b"\n") if start or begin == 0 else []
        end = begin + len(data)
        for line in reversed(lines):
            if (record := _record(line)) is not None:
                return end - len(line), line, record
            end -= len(line) + 1
        if begin == 0:
            return None
        guess *= 4


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_step(line)
    except DAMAGE:
        return None
