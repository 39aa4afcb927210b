"""Follows a file of JSON lines that another process appends to, shortens or replaces."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import orjson

from rlvr.errors import ConfigError

T = TypeVar("T")

CHUNK = 1 << 20  # bytes read at once
MARK = 64  # bytes before the place reached that must still be there
DAMAGE = (ValueError, KeyError, TypeError)


def parse_json(line: bytes) -> Any:
    """One line. Raises: ValueError if it is not JSON; NaN and halves of surrogate pairs are taken."""
    try:
        return orjson.loads(line)
    except ValueError:
        try:
            return json.loads(line)
        except RecursionError as error:
            raise ValueError(str(error)) from error


class Tail(Generic[T]):
    """Every record of a file once, in order.

    parse: a line to a record; raises ValueError, KeyError or TypeError for a damaged one.
    offset: bytes read.   lines: read so far.   size: of the file when last looked at.
    generation: grows when the file turned out to be another one, and is read from its start again.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T]) -> None:
        self.path = path
        self.generation = 0
        self.size = 0
        self._parse = parse
        self._key: tuple[int, ...] | None = None
        self._restart()

    def _restart(self) -> None:
        self.offset = 0
        self.lines = 0
        self._mark = b""
        self._unended = False  # the last record came from a line whose end was not written yet

    @property
    def key(self) -> tuple[int, ...] | None:
        """Changes with the file, as far as the file system tells; None if there is no file."""
        return self._key

    def look(self) -> int:
        """Bytes that are there to be read."""
        try:
            found = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            if self._key is not None:
                self._replaced()
            self._key, self.size = None, 0
            return 0
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if key != self._key:
            other = self._key is not None and key[:2] != self._key[:2]
            if other or found.st_size < self.offset or not self._mark_is_there():
                self._replaced()
            self._key, self.size = key, found.st_size
        return self.size - self.offset

    def _replaced(self) -> None:
        self.generation += 1
        self._restart()

    def _mark_is_there(self) -> bool:
        if not self._mark:
            return True
        with open(self.path, "rb") as file:
            file.seek(self.offset - len(self._mark))
            return file.read(len(self._mark)) == self._mark

    def read(self) -> Iterator[list[T]]:
        """The records that were not given yet, some thousands at once. Call `look` before.

        Raises: ConfigError for a damaged line that is not the last.
        """
        if self._key is None or self.offset >= self.size:
            return
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            found = os.fstat(file.fileno())
            while (found.st_dev, found.st_ino) == self._key[:2] and (records := self._read_some(file)):
                yield records

    def _read_some(self, file: BinaryIO) -> list[T]:
        data, at_end = self._data(file)
        if self._unended and data:
            self._unended = False
            if data[:1] == b"\n":
                self._advance(data[:1])
                data = data[1:]
        lines = data.split(b"\n")
        rest = lines.pop()
        records: list[T] = []
        for line in lines:
            try:
                records.append(self._parse(line))
            except DAMAGE as error:
                if at_end and len(records) == len(lines) - 1 and not rest:
                    break
                number = self.lines + len(records) + 1
                raise ConfigError(f"{self.path} line {number} is damaged; delete that line") from error
        taken = lines[: len(records)]
        self.lines += len(taken)
        self._advance(data[: sum(map(len, taken)) + len(taken)])
        return records + self._whole(rest) if rest and at_end else records

    def _data(self, file: BinaryIO) -> tuple[bytes, bool]:
        """What comes next, one line at least, and whether the file ends there."""
        wanted = CHUNK
        while True:
            file.seek(self.offset)
            data = file.read(wanted)
            at_end = self.offset + len(data) >= os.fstat(file.fileno()).st_size
            if at_end or b"\n" in data:
                return data, at_end
            wanted *= 2

    def _whole(self, rest: bytes) -> list[T]:
        """The record of a last line of which all but its end is written."""
        try:
            record = self._parse(rest)
        except DAMAGE:
            return []
        self.lines += 1
        self._advance(rest)
        self._unended = True
        return [record]

    def _advance(self, read: bytes) -> None:
        self.offset += len(read)
        self._mark = (self._mark + read[-MARK:])[-MARK:]
