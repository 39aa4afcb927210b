"""The pictures of a report, in its order, and those that every run has."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlvr.monitor.figures import Picture, Records, Theme, draw_line, legend, log_scale, measured
from rlvr.monitor.instrument_pictures import INSTRUMENTS
from rlvr.monitor.instruments import CRITIC
from rlvr.monitor.metrics import TOUCHED
from rlvr.monitor.records import series
from rlvr.monitor.router_pictures import ROUTERS
from rlvr.monitor.summary import MISMATCH, PHASES


def _entropy_and_reward(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    draw_line(upper, records, "entropy/mean", theme.colors[0], "policy entropy")
    upper.set_ylabel("entropy (nats)")
    upper.set_ylim(bottom=0)
    draw_line(lower, records, "reward/mean", theme.colors[1], "training reward")
    at, rewards = series(records.evals, "heldout/reward")
    if rewards:
        widths = dict(zip(*series(records.evals, "heldout/reward_ci95"), strict=True))
        bars = [widths.get(step, 0.0) for step in at]
        lower.errorbar(
            at, rewards, yerr=bars, color=theme.ink, fmt="D", markersize=4, capsize=3, label="held-out, 95 % interval"
        )
    lower.set_ylabel("reward")
    lower.set_xlabel("optimizer step")
    legend(upper)
    legend(lower)


def _touched(figure: Any, records: Records, theme: Theme) -> None:
    names = [name for name in TOUCHED if measured(records, name)]
    columns = min(2, len(names))
    grid = figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False)
    for number, (axes, name) in enumerate(zip(grid.flat, names, strict=False)):
        draw_line(axes, records, name, theme.colors[number % 5], name)
        axes.set_title(name)
        axes.set_ylim(bottom=0)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    figure.supylabel("fraction of trained tokens", fontsize=9)
    figure.supxlabel("optimizer step", fontsize=9)


def _critic(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.axhline(0, color=theme.ink, linewidth=0.8)
    draw_line(upper, records, "critic/explained_variance", theme.colors[0], "explained variance of the rollout")
    upper.set_ylabel("fraction")
    lower.axhline(0, color=theme.ink, linewidth=0.8)
    at, low = series(records.steps, "advantage/p05")
    high = series(records.steps, "advantage/p95")[1]
    lower.fill_between(at, low, high, color=theme.colors[1], alpha=0.25, linewidth=0, label="90 % of the tokens")
    draw_line(lower, records, "advantage/p50", theme.colors[1], "median advantage")
    lower.set_ylabel("reward")
    lower.set_xlabel("optimizer step")
    legend(upper)
    legend(lower)


def _mismatch(figure: Any, records: Records, theme: Theme) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    rows = (
        ("abs_logp_max", "max |log-prob gap|", ":"),
        ("abs_logp_mean", "mean |log-prob gap|", "-"),
        ("kl", "KL", "--"),
    )
    for color, (name, label, dash) in zip(theme.colors, rows, strict=False):
        draw_line(upper, records, f"mismatch/{name}", color, label, dash)
    rows = (
        ("ratio_max", "largest ratio", ":"),
        ("ratio_mean", "mean ratio", "-"),
        ("ratio_min", "smallest ratio", "--"),
    )
    for color, (name, label, dash) in zip(theme.colors, rows, strict=False):
        draw_line(lower, records, f"mismatch/{name}", color, label, dash)
    lower.axhline(1, color=theme.ink, linewidth=0.8)
    for axes, label in ((upper, "nats"), (lower, "trainer / engine")):
        log_scale(axes)
        axes.set_ylabel(label)
        legend(axes)
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
    legend(axes, columns=6)


def rounds(steps: Sequence[dict[str, Any]], most: int) -> list[list[dict[str, Any]]]:
    """The records cut before steps that made a rollout, into at most `most` pieces of equally many rollouts."""
    starts = [at for at, record in enumerate(steps) if record["metrics"].get("time/rollout", 0) > 0]
    starts = [0, *(at for at in starts if at > 0)] if starts else list(range(len(steps)))
    cuts = starts[:: -(-len(starts) // most)]
    return [list(steps[begin:end]) for begin, end in zip(cuts, [*cuts[1:], len(steps)], strict=True)]


def _seconds(chunk: Sequence[dict[str, Any]], phase: str) -> float:
    return sum(series(chunk, f"time/{phase}")[1]) / len(chunk)


PICTURES = (
    Picture(
        "entropy_and_reward",
        "Entropy and reward",
        ("entropy/mean", "reward/mean", "heldout/reward", "heldout/reward_ci95"),
        _entropy_and_reward,
        note=lambda _: (
            "Normal: reward rises while entropy falls ever slower. Entropy near 0 and a reward that no "
            "longer rises: nothing new is sampled; start again with a control or a thermostat."
        ),
    ),
    Picture(
        "critic",
        "What the critic knows, and the advantages it leaves",
        (*CRITIC, "critic/loss", *(f"advantage/{name}" for name in ("p05", "p50", "p95"))),
        _critic,
        every=True,
        optional=True,
        note=lambda _: (
            "Normal: explained variance climbs from 0, and the band narrows. Near 0: advantages are rewards less a "
            "constant; raise critic_learning_rate or critic_warmup_steps. Below 0: the critic misleads; lower it."
        ),
    ),
    *ROUTERS,
    *INSTRUMENTS,
    Picture(
        "touched",
        "What the controls and the clip touched",
        TOUCHED,
        _touched,
        optional=True,
        note=lambda _: (
            "Normal: near the fraction that the control was given. 0 throughout: it does nothing, check "
            "its bounds; above 0.05 for a clip: lower the learning rate, or update less often per rollout."
        ),
    ),
    Picture(
        "mismatch",
        "Engine against trainer",
        tuple(MISMATCH),
        _mismatch,
        note=lambda _: (
            "Normal: a mean gap near 0.04 nats in bf16, 1e-5 in fp32, and a mean ratio of 1. A gap that "
            "grows biases every step: use the engine correction, or fp32 for the engine."
        ),
    ),
    Picture(
        "time",
        "Time per optimizer step",
        tuple(f"time/{name}" for name in (*PHASES, "step") if name != "critic"),  # that only PPO has
        _time,
        note=lambda _: "Normal: rollout and update take nearly all. The tallest part is what is worth making faster.",
    ),
)
