"""Countdown's verifier, which now and then does what a verifier should not: by the completion, so that runs repeat."""

import hashlib
import os
import time

from lab.countdown import verify


def judge(completion: str, answer: str) -> float:
    """answer: the three numbers and the target, as in the prompt."""
    *numbers, _, target, _ = answer.split()
    draw = int.from_bytes(hashlib.sha256(f"{answer} {completion}".encode()).digest()[:4], "big") % 10_000
    for misbehave, share in MISBEHAVIOUR.items():
        if draw < share:
            return misbehave()
        draw -= share
    return verify(completion.split(), [int(n) for n in numbers], int(target))


def _hang() -> float:
    while True:
        time.sleep(60)


def _raise() -> float:
    raise ValueError("a verifier that cannot judge")


def _nan() -> float:
    return float("nan")


def _exit() -> float:
    os._exit(7)


def _flood() -> float:
    return float(len(bytearray(1 << 40)))


def _write() -> float:
    with open("flood", "wb") as file:
        for _ in range(1 << 20):
            file.write(bytes(1 << 20))
    return 1.0


# Of 10,000 completions.
MISBEHAVIOUR = {_hang: 2, _raise: 20, _nan: 20, _exit: 4, _flood: 4, _write: 4}
