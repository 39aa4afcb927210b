"""The pictures of what the instruments recorded; each is part of a report where there is something to draw."""

from itertools import pairwise
from typing import Any

import numpy as np

from rlvr.law import LawFit
from rlvr.monitor.figures import Picture, Records, Theme, color_ramp, draw_line, legend, log_scale, measured
from rlvr.monitor.instruments import (
    CLASSES,
    ESTIMATORS,
    class_label,
    class_series,
    law_formula,
    law_found,
    law_line,
    law_verdict,
    thermostat_of,
)
from rlvr.monitor.records import rollout_points, series

COVARIANCES = ("top_2_in_10000", "top_2_in_1000", "top_2_in_100", "top_2_in_10")
PASS = tuple(f"heldout/pass_at_{2**i}" for i in range(13))


def _thermostat(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    settings = thermostat_of(records.run)
    if settings is not None:
        label = f"band {settings.low:g} to {settings.high:g}"
        upper.axhspan(settings.low, settings.high, color=theme.colors[2], alpha=0.2, linewidth=0, label=label)
    draw_line(upper, records, "entropy/mean", theme.colors[0], "policy entropy")
    upper.set_ylabel("entropy (nats)")
    upper.set_ylim(bottom=0)
    lower.step(*series(records.steps, "thermostat/value"), where="post", color=theme.colors[1])
    lower.set_ylabel(settings.lever if settings else "lever")
    if settings is not None and settings.scale == "log":
        log_scale(lower)
    lower.set_xlabel("optimizer step")
    legend(upper)


def _law(figure: Any, records: Records, theme: Theme) -> None:
    """The line goes as far as it is believed: to H = 0 if the law holds, else no further than the points."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    points = rollout_points(records.steps)
    x, rewards = np.exp([h for h, _ in points]), [r for _, r in points]
    marks = axes.scatter(x, rewards, c=range(1, len(points) + 1), cmap=color_ramp(theme), s=20, zorder=3)
    law = law_found(records.steps)
    if law is not None and len(set(x)) > 1:
        _law_line(axes, law, x, theme)
    axes.set_xlabel("exp(entropy)")
    axes.set_ylabel("reward")
    legend(axes)
    bar = figure.colorbar(marks, ax=axes, label="rollout", ticks=MaxNLocator(integer=True))
    bar.outline.set_visible(False)


def _law_line(axes: Any, law: LawFit, x: np.ndarray, theme: Theme) -> None:
    ends = np.array([x.min(), x.max()])
    color = theme.colors[1]
    axes.plot(ends, law.b - law.a * ends, color=color, label=law_line(law))
    if law.verdict != "holds":
        return
    beyond = np.array([1.0, x.min()])
    axes.plot(beyond, law.b - law.a * beyond, "--", color=color, label="extrapolated to H = 0")
    reach = [[law.ceiling - law.ceiling_low], [law.ceiling_high - law.ceiling]]
    axes.errorbar(
        [1.0], [law.ceiling], reach, color=theme.ink, fmt="D", markersize=5, capsize=4, label="ceiling, 95 %"
    )


def _law_note(records: Records) -> str:
    law = law_found(records.steps)
    if law is None:
        return ""
    advice = {
        "holds": "What is left to gain by spending entropy is the distance to the ceiling; if that is little, go on "
        "with other data or a larger model.",
        "not yet": "No ceiling is drawn: train on.",
        "does not hold here": "Read no ceiling from the line.",
    }[law.verdict]
    return f"Normal: points climb to the left along a line. {law_formula(law)}; {law_verdict(law)}. {advice}"


def _dynamics(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
    at, changes = series(records.steps, "dynamics/measured")
    steps, predicted = series(records.steps, "dynamics/predicted")
    size = np.sqrt(np.mean(np.square(predicted)))
    scale = np.sqrt(np.mean(np.square(changes))) / size if size else 1.0
    upper.axhline(0, color=theme.ink, linewidth=0.8)
    style = {"marker": "o", "markersize": 3} if len(at) < 80 else {}
    upper.plot(at, changes, color=theme.colors[0], label="measured", **style)
    upper.plot(steps, np.multiply(scale, predicted), "--", color=theme.colors[1], label=f"predicted × {scale:.1e}")
    upper.set_ylabel("entropy change (nats)")
    upper.set_xlabel("optimizer step")
    legend(upper)
    names = [name for name in ESTIMATORS if measured(records, f"dynamics/{name}_correlation")]
    found = [series(records.steps, f"dynamics/{name}_correlation")[1] for name in names]
    for row, values in enumerate(found):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        lower.plot([low, high], [row, row], color=theme.colors[0], linewidth=5, alpha=0.35, solid_capstyle="butt")
        lower.plot([middle], [row], "o", color=theme.colors[0], markersize=6)
    lower.axvline(0, color=theme.ink, linewidth=0.8)
    lower.set_yticks(range(len(names)), names)
    lower.set_ylim(len(names) - 0.5, -0.5)
    lower.set_xlabel("correlation over tokens: median and middle half of the steps")


def _classes(figure: Any, records: Records, theme: Theme) -> None:
    axes = figure.subplots()
    axes.axhline(0, color=theme.ink, linewidth=0.8)
    styles = zip((*theme.colors[:4], theme.colors[-1]), ("-", "--", ":", "-.", "-"), strict=True)
    for (name, (at, values)), (color, dash) in zip(class_series(records.steps).items(), styles, strict=True):
        axes.plot(at, np.cumsum(values), dash, color=color, label=class_label(name))
    at, values = series(records.steps, "dynamics/measured")
    axes.plot(at, np.cumsum(values), color=theme.ink, linewidth=1, label="all tokens")
    axes.set_ylabel("entropy change so far (nats)")
    axes.set_xlabel("optimizer step")
    legend(axes)


def _covariance(figure: Any, records: Records, theme: Theme) -> None:
    axes = figure.subplots()
    for color, name, dash in zip(theme.colors, COVARIANCES, ("-", "--", ":", "-."), strict=False):
        share = 2 / int(name.rpartition("_")[2])
        draw_line(axes, records, f"covariance/{name}", color, f"top {100 * share:g} %", dash)
    log_scale(axes)
    axes.set_ylabel("covariance (nats)")
    axes.set_xlabel("optimizer step")
    legend(axes, columns=2)


def _positions(figure: Any, records: Records, theme: Theme) -> None:
    """Rows are bins of positions, columns are steps; white where no completion was that long."""
    axes = figure.subplots()
    found = [(record["step"], record["entropy_by_position"]) for record in records.steps if _bins(record)]
    edges = max((bins["edges"] for _, bins in found), key=len)  # the bins of a step begin as those of any other
    values = np.full((len(edges), len(found)), np.nan)
    for column, (_, bins) in enumerate(found):
        for row, (mean, count) in enumerate(zip(bins["mean"], bins["count"], strict=True)):
            values[row, column] = mean if count else np.nan
    steps = [step for step, _ in found]
    sides = np.append(np.array(steps) - 0.5, steps[-1] + 0.5)
    heat = axes.pcolormesh(sides, np.arange(len(edges) + 1), values, cmap=color_ramp(theme), vmin=0)
    names = [f"{a:.0f} to {b - 1:.0f}" for a, b in pairwise(edges)] + [f"from {edges[-1]:.0f}"]
    axes.set_yticks(np.arange(len(edges)) + 0.5, names)
    axes.grid(visible=False)
    axes.set_ylabel("position in the completion")
    axes.set_xlabel("optimizer step")
    bar = figure.colorbar(heat, ax=axes, label="entropy (nats)")
    bar.outline.set_visible(False)


def _bins(record: dict[str, Any]) -> int:
    return len(record.get("entropy_by_position", {}).get("edges", ()))


def _coverage(figure: Any, records: Records, theme: Theme) -> None:
    axes = figure.subplots()
    found = [(record["step"], _rates(record)) for record in records.evals if _rates(record)]
    ends = found[:1] + found[1:][-1:]
    for color, (step, rates), mark in zip(theme.colors, ends, ("o--", "D-"), strict=False):
        style = {"color": color, "markersize": 5, "label": f"after step {step}", "clip_on": False}
        axes.plot(list(rates), list(rates.values()), mark, **style)
    axes.set_xscale("log", base=2)
    samples = sorted({k for _, rates in ends for k in rates})
    axes.set_xticks(samples, [str(k) for k in samples])
    axes.set_ylim(0, 1)
    axes.set_ylabel("held-out pass@k")
    axes.set_xlabel("k samples of a prompt")
    legend(axes)


def _rates(record: dict[str, Any]) -> dict[int, float]:
    return {2**i: record["metrics"][name] for i, name in enumerate(PASS) if name in record["metrics"]}


INSTRUMENTS = (
    Picture(
        "thermostat",
        "Thermostat",
        ("entropy/mean", "thermostat/value", "thermostat/position", "thermostat/outside"),
        _thermostat,
        every=True,
        optional=True,
        note=lambda _: (
            "Normal: entropy inside the band, the lever away from the ends of its range. Outside with the "
            "lever at an end: widen its range, or move the band. Swinging: lower gain and integral_gain."
        ),
    ),
    Picture(
        "law",
        "Reward against exp(entropy)",
        ("entropy/mean", "reward/mean"),
        _law,
        every=True,
        optional=True,
        note=_law_note,
        ready=lambda records: bool(rollout_points(records.steps)),
    ),
    Picture(
        "dynamics",
        "What the steps did to entropy, predicted and measured",
        ("dynamics/measured", "dynamics/predicted", *(f"dynamics/{name}_correlation" for name in ESTIMATORS)),
        _dynamics,
        optional=True,
        ready=lambda records: measured(records, "dynamics/measured") and measured(records, "dynamics/predicted"),
        note=lambda _: (
            "Normal: correlations of 0.2 to 0.3, because tokens share parameters, and a scale far from 1, "
            "because Adam's step is not SGD's. Near 0: raise probe_sequences, and do not trust the controls' effects."
        ),
    ),
    Picture(
        "classes",
        "Which tokens spend the entropy",
        ("dynamics/measured", *(f"dynamics/measured_{name}" for name in CLASSES)),
        _classes,
        every=True,
        optional=True,
        note=lambda _: (
            "Sum over the watched steps. Normal: rewarded, likely and punished, unlikely tokens spend entropy, the "
            "others return it; hold back with a control what falls fastest. Advantage 0: moved by the others."
        ),
    ),
    Picture(
        "covariance",
        "Largest covariances of log-prob and advantage",
        ("covariance/mean", *(f"covariance/{name}" for name in COVARIANCES)),
        _covariance,
        optional=True,
        note=lambda _: (
            "Normal: few tokens carry nearly all of it, so the lines lie far apart. Tops that grow spend entropy "
            "faster: Clip-Cov and KL-Cov act on these tokens. A gap: no group had two different rewards."
        ),
    ),
    Picture(
        "positions",
        "Entropy by position",
        ("entropy/mean",),
        _positions,
        optional=True,
        ready=lambda records: any(_bins(record) > 1 for record in records.steps),
        note=lambda _: (
            "Normal: rows fade together. A row that fades alone is where the policy becomes certain first: read "
            "the sampled completions below there. Empty: no completion was that long."
        ),
    ),
    Picture(
        "coverage",
        "Held-out pass@k, first and last",
        PASS,
        _coverage,
        optional=True,
        ready=lambda records: any(len(_rates(record)) > 1 for record in records.evals),
        note=lambda _: (
            "Normal: the last curve lies above the first everywhere. Higher at k = 1 and lower at the "
            "largest k: the policy became more certain, not more able; hold more entropy."
        ),
    ),
)
