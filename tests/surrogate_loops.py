"""Each surrogate of test_surrogates.py for one token at a time, in Python floats."""

import math
from collections.abc import Callable

# What each says of one token, in plain Python: (loss, clipped low, clipped high) from A, log r, log pi, log pi_old and
# the log-ratios of the token's sequence. DPPO's of its definition, with the anchor in place of the old policy.
Plain = Callable[[float, float, float, float, list[float]], tuple[float, bool, bool]]


def ppo(a: float, r: float, low: float, high: float) -> tuple[float, bool, bool]:
    loss = max(-a * r, -a * min(max(r, 1 - low), 1 + high))
    return loss, a < 0 and r < 1 - low, a > 0 and r > 1 + high


def dual_clip(a: float, x: float, new: float, old: float, row: list[float]) -> tuple[float, bool, bool]:
    loss, low, high = ppo(a, math.exp(x), 0.2, 0.28)
    return (min(loss, -2.0 * a) if a < 0 else loss), low, high


def sapo(a: float, x: float, new: float, old: float, row: list[float]) -> tuple[float, bool, bool]:
    tau = 2.0 if a > 0 else 3.0
    return -a * 4 / tau / (1 + math.exp(-tau * (math.exp(x) - 1))), False, False


def cispo(a: float, x: float, new: float, old: float, row: list[float]) -> tuple[float, bool, bool]:
    r = math.exp(x)
    return -min(max(r, 0.8), 1.3) * a * new, r < 0.8, r > 1.3


def dppo(a: float, x: float, new: float, old: float, row: list[float]) -> tuple[float, bool, bool]:
    moved = math.exp(new) - math.exp(old)
    low, high = a <= 0 and moved < -0.05, a > 0 and moved > 0.08
    return (0.0 if low or high else -a * math.exp(x)) + 0.1 * x * x, low, high


def gmpo(a: float, x: float, new: float, old: float, row: list[float]) -> tuple[float, bool, bool]:
    held = [min(y, 0.3) if a > 0 else max(y, -0.2) for y in row]
    return -a * math.exp(sum(held) / len(held)), a < 0 and x < -0.2, a > 0 and x > 0.3


PLAIN: dict[str, Plain] = {
    "ppo_clip": dual_clip,
    "unclipped": lambda a, x, new, old, row: (-a * math.exp(x), False, False),
    "gpg": lambda a, x, new, old, row: (-a * new, False, False),
    "sapo": sapo,
    "cispo": cispo,
    "dppo": dppo,
    "gspo": lambda a, x, new, old, row: ppo(a, math.exp(sum(row) / len(row)), 0.02, 0.03),
    "gmpo": gmpo,
}
