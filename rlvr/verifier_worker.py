"""The process at the other end of a VerifierPool: builds one verifier, then judges one row per message until its
input ends, inside a fence. Imports neither torch nor trl."""

import contextlib
import math
import numbers
import os
import shutil
from typing import Any

from rlvr.child_process import read_message, take_standard_streams, write_message
from rlvr.verifier_fence import Limits, descendants, end_descendants, enter_fence
from rlvr.verifiers import Verify, build_verifier


def main() -> None:
    """In: {verify, kwargs, parent, limits}, then {row} each. Out: {ready} or {fatal}, {value} or {error} each, and at
    the end {ended}."""
    requests, replies = take_standard_streams()
    setup = read_message(requests)
    if setup is None:
        return
    folder = enter_fence(Limits(**setup["limits"]), setup["parent"], replies)
    try:
        verify = build_verifier(setup["verify"], setup["kwargs"])
    except Exception as error:
        write_message(replies, {"fatal": f"{type(error).__name__}: {error}"})
        return
    me, leftovers = os.getpid(), Leftovers(folder)
    leftovers.remove()
    write_message(replies, {"ready": True})
    while (message := read_message(requests)) is not None:
        verdict = judge(verify, message["row"])
        if os.getpid() != me:  # a copy that the verifier forked and let return
            os._exit(0)
        leftovers.remove()
        write_message(replies, verdict)


def judge(verify: Verify, row: dict[str, Any]) -> dict[str, Any]:
    """{"value": finite float}, or {"error": message} for an exception or a result that is not a finite number."""
    try:
        if not row.keys() >= {"completion", "answer"}:
            raise KeyError(f"a row needs 'completion' and 'answer', this one has {sorted(row)}")
        result = verify(**row)
        if not isinstance(result, numbers.Real):
            return {"error": f"TypeError: the verifier returned {result!r:.200}, not a number"}
        value = float(result)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error!s:.500}"}
    return {"value": value} if math.isfinite(value) else {"error": f"ValueError: the verifier returned {value}"}


class Leftovers:
    """What rows leave behind in the worker's folder and among processes: all that was not there after the import."""

    def __init__(self, folder: str) -> None:
        self._folder, self._files = folder, set(os.listdir(folder))
        self._roots = (os.getppid(), os.getpid())  # orphans are the guard's
        self._processes = frozenset(descendants(self._roots))

    def remove(self) -> None:
        """And return to the folder, which is there again if the row removed it."""
        end_descendants(self._roots, self._processes)
        os.makedirs(self._folder, exist_ok=True)
        os.chdir(self._folder)
        for name in set(os.listdir()) - self._files:
            if os.path.isdir(name) and not os.path.islink(name):
                shutil.rmtree(name, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(name)
