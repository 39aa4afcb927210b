"""Verifiers that a random model earns something from; the recipes import them as a user's own."""

from typing import Any


def share_of_ascii(completion: str, answer: str, **row: Any) -> float:
    return sum(c.isascii() for c in completion) / max(1, len(completion))
