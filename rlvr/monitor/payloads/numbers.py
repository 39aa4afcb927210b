"""Numbers as a page gets them: six digits are more than a screen shows, and half the bytes."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson

DIGITS = 6
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(301)])


def significant(values: Any, digits: int = DIGITS) -> np.ndarray:
    """Rounded to so many significant digits; not finite ones as they are, of which `to_json` makes null."""
    x = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = digits - 1 - np.floor(np.log10(np.abs(x)))
    usual = np.isfinite(x) & (np.abs(shift) <= 300)
    shift = np.where(usual, shift, 0).astype(np.int64)
    up, down = _POWERS[np.maximum(shift, 0)], _POWERS[np.maximum(-shift, 0)]  # both exact, one of them 1
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.round(x * up / down) / up * down
    return np.where(usual & np.isfinite(rounded), rounded, x)


def number(value: float | None) -> float | None:
    """One of them."""
    return None if value is None or not np.isfinite(value) else float(significant(value))


def whole(values: np.ndarray) -> np.ndarray:
    """Counts without a decimal point, where all of them are counts."""
    return values.astype(np.int64) if np.isfinite(values).all() else values


def to_json(payload: Any) -> bytes:
    """Strict JSON: null for what is no finite number, a replacement sign for half of a surrogate pair."""
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    try:
        return orjson.dumps(payload, option=options, default=_plain)
    except TypeError:
        return orjson.dumps(_encodable(payload), option=options, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # not contiguous, or of a type that orjson does not know
        return value.tolist()
    if isinstance(value, Iterable):
        return list(value)
    return str(value)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(entry) for entry in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return float(value) if abs(value) < 2**1023 else str(value)
    return value
