"""How a picture of a run is drawn: matplotlib's Agg canvas, two themes; no display, no global state."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlvr.monitor.records import series


@dataclass(frozen=True, slots=True)
class Records:
    """What the pictures are drawn from: the step records, the evaluations and run.json of one run."""

    steps: Sequence[dict[str, Any]]
    evals: Sequence[dict[str, Any]]
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Theme:
    """colors: told apart with any color vision (Okabe and Ito).   ramp: the part of cividis that shows on `paper`."""

    paper: str
    ink: str
    grid: str
    colors: tuple[str, ...]
    ramp: tuple[float, float]


LIGHT = Theme(
    "#ffffff",
    "#23272e",
    "#dfe3e8",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a9099"),
    (0, 0.9),
)
DARK = Theme(
    "#1b1f26",
    "#dfe3e8",
    "#363c46",
    ("#56B4E9", "#E69F00", "#2BBF95", "#CC79A7", "#F0E442", "#D55E00", "#8a9099"),
    (0.4, 1),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """draw: puts the picture on an empty figure.   needs: one of these must be recorded, or all of them if `every`.

    note: what is normal and what to do, in one line.   optional: left out of a report where it cannot be drawn.
    ready: what must hold of the records besides.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    draw: Callable[[Any, Records, Theme], None]
    every: bool = False
    note: Callable[[Records], str] = lambda _: ""
    optional: bool = False
    ready: Callable[[Records], bool] = lambda _: True

    def metrics(self, records: Records) -> list[str]:
        """The metrics of the picture that were recorded; [] if it cannot be drawn."""
        found = [name for name in self.needs if measured(records, name)]
        return [] if (self.every and len(found) < len(self.needs)) or not self.ready(records) else found


def render(picture: Picture, records: Records, theme: Theme) -> bytes:
    """The picture as PNG, 7.2 inches wide at 150 dots per inch."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "axes.titlelocation": "left",
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "text.color": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
        picture.draw(figure, records, theme)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()


def measured(records: Records, name: str) -> bool:
    """Whether there is something to draw; a clip that never acted is nothing, and many surrogates have none."""
    values = series(records.evals if name.startswith("heldout/") else records.steps, name)[1]
    return any(values) if name.startswith("clip/") else bool(values)


def draw_line(axes: Any, records: Records, name: str, color: str, label: str, dash: str = "-") -> None:
    """A metric against the step; a long one as its running mean over the faint raw values."""
    at, values = series(records.steps, name)
    if not values:
        return
    window = max(1, len(values) // 40)
    if window == 1:
        marker = "o" if len(values) == 1 else ""
        axes.plot(at, values, dash, color=color, label=label, marker=marker, markersize=4)
        return
    axes.plot(at, values, dash, color=color, alpha=0.3, linewidth=0.8)
    kernel = np.ones(window)
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    axes.plot(at, smooth, dash, color=color, label=f"{label} (mean of {window})")


def legend(axes: Any, columns: int = 3) -> None:
    """Above the axes, on the left."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.6)


def log_scale(axes: Any) -> None:
    """A logarithmic axis with plain numbers for what is positive; the rest cannot be shown on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    if drawn:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) < 100 * min(drawn) else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def color_ramp(theme: Theme) -> Any:
    """cividis, as far as it shows on the theme's paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["cividis"](np.linspace(*theme.ramp, 256)))
