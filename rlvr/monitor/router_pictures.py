"""Pictures of a mixture of LoRA experts: how certain its routers are, and which experts they use."""

from typing import Any

import numpy as np

from rlvr.monitor.figures import Picture, Records, Theme, color_ramp, draw_line, legend


def _routers(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    draw_line(upper, records, "router/entropy", theme.colors[0], "Tsallis entropy of the routers")
    draw_line(upper, records, "router/soft", theme.colors[1], "tokens sent to all experts", "--")
    upper.set_ylabel("0 to 1")
    upper.set_ylim(0, 1.02)
    draw_line(lower, records, "router/load_max", theme.colors[2], "largest load, in even shares")
    draw_line(lower, records, "router/experts", theme.colors[3], "experts per token", "--")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("optimizer step")
    legend(upper)
    legend(lower)


def _loads(figure: Any, records: Records, theme: Theme) -> None:
    """Of the last step: rows are experts, columns are routers from the first layer to the last."""
    last = next(record["routers"] for record in reversed(records.steps) if record.get("routers"))
    most = max(len(load) for load in last["load"])
    share = np.full((most, len(last["load"])), np.nan)
    for column, load in enumerate(last["load"]):
        share[: len(load), column] = np.array(load) * len(load)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    upper.plot(np.arange(share.shape[1]) + 0.5, last["entropy"], color=theme.colors[0], label="Tsallis entropy")
    upper.plot(np.arange(share.shape[1]) + 0.5, last["soft"], "--", color=theme.colors[1], label="sent to all experts")
    upper.set_ylim(0, 1.02)
    legend(upper)
    heat = lower.pcolormesh(np.arange(share.shape[1] + 1), np.arange(most + 1), share, cmap=color_ramp(theme), vmin=0)
    lower.set_yticks(np.arange(most) + 0.5, range(most))
    lower.grid(visible=False)
    lower.set_ylabel("expert")
    lower.set_xlabel(f"router, of {last['layers'][0]} to {last['layers'][-1]}")
    figure.colorbar(heat, ax=lower, label="load (even: 1)").outline.set_visible(False)


def _by_layer(records: Records) -> bool:
    return any(record.get("routers") for record in records.steps)


ROUTERS = (
    Picture(
        "routers",
        "Routers: how certain, and how even",
        ("router/entropy", "router/soft", "router/load_max", "router/experts"),
        _routers,
        optional=True,
        note=lambda _: (
            "Normal: entropy falls and tokens settle on few experts, with a largest load of 1 to 2. Everything soft: "
            "lower the threshold or raise entropy_coef. A load far above 2: raise balance_coef."
        ),
    ),
    Picture(
        "router_loads",
        "Experts of each router in the last step",
        ("router/load_max",),
        _loads,
        optional=True,
        ready=_by_layer,
        note=lambda _: (
            "Normal: no dark rows or cells. Experts without load are dead: raise balance_coef, or take fewer."
        ),
    ),
)
