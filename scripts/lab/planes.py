"""Figures with pass@k of the methods in a plane."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .comparison import Row, pareto
from .drawing import Draw, Theme, style
from .figures import MOST
from .questions import BySeed, at
from .records import stopped


def entropy_plane(rows: Sequence[Row], plain: BySeed, titles: Mapping[str, str], largest: str) -> Draw:
    """pass@1 and pass@`largest` against entropy: the way of GRPO through its stops, and where the methods end."""

    def draw(figure: Any, theme: Theme) -> None:
        records = list(plain.values())
        for axes, k in zip(figure.subplots(1, 2), dict.fromkeys(("1", largest)), strict=False):
            way = [*([stopped(one, int(count)) for one in records] for count in records[0].stops), records]
            x = [np.mean([at(one.entropy, 1.0) for one in ends]) for ends in way]
            y = [np.mean([one.pass_at[k] for one in ends]) for ends in way]
            axes.plot(x, y, color=theme.ink, marker=".", linewidth=1, label="GRPO on its way")
            for number, row in enumerate(rows):
                entropy, rate = row.entropy.value, row.pass_at[k].value
                look = {**style(number + number // 6), "linestyle": "", "elinewidth": 1, "alpha": 0.8}
                axes.errorbar(entropy.mean, rate.mean, yerr=np.nan_to_num(rate.half), label=titles[row.name], **look)
            axes.invert_xaxis()
            axes.set(xlabel="entropy (nats)", ylabel=f"pass@{k}, held out")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return draw


def pareto_plot(rows: Sequence[Row], titles: Mapping[str, str], k: str) -> Draw:
    """pass@1 against pass@k, entropy as color, a number for each method; those of the front are ringed."""

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
            s=120,
            zorder=3,
            cmap="viridis",
            c=[min(row.entropy.value.mean, MOST) for row in shown],
            edgecolors=[theme.ink if row.name in on_front else "none" for row in shown],
        )
        for number, (a, b, row) in enumerate(zip(x, y, shown, strict=True), 1):
            ink = "black" if dots.norm(row.entropy.value.mean) > 0.6 else "white"
            axes.annotate(f"{number}", (a.mean, b.mean), color=ink, fontsize=6.5, ha="center", va="center", zorder=4)
            axes.plot([], [], " ", label=f"{number}  {titles[row.name]}")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), handlelength=0)
        figure.colorbar(dots, label="entropy at the end (nats)", location="bottom", shrink=0.7)
        axes.set(xlabel="pass@1, held out", ylabel=f"pass@{k}, held out")

    return draw
