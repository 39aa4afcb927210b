"""How a picture of the lab is drawn: matplotlib's Agg canvas, on light or dark ground; no display, no global state."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a9099")  # Okabe and Ito
MARKS = ("o", "s", "^")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colors of text, grid and ground."""

    ink: str
    grid: str
    ground: str


LIGHT, DARK = Theme("#23272e", "#dfe3e8", "#ffffff"), Theme("#d6dbe2", "#39414c", "#181c22")

Draw = Callable[[Any, Theme], None]


def style(number: int) -> dict[str, Any]:
    """Color, line and mark of the number-th of several things: 21 are told apart."""
    turn = number // len(COLORS) % len(MARKS)
    return {"color": COLORS[number % len(COLORS)], "linestyle": ("-", "--", ":")[turn], "marker": MARKS[turn]}


def render(draw: Draw, theme: Theme = LIGHT, height: float = 4.2) -> bytes:
    """What `draw` puts on an empty figure as PNG, 7.2 inches wide at 150 dots per inch."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, height), dpi=150, layout="constrained")
        draw(figure, theme)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
