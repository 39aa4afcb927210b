"""Fresh interpreters for code that must not share the trainer's process, and the pipes to talk to them.

`multiprocessing` is not used: fork is unsafe next to CUDA and engine threads, and spawn imports `__main__` again,
which restarts a training script that has no main guard. A child here imports one function and nothing else.
"""

import json
import os
import struct
import sys
from typing import Any, BinaryIO

_LENGTH = struct.Struct("!I")
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from importlib import import_module; getattr(import_module(sys.argv[2]), sys.argv[3])()"
)


def import_path() -> list[str]:
    """This process's import path with "" made absolute and the working directory added at the end."""
    here = os.getcwd()
    path = [entry or here for entry in sys.path]
    return path if here in path else [*path, here]


def child_command(entry: str) -> list[str]:
    """The argv of a fresh interpreter that calls `module:function` without arguments, on this process's path."""
    module, function = entry.split(":")
    return [sys.executable, "-P", "-c", _BOOT, json.dumps(import_path()), module, function]


def take_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """In a child: private (input, output) pipes. Prints of the code that runs here go to stderr from now on."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def pack(message: dict[str, Any]) -> bytes:
    """One message as a 4-byte length and JSON. Raises TypeError or ValueError for what JSON cannot hold."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def unpack(buffer: bytearray) -> dict[str, Any] | None:
    """Take the first complete message off the front of `buffer`; None when it has not fully arrived."""
    if len(buffer) < _LENGTH.size:
        return None
    end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
    if len(buffer) < end:
        return None
    message = json.loads(bytes(buffer[_LENGTH.size : end]))
    del buffer[:end]
    return message


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message of a blocking stream, or None at its end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return json.loads(stream.read(_LENGTH.unpack(head)[0]))


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Send one message and flush."""
    stream.write(pack(message))
    stream.flush()
