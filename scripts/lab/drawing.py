"""How a picture of the lab is drawn: matplotlib's Agg canvas; no display, no global state."""

import io
from collections.abc import Callable
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a9099")  # Okabe and Ito
INK, GRID = "#23272e", "#dfe3e8"


def render(draw: Callable[[Any], None]) -> bytes:
    """What `draw` puts on an empty figure as PNG, 7.2 inches wide at 150 dots per inch."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelsize": 9,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
        draw(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()
