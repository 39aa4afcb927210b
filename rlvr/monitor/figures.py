"""The pictures of a run, drawn from its records with matplotlib's Agg canvas: no display, no global state."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlvr.monitor.metrics import TOUCHED
from rlvr.monitor.records import series
from rlvr.monitor.summary import MISMATCH, PHASES


@dataclass(frozen=True, slots=True)
class Records:
    """What the pictures are drawn from: the step records and the evaluations of one run."""

    steps: Sequence[dict[str, Any]]
    evals: Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Theme:
    """colors: told apart with any color vision (Okabe and Ito).   ramp: the part of cividis that shows on `paper`."""

    paper: str
    ink: str
    grid: str
    colors: tuple[str, ...]
    ramp: tuple[float, float]


LIGHT = Theme(
    "#ffffff", "#23272e", "#dfe3e8", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#8a9099"), (0, 0.9)
)
DARK = Theme(
    "#1b1f26", "#dfe3e8", "#363c46", ("#56B4E9", "#E69F00", "#2BBF95", "#CC79A7", "#F0E442", "#8a9099"), (0.4, 1)
)


@dataclass(frozen=True, slots=True)
class Picture:
    """draw: puts the picture on an empty figure.   needs: one of these must be recorded, or all of them if `every`."""

    name: str
    title: str
    needs: tuple[str, ...]
    draw: Callable[[Any, Records, Theme], None]
    every: bool = False

    def metrics(self, records: Records) -> list[str]:
        """The metrics of the picture that were recorded; [] if it cannot be drawn."""
        measured = [name for name in self.needs if _measured(records, name)]
        return [] if self.every and len(measured) < len(self.needs) else measured


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


def _measured(records: Records, name: str) -> bool:
    return bool(series(records.evals if name.startswith("heldout/") else records.steps, name)[1])


def _line(axes: Any, records: Records, name: str, color: str, label: str, dash: str = "-") -> None:
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


def _legend(axes: Any, columns: int = 3) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.6)


def _entropy_and_reward(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    _line(upper, records, "entropy/mean", theme.colors[0], "policy entropy")
    upper.set_ylabel("entropy (nats)")
    upper.set_ylim(bottom=0)
    _line(lower, records, "reward/mean", theme.colors[1], "training reward")
    at, rewards = series(records.evals, "heldout/reward")
    if rewards:
        widths = dict(zip(*series(records.evals, "heldout/reward_ci95"), strict=True))
        bars = [widths.get(step, 0.0) for step in at]
        lower.errorbar(
            at, rewards, yerr=bars, color=theme.ink, fmt="D", markersize=4, capsize=3, label="held-out, 95 % interval"
        )
    lower.set_ylabel("reward")
    lower.set_xlabel("optimizer step")
    _legend(upper)
    _legend(lower)


def _touched(figure: Any, records: Records, theme: Theme) -> None:
    names = [name for name in TOUCHED if _measured(records, name)]
    columns = min(2, len(names))
    grid = figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False)
    for number, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        _line(axes, records, name, theme.colors[number % 5], name)
        axes.set_title(name)
        axes.set_ylim(bottom=0)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    figure.supylabel("fraction of trained tokens", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)


def _mismatch(figure: Any, records: Records, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    upper, lower = figure.subplots(2, 1, sharex=True)
    rows = (
        ("abs_logp_max", "max |log-prob gap|", ":"),
        ("abs_logp_mean", "mean |log-prob gap|", "-"),
        ("kl", "KL", "--"),
    )
    for color, (name, label, dash) in zip(theme.colors, rows, strict=False):
        _line(upper, records, f"mismatch/{name}", color, label, dash)
    rows = (
        ("ratio_max", "largest ratio", ":"),
        ("ratio_mean", "mean ratio", "-"),
        ("ratio_min", "smallest ratio", "--"),
    )
    for color, (name, label, dash) in zip(theme.colors, rows, strict=False):
        _line(lower, records, f"mismatch/{name}", color, label, dash)
    lower.axhline(1, color=theme.ink, linewidth=0.8)
    for axes, label in ((upper, "nats"), (lower, "trainer / engine")):
        drawn = [value for line in axes.lines for value in line.get_ydata()]
        if drawn and min(drawn) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) < 100 * min(drawn) else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(label)
        _legend(axes)
    lower.set_xlabel("optimizer step")


def _time(figure: Any, records: Records, theme: Theme) -> None:
    """Stacked bars of seconds per optimizer step; a bar covers whole rollouts, so that bars compare."""
    axes = figure.subplots()
    chunks = rounds(records.steps, most=60)
    left = np.array([chunk[0]["step"] - 0.5 for chunk in chunks])
    width = np.array([chunk[-1]["step"] + 0.5 for chunk in chunks]) - left
    whole = np.array([_seconds(chunk, "step") for chunk in chunks])
    bottom = np.zeros(len(chunks))
    for color, name in zip(theme.colors, (*PHASES, "other"), strict=True):
        spent = np.maximum(whole - bottom, 0) if name == "other" else np.array([_seconds(c, name) for c in chunks])
        if spent.any():
            style = {"color": color, "edgecolor": theme.paper, "linewidth": 0.4}
            axes.bar(left, spent, width, bottom, align="edge", label=name, **style)
        bottom = bottom + spent
    axes.set_ylabel("seconds per optimizer step")
    axes.set_xlabel("optimizer step")
    _legend(axes, columns=6)


def rounds(steps: Sequence[dict[str, Any]], most: int) -> list[list[dict[str, Any]]]:
    """The records cut before steps that made a rollout, into at most `most` pieces of equally many rollouts."""
    starts = [at for at, record in enumerate(steps) if record["metrics"].get("time/rollout", 0) > 0]
    starts = [0, *(at for at in starts if at > 0)] if starts else list(range(len(steps)))
    cuts = starts[:: -(-len(starts) // most)]
    return [list(steps[begin:end]) for begin, end in zip(cuts, [*cuts[1:], len(steps)], strict=True)]


def _seconds(chunk: Sequence[dict[str, Any]], phase: str) -> float:
    return sum(series(chunk, f"time/{phase}")[1]) / len(chunk)


def _reward_against_entropy(figure: Any, records: Records, theme: Theme) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    axes = figure.subplots()
    entropy = dict(zip(*series(records.steps, "entropy/mean"), strict=True))
    points = [(at, value) for at, value in zip(*series(records.steps, "reward/mean"), strict=True) if at in entropy]
    at = [step for step, _ in points]
    ramp = ListedColormap(colormaps["cividis"](np.linspace(*theme.ramp, 256)))
    marks = axes.scatter(np.exp([entropy[step] for step in at]), [value for _, value in points], c=at, cmap=ramp, s=16)
    axes.set_xlabel("exp(entropy/mean)")
    axes.set_ylabel("reward/mean")
    bar = figure.colorbar(marks, ax=axes, label="optimizer step")
    bar.outline.set_visible(False)


PICTURES = (
    Picture(
        "entropy_and_reward",
        "Entropy and reward",
        ("entropy/mean", "reward/mean", "heldout/reward", "heldout/reward_ci95"),
        _entropy_and_reward,
    ),
    Picture("touched", "What the controls and the clip touched", TOUCHED, _touched),
    Picture(
        "reward_against_entropy",
        "Reward against exp(entropy)",
        ("entropy/mean", "reward/mean"),
        _reward_against_entropy,
        every=True,
    ),
    Picture("mismatch", "Engine against trainer", tuple(MISMATCH), _mismatch),
    Picture("time", "Time per optimizer step", tuple(f"time/{name}" for name in (*PHASES, "step")), _time),
)
