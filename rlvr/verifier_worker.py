"""The process at the other end of a VerifierPool: builds one verifier, then judges one row per message until its
input ends. Imports neither torch nor trl."""

import math
import numbers
import os
import threading
import time
from typing import Any

from rlvr.child_process import read_message, take_standard_streams, write_message
from rlvr.verifiers import Verify, build_verifier


def main() -> None:
    """In: {verify, kwargs, parent}, then {row} each. Out: {ready} or {fatal}, then {value} or {error} each."""
    requests, replies = take_standard_streams()
    setup = read_message(requests)
    if setup is None:
        return
    threading.Thread(target=_die_with, args=(setup["parent"],), daemon=True).start()
    try:
        verify = build_verifier(setup["verify"], setup["kwargs"])
    except Exception as error:
        write_message(replies, {"fatal": f"{type(error).__name__}: {error}"})
        return
    write_message(replies, {"ready": True})
    while (message := read_message(requests)) is not None:
        write_message(replies, judge(verify, message["row"]))


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


def _die_with(parent: int) -> None:
    """Exit once the trainer is gone, even in the middle of a verification that never ends."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
