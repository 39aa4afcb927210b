"""What the page is made of: sections with tables, and how numbers are written in them."""

import math
from dataclasses import dataclass

from .comparison import Compared
from .drawing import Draw
from .intervals import Interval


@dataclass(frozen=True, slots=True)
class Table:
    """head: of the columns.   rows: of cells, as many as the head has.   notes: below it."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """anchor: also the name of the figure's file.   answer: numbers in a sentence, generated.   claim: the papers'."""

    anchor: str
    title: str
    answer: str
    claim: str
    tables: tuple[Table, ...] = ()
    draw: Draw | None = None
    height: float = 4.2
    notes: tuple[str, ...] = ()


def number(x: float) -> str:
    """With three decimals; with an exponent where these would say nothing, or too much."""
    if math.isnan(x):
        return "?"
    plain = abs(x) < 1e-9 or 5e-4 <= abs(x) < 1e3  # less than the first is rounding
    return f"{x:.3f}" if plain else f"{x:.0e}"


def signed(x: float) -> str:
    return f"+{number(x)}" if x > 0 else number(x)


def stated(one: Interval, sign: bool = False) -> str:
    """mean ± half width."""
    mean = signed(one.mean) if sign else number(one.mean)
    return mean if math.isnan(one.half) else f"{mean} ± {number(one.half)}"


def compared(one: Compared, reference: bool = False) -> tuple[str, str]:
    """Value, and difference to GRPO with a star where its interval excludes 0.   reference: it is GRPO itself."""
    if reference:
        return stated(one.value), ""
    return stated(one.value), stated(one.difference, sign=True) + (" *" if one.difference.sign else "")
