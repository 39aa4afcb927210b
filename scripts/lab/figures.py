"""The figures of the page, each a function that draws on a given matplotlib figure."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rlvr.law import fit_law

from .comparison import PASSES, Compared, Row
from .drawing import Draw, Theme, style
from .methods import BAND, REFERENCE
from .questions import BySeed, Estimator, Spending, shortest, window_means
from .records import CLASSES, Record
from .scatter import SCATTER, Sensitivity

MOST = 1.0  # nats: what a policy that explodes has more is not drawn


def top(plain: BySeed) -> float:
    """Nats, where entropy ends on a picture: a policy that explodes goes up to the log of the vocabulary."""
    return 1.7 * max(record.entropy[0] for record in plain.values())


def band(record: Record) -> tuple[float, float]:
    """What the run's thermostat held, nats; the laboratory's where its settings do not say."""
    spec = record.settings.get("thermostat")
    spec = json.loads(spec) if isinstance(spec, str) else spec
    return (spec["low"], spec["high"]) if spec else BAND


def entropy_curves(methods: Mapping[str, BySeed], held: Collection[str], titles: Mapping[str, str]) -> Draw:
    """Entropy against the rollout: means over seeds, for GRPO their range too; methods that do not hold it in gray."""

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        if "thermostat" in methods:
            low, high = band(next(iter(methods["thermostat"].values())))
            axes.axhspan(low, high, color=theme.grid, alpha=0.5, label="thermostat's band")
        colored, gray, highest = 0, "do not hold it", 0.0
        for name, runs in methods.items():
            length = shortest(runs)
            entropy = np.array([record.entropy[:length] for record in runs.values()])
            highest = max(highest, entropy.mean(0).max())
            if name != REFERENCE and name not in held:
                axes.plot(
                    np.arange(1, length + 1), entropy.mean(0), color=style(6)["color"], linewidth=0.8, label=gray
                )
                gray = "_"  # one entry of the legend for all
                continue
            look = {**style(colored + colored // 6), "marker": None}  # gray is the seventh
            colored += 1
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
        axes.set(xlabel="rollout", ylabel="entropy (nats)", ylim=(0, min(1.1 * highest, top(methods[REFERENCE]))))
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
    """Entropy and reward by the knob's value, a panel per method; the own setting is marked by a line."""
    means = [x.mean for knob in found.values() for one in knob.settings for x in (one.entropy, one.reward)]
    most = 1.1 * max(mean for mean in means if mean < MOST)

    def draw(figure: Any, theme: Theme) -> None:
        panels = list(figure.subplots(-(-len(found) // 4), 4, sharey=True, squeeze=False).flat)
        for axes, (name, knob) in zip(panels, found.items(), strict=False):
            places = range(len(knob.settings))
            for number, what in enumerate(("entropy", "reward")):
                values = [getattr(one, what) for one in knob.settings]
                bars = [np.nan_to_num(one.half) for one in values]
                axes.errorbar(
                    places, [one.mean for one in values], yerr=bars, **style(number), capsize=2, label=_unit(what)
                )
                for place, one in zip(places, values, strict=True):
                    if one.mean > most:
                        axes.annotate(f"{one.mean:.1f} ↑", (place, 0.9 * most), ha="right", fontsize=7)
            for place, one in enumerate(knob.settings):
                if one.own:
                    axes.axvline(place, color=theme.ink, linewidth=0.8, linestyle=":")
            axes.set_xticks(places, [f"{one.value:g}" for one in knob.settings], fontsize=7)
            axes.set(xlim=(-0.4, len(knob.settings) - 0.6), ylim=(0, most))
            axes.set_title(f"{titles[name]}\n{fields[name]}", fontsize=7.5)
        for axes in panels[len(found) :]:
            axes.set_axis_off()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)

    return draw


def _unit(what: str) -> str:
    return "entropy (nats)" if what == "entropy" else what
