"""The names and shapes in which a run's measurements go to wandb, trackio and TensorBoard."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.metrics import METRICS

COLUMNS = ("step", "sequence", "prompt", "completion", "reward", "advantage", "entropy", "length")
LONGEST = 4000  # characters of a prompt or completion; the run directory has all of them


def own_names(logs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Split what a trainer logs: numbers that METRICS explains, under its names, and what only TRL and transformers
    measure. A held-out evaluation with a name of its own stays with the latter.
    """
    ours, theirs = {}, {}
    for key, value in logs.items():
        name = key.removeprefix("eval_") if key.startswith("eval_heldout/") else key
        if name not in METRICS and not name.endswith("/effect"):
            theirs[key] = value
        elif value is not None:  # TRL's word for a mean over nothing
            ours[name] = value
    return ours, theirs


def finite_edges(name: str) -> list[float]:
    """n + 2 edges of a histogram's n + 1 bins. The two open ones end where no system asks for infinity: the first at 0
    where all edges are positive, else it is as wide as its neighbor; so is the last.
    """
    edges = HISTOGRAMS[name].edges
    first = 0.0 if edges[0] > 0 else 2 * edges[0] - edges[1]
    return [first, *edges, 2 * edges[-1] - edges[-2]]


def inert(text: str) -> str:
    """The same to read in Markdown and HTML, where a model's output must do nothing. A line break is shown as ⏎."""
    return "".join(c if c.isalnum() or c == " " else "⏎" if c == "\n" else f"&#{ord(c)};" for c in text)


def sample_row(step: int, row: Mapping[str, Any]) -> list[Any]:
    """Values of COLUMNS, None for a NaN; `entropy` is the mean over the completion's tokens, in nats."""
    entropy = row["entropy"]
    mean = sum(entropy) / len(entropy) if entropy else None
    texts = [_cut(row["prompt"]), _cut(row["completion"])]
    numbers = [None if x is None or math.isnan(x) else x for x in (row["reward"], row["advantage"], mean)]
    return [step, row["sequence"], *texts, *numbers, len(row["token_ids"])]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST} more characters)"


def raw_histogram(counts: Sequence[int], edges: Sequence[float]) -> dict[str, Any]:
    """Arguments of `add_histogram_raw`: sums are as if each token were in the middle of its bin.

    TensorBoard draws the bins from the first to the last that hold anything, between `min` and `max`.
    """
    held = [i for i, count in enumerate(counts) if count] or [0]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return {
        "min": edges[held[0]],
        "max": edges[held[-1] + 1],
        "num": sum(counts),
        "sum": sum(n * x for n, x in zip(counts, middles, strict=True)),
        "sum_squares": sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        "bucket_limits": list(edges[1:]),
        "bucket_counts": list(counts),
    }


def markdown(rows: Iterable[Sequence[Any]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    shown = [["" if x is None else f"{x:.4g}" if isinstance(x, float) else inert(str(x)) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *shown])
