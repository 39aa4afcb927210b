"""The figures of the page, each a function that draws on a given matplotlib figure."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlvr.law import fit_law

from .comparison import PASSES, Compared, Row, pareto
from .drawing import Draw, Theme, style
from .methods import BAND
from .questions import REFERENCE, BySeed, Estimator, Spending, shortest, window_means
from .records import CLASSES, Record
from .scatter import SCATTER, Sensitivity

MOST = 1.0  # nats: more than that has one color


def top(plain: BySeed) -> float:
    """Nats, where entropy ends on a picture: a policy that explodes goes up to the log of the vocabulary."""
    return 1.7 * max(record.entropy[0] for record in plain.values())


def band(record: Record) -> tuple[float, float]:
    """What the run's thermostat held, nats; the laboratory's where its settings do not say."""
    spec = record.settings.get("thermostat")
    spec = json.loads(spec) if isinstance(spec, str) else spec
    return (spec["low"], spec["high"]) if spec else BAND


def entropy_curves(methods: Mapping[str, BySeed], titles: Mapping[str, str]) -> Draw:
    """Entropy against the rollout: means over seeds and, for GRPO, each seed."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        if "thermostat" in methods:
            low, high = band(next(iter(methods["thermostat"].values())))
            axes.axhspan(low, high, color=theme.grid, alpha=0.5, label="thermostat's band")
        for number, (name, runs) in enumerate(methods.items()):
            length = shortest(runs)
            entropy = np.array([record.entropy[:length] for record in runs.values()])
            look = {**style(number), "marker": None}
            wide = 2.4 if name == REFERENCE else 1.2
            axes.plot(np.arange(1, length + 1), entropy.mean(0), label=titles[name], **{**look, "linewidth": wide})
            if name == REFERENCE:
                axes.fill_between(
                    np.arange(1, length + 1),
                    entropy.min(0),
                    entropy.max(0),
                    color=look["color"],
                    alpha=0.2,
                    linewidth=0,
                )
        axes.set(xlabel="rollout", ylabel="entropy (nats)", ylim=(0, top(methods[REFERENCE])))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return draw


def law_fit(runs: BySeed) -> Draw:
    """Reward against entropy, means over 5 rollouts, with each seed's fit."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        for number, (seed, record) in enumerate(runs.items()):
            entropy, reward = window_means(record.made), window_means(record.reward)
            fit = fit_law(entropy, reward)
            grid = np.linspace(0, max(entropy), 50)
            look = style(number)
            axes.scatter(entropy, reward, s=14, color=look["color"], label=f"seed {seed}, R² {fit.r2:.3f}")
            axes.plot(grid, fit.b - fit.a * np.exp(grid), color=look["color"], linewidth=1)
        axes.set(xlabel="entropy of the policy that made the rollouts (nats)", ylabel="reward", xlim=(0, None))
        axes.legend(loc="lower left")

    return draw


def spent(found: Spending) -> Draw:
    """Share of the gain against the share of the entropy spent."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        entropy, reward = np.array(found.curve).T
        axes.plot([0, 1], [0, 1], color=theme.grid, linewidth=1, label="in step")
        axes.plot(entropy, reward, **{**style(0), "marker": "o"}, label="GRPO, every 5 rollouts, mean over seeds")
        axes.plot(
            [0.73, 0.94],
            [0.76, 0.93],
            linestyle="",
            marker="*",
            markersize=11,
            color=style(1)["color"],
            label="paper, at 1/12 and 1/3 of 2400 steps",
        )
        axes.set(xlabel="share of the entropy spent", ylabel="share of the gain", xlim=(-0.05, 1.05))
        axes.legend(loc="lower right")

    return draw


def differences(rows: Sequence[Row], titles: Mapping[str, str]) -> Draw:
    """Paired differences to GRPO with their intervals: entropy, pass@1 and the largest k."""
    shown = [row for row in rows if row.name != REFERENCE]
    ks = [k for k in PASSES if all(k in row.pass_at for row in rows)]
    panels = [("entropy (nats)", [row.entropy for row in shown])]
    panels += [(f"pass@{k}", [row.pass_at[k] for row in shown]) for k in dict.fromkeys((ks[0], ks[-1]) if ks else ())]

    def draw(figure: Any, theme: Theme) -> None:
        for axes, (label, values) in zip(
            np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True
        ):
            axes.axvline(0, color=theme.ink, linewidth=0.8)
            for place, one in enumerate(values):
                _bar(axes, one, place)
            axes.set(xlabel=f"{label} less GRPO's")
            axes.set_yticks(range(len(shown)), [titles[row.name] for row in shown])
            axes.invert_yaxis() if axes.get_subplotspec().is_first_col() else None
            _clip(axes, [one.difference.mean for one in values])

    return draw


def _bar(axes: Any, one: Compared, place: int) -> None:
    color = style(0 if one.difference.sign > 0 else 1 if one.difference.sign < 0 else 6)["color"]
    half = one.difference.half if math.isfinite(one.difference.half) else 0.0
    axes.errorbar([one.difference.mean], [place], xerr=[half], fmt="o", color=color, capsize=2)


def _clip(axes: Any, means: Sequence[float]) -> None:
    """A policy that explodes would press all others together."""
    if any(abs(mean) > 1 for mean in means):
        axes.set_xlim(-0.5, 0.5)


def class_curves(watched: BySeed) -> Draw:
    """Entropy change summed over the steps, by class of tokens: means over seeds, from the least to the most."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        records = list(watched.values())
        length = min(len(record.measured) for record in records)
        for number, name in enumerate(CLASSES):
            sums = np.cumsum([record.by_class[name][:length] for record in records], axis=1)
            look = {**style(number), "marker": None}
            axes.plot(np.arange(1, length + 1), sums.mean(0), label=name.replace("_", ", "), **look)
            axes.fill_between(np.arange(1, length + 1), sums.min(0), sums.max(0), color=look["color"], alpha=0.2)
        whole = np.cumsum([record.measured[:length] for record in records], axis=1)
        axes.plot(np.arange(1, length + 1), whole.mean(0), color=theme.ink, linewidth=2, label="all tokens")
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set(xlabel="optimizer step that moves the policy", ylabel="entropy change so far (nats)")
        axes.legend()

    return draw


def estimator_bars(found: Sequence[Estimator]) -> Draw:
    """Correlation of each estimator with the measured change, over tokens and over steps."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        for number, kind in enumerate(("tokens", "steps")):
            intervals = [getattr(one, kind)["correlation"] for one in found]
            places = np.arange(len(found)) + 0.18 * (2 * number - 1)
            halves = [one.half if math.isfinite(one.half) else 0 for one in intervals]
            axes.barh(
                places,
                [one.mean for one in intervals],
                0.34,
                xerr=halves,
                color=style(number)["color"],
                ecolor=theme.ink,
                capsize=2,
                label=f"over {kind}",
            )
        axes.axvline(0, color=theme.ink, linewidth=0.8)
        axes.set_yticks(range(len(found)), [one.name for one in found])
        axes.invert_yaxis()
        axes.set(xlabel="correlation of predicted and measured entropy change")
        axes.legend()

    return draw


def length_bars(found: Mapping[str, Mapping[str, Compared]], titles: Mapping[str, str]) -> Draw:
    """Scatter of steps by method."""

    def draw(figure: Any, theme: Theme) -> None:
        for axes, (what, methods) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
            values = [one.value for one in methods.values()]
            axes.bar(
                range(len(values)),
                [v.mean for v in values],
                yerr=[v.half if math.isfinite(v.half) else 0 for v in values],
                color=[style(number)["color"] for number in range(len(values))],
                ecolor=theme.ink,
                capsize=3,
            )
            axes.set_xticks(range(len(values)), [titles[name] for name in methods])
            axes.set_title(SCATTER[what])
        figure.supylabel("scatter over steps", fontsize=9)

    return draw


def knobs(found: Mapping[str, Sensitivity], titles: Mapping[str, str], fields: Mapping[str, str]) -> Draw:
    """Entropy and reward by the place of the knob's value, a line per method; the own setting has a larger mark."""

    def draw(figure: Any, theme: Theme) -> None:
        for axes, what in zip(figure.subplots(1, 2), ("entropy", "reward"), strict=True):
            for number, (name, knob) in enumerate(found.items()):
                values = [getattr(one, what).mean for one in knob.settings]
                look = style(number)
                axes.plot(range(len(values)), values, **look, label=f"{titles[name]}: {fields[name]}")
                own = [i for i, one in enumerate(knob.settings) if one.own]
                axes.plot(
                    own,
                    [values[i] for i in own],
                    linestyle="",
                    marker="o",
                    markersize=8,
                    markerfacecolor="none",
                    color=look["color"],
                )
            axes.set_xticks(range(3), ["low", "middle", "high"])
            axes.set(ylabel="entropy (nats)" if what == "entropy" else "reward", xlabel="value of the knob")
            if what == "entropy":
                axes.set_ylim(0, min(axes.get_ylim()[1], 1.0))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return draw


def pareto_plot(rows: Sequence[Row], titles: Mapping[str, str], k: str) -> Draw:
    """pass@1 against pass@k, entropy as color; methods of the front are ringed."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        on_front = pareto(rows, k)
        shown = [row for row in rows if {"1", k} <= row.pass_at.keys()]
        x, y = ([row.pass_at[key].value for row in shown] for key in ("1", k))
        for side, values in (("xerr", x), ("yerr", y)):
            axes.errorbar(
                [v.mean for v in x],
                [v.mean for v in y],
                **{side: [np.nan_to_num(v.half) for v in values]},
                fmt="none",
                ecolor=theme.ink,
                alpha=0.3,
                elinewidth=1,
            )
        dots = axes.scatter(
            [v.mean for v in x],
            [v.mean for v in y],
            s=42,
            zorder=3,
            cmap="viridis",
            c=[min(row.entropy.value.mean, MOST) for row in shown],
            edgecolors=[theme.ink if row.name in on_front else "none" for row in shown],
        )
        points = sorted(zip(y, x, shown, strict=True), key=lambda point: point[0].mean)
        for number, (b, a, row) in enumerate(points):  # names to the right and to the left by turns, from below
            side, at = (5, "left") if number % 2 else (-5, "right")
            place = {"xytext": (side, 3), "ha": at, "textcoords": "offset points"}
            axes.annotate(titles[row.name], (a.mean, b.mean), fontsize=7, **place)
        figure.colorbar(dots, label="entropy at the end (nats)")
        axes.set(xlabel="pass@1, held out", ylabel=f"pass@{k}, held out")

    return draw
