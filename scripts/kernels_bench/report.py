"""The tables in Markdown and the figure."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

from .accuracy import Errors
from .measure import Entrant, Result

FORWARD, BACKWARD, MEMORY = "#0072B2", "#E69F00", "#009E73"  # Okabe and Ito's palette, for all kinds of colour vision
MIB = 2**20


def sides_table(entrants: Iterable[Entrant]) -> str:
    rows = []
    for e in entrants:
        gradients = "log-prob, entropy" if e.side.entropy else "log-prob"
        rows.append([e.name, e.side.logits, gradients, e.side.moments, e.side.note, e.why or "runs"])
    return table(["side", "logits between the products", "gradients", "moments", "note", "here"], rows)


def results_table(results: Sequence[Result], against: str) -> str:
    """Ratios are to the side `against` in the same repetition."""
    ours = next(result for result in results if result.name == against)
    rows = []
    for result in results:
        low, middle, high = _quartiles([1e3 * t for t in result.total])
        ratio = median(a / b for a, b in zip(result.total, ours.total, strict=True))
        rows.append(
            [
                result.name,
                f"{1e3 * median(result.forward):,.1f}",
                f"{1e3 * median(result.backward):,.1f}",
                f"{middle:,.1f} ({low:,.1f} to {high:,.1f})",
                f"{ratio:.2f}",
                f"{result.peak / MIB:,.1f}",
                f"{result.peak / ours.peak:.2f}",
            ]
        )
    header = ["side", "forward ms", "backward ms", "both, median (quartiles)", "x ours", "peak MiB", "x ours"]
    return table(header, rows)


def errors_table(errors: Iterable[Errors]) -> str:
    header = ["side", "log-prob max", "log-prob mean", "entropy max", "gradient by hidden", "gradient by weight"]
    return table(header, ([e.name, *("" if x is None else f"{x:.1e}" for x in e[1:])] for e in errors))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(panels: Mapping[str, Sequence[Result]], path: Path) -> None:
    """One row per panel: milliseconds, forward and backward, and the peak of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(results) + 2 for results in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(11, 0.36 * sum(heights)), squeeze=False, sharey="row", height_ratios=heights
    )
    for (title, results), (time, memory) in zip(panels.items(), axes, strict=True):
        names = [result.name for result in results]
        forward, backward = ([1e3 * median(t) for t in part] for part in zip(*(r[1:3] for r in results), strict=True))
        low, _, high = zip(*(_quartiles([1e3 * t for t in r.total]) for r in results), strict=True)
        time.barh(names, forward, color=FORWARD, label="forward")
        time.barh(names, backward, left=forward, color=BACKWARD, label="backward", hatch="//", edgecolor="white")
        time.hlines(names, low, high, color="black")
        time.set_title(title, loc="left", fontsize=10)
        time.set_xlabel("ms, medians; line: quartiles of the sum")
        bars = memory.barh(names, [result.peak / MIB for result in results], color=MEMORY)
        memory.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        memory.margins(x=0.15)
        memory.set_xlabel("peak MiB beyond the inputs")
        time.invert_yaxis()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right", ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
