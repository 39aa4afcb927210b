"""What the instruments of a run found: the law of reward and entropy, the thermostat, the dynamics of entropy."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlvr.law import LawFit, fit_law
from rlvr.monitor.records import rollout_points, series
from rlvr.thermostat import Thermostat

# Tokens by the sign of their advantage and the side of exp(-H) on which their probability lies.
CLASSES = ("rewarded_likely", "rewarded_unlikely", "punished_likely", "punished_unlikely")
ESTIMATORS = ("discriminator", "covariance", "single_logit", "steer", "steer_released")
CRITIC = ("critic/explained_variance", "critic/value", "critic/earned")
LABEL, WIDTH = 18, 100  # columns of the summary


@dataclass(frozen=True, slots=True)
class Holding:
    """How a thermostat did.

    thermostat: its settings, None if the run's configuration does not hold them.   inside: share of the last `steps`
    steps with entropy inside the band.   value, position: of the lever, now.   outside: steps in a row outside the
    band until now, negative below it.
    """

    thermostat: Thermostat | None
    inside: float
    steps: int
    value: float
    position: float
    outside: int


@dataclass(frozen=True, slots=True)
class Dynamics:
    """Means over the `steps` watched optimizer steps.

    measured, predicted: entropy change of the probe's tokens, nats; predicted is that of an SGD step.
    correlations: over tokens, of each estimator with the measured change.   by_class: the part of `measured` at each
    class of tokens, with "advantage_0" for those that are in none.   effects: what each control adds to `predicted`.
    """

    steps: int
    measured: float
    predicted: float
    correlations: dict[str, float]
    by_class: dict[str, float]
    effects: dict[str, float]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a critic knew of the first and last `window` rollouts before it learned from them, means over them.

    explained_variance: of what was earned.   bias: value less what was earned, at the end.
    """

    first: float
    last: float
    window: int
    bias: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of a mixture of experts, means over the first and last `window` steps: the routers' entropy, tokens sent to all
    experts; at the end experts per token, and the share of experts that are dead.
    """

    entropy: tuple[float, float]
    soft: tuple[float, float]
    window: int
    experts: float
    dead: float


@dataclass(frozen=True, slots=True)
class Instruments:
    """None: not recorded."""

    critic: Knowledge | None
    routers: Traffic | None
    law: LawFit | None
    thermostat: Holding | None
    dynamics: Dynamics | None


def read_instruments(run: Mapping[str, Any], steps: Sequence[dict[str, Any]]) -> Instruments:
    """run: of run.json.   steps: of steps.jsonl."""
    return Instruments(_knowledge(steps), _traffic(steps), law_found(steps), _holding(run, steps), _dynamics(steps))


def _knowledge(steps: Sequence[dict[str, Any]]) -> Knowledge | None:
    """One record of each rollout: its metrics are repeated at every step that trains on it."""
    made = [record for record in steps if record["metrics"].get("time/rollout", 0) > 0]
    known, values, earned = (series(made, name)[1] for name in CRITIC)
    if not known:
        return None
    window = min(10, max(1, len(known) // 5))
    bias = fmean(values[-window:]) - fmean(earned[-window:])
    return Knowledge(fmean(known[:window]), fmean(known[-window:]), window, bias)


def _traffic(steps: Sequence[dict[str, Any]]) -> Traffic | None:
    entropy, soft, experts, dead = (
        series(steps, f"router/{name}")[1] for name in ("entropy", "soft", "experts", "dead")
    )
    if not (entropy and soft and experts and dead):
        return None
    window = min(10, max(1, len(entropy) // 5))
    (h, h_last), (all_of, all_last) = ((fmean(x[:window]), fmean(x[-window:])) for x in (entropy, soft))
    return Traffic((h, h_last), (all_of, all_last), window, fmean(experts[-window:]), fmean(dead[-window:]))


def law_found(steps: Sequence[dict[str, Any]]) -> LawFit | None:
    """The law fitted to all rollouts of the run."""
    points = rollout_points(steps)
    return fit_law(*zip(*points, strict=True)) if points else None


def thermostat_of(run: Mapping[str, Any]) -> Thermostat | None:
    """The settings of the run's thermostat, those of its last resumption; None if there are none, or no valid ones."""
    spec = run.get("config", {}).get("thermostat")
    for resumption in run.get("resumed", ())[-1:]:  # each tells what differs from the run's first configuration
        spec = resumption.get("changed_config", {}).get("thermostat", spec)
    try:
        return Thermostat(**(json.loads(spec) if isinstance(spec, str) else spec))
    except (TypeError, ValueError):
        return None


def _holding(run: Mapping[str, Any], steps: Sequence[dict[str, Any]]) -> Holding | None:
    outside = series(steps, "thermostat/outside")[1]
    value, position = (series(steps, f"thermostat/{name}")[1] for name in ("value", "position"))
    if not (outside and value and position):
        return None
    late = outside[len(outside) // 2 :]
    inside = sum(not steps_out for steps_out in late) / len(late)
    return Holding(thermostat_of(run), inside, len(late), value[-1], position[-1], int(outside[-1]))


def _dynamics(steps: Sequence[dict[str, Any]]) -> Dynamics | None:
    measured, predicted = (series(steps, f"dynamics/{name}")[1] for name in ("measured", "predicted"))
    if not (measured and predicted):
        return None
    recorded = {name for record in steps for name in record["metrics"]}
    controls = sorted(name.removesuffix("/effect") for name in recorded if name.endswith("/effect"))
    return Dynamics(
        steps=len(measured),
        measured=fmean(measured),
        predicted=fmean(predicted),
        correlations=_means(steps, {name: f"dynamics/{name}_correlation" for name in ESTIMATORS}),
        by_class={name: fmean(values) for name, (_, values) in class_series(steps).items()},
        effects=_means(steps, {name: f"{name}/effect" for name in controls}),
    )


def class_series(steps: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and measured entropy change of each class of tokens, and of "advantage_0": what the classes leave of the
    whole. Such tokens are moved by the others, whose parameters they share, and by penalties and bonuses.
    """
    names = ["dynamics/measured", *(f"dynamics/measured_{name}" for name in CLASSES)]
    whole = [r for r in steps if all(math.isfinite(r["metrics"].get(name, math.nan)) for name in names)]
    found = {name: series(whole, f"dynamics/measured_{name}") for name in CLASSES}
    at, values = series(whole, "dynamics/measured")
    rest = [value - sum(parts) for value, *parts in zip(values, *(found[name][1] for name in CLASSES), strict=True)]
    return {name: one for name, one in (found | {"advantage_0": (at, rest)}).items() if one[1]}


def _means(steps: Sequence[dict[str, Any]], names: Mapping[str, str]) -> dict[str, float]:
    found = {key: series(steps, name)[1] for key, name in names.items()}
    return {key: fmean(values) for key, values in found.items() if values}


# ------------------------------------------------------------------------------------------------------------- as text


def instrument_rows(found: Instruments) -> list[str]:
    """Lines of the summary, a block for each instrument that was recorded."""
    rows: list[str] = []
    if found.critic is not None:
        rows += _block("critic", [_critic_line(found.critic)])
    if found.routers is not None:
        rows += _block("routers", [_traffic_line(found.routers)])
    if found.law is not None:
        rows += _block("law", [law_formula(found.law), law_verdict(found.law)])
    if found.thermostat is not None:
        rows += _block("thermostat", _holding_lines(found.thermostat))
    if found.dynamics is not None:
        rows += _block("entropy dynamics", _dynamics_lines(found.dynamics))
    return rows


def _critic_line(found: Knowledge) -> str:
    rollouts = f"mean of {found.window} rollouts" if found.window > 1 else "one rollout"
    return (
        f"explains {100 * found.first:.0f} % of the variance of what is earned at first, {100 * found.last:.0f} % at "
        f"last ({rollouts}); values {abs(found.bias):.3f} too {'high' if found.bias > 0 else 'low'}"
    )


def _traffic_line(found: Traffic) -> str:
    (h, h_last), (soft, soft_last) = found.entropy, found.soft
    dead = f"; {100 * found.dead:.0f} % of the experts are dead" if found.dead else ""
    return (
        f"Tsallis entropy {h:.2f} at first, {h_last:.2f} at last (mean of {_count(found.window, 'step')}); "
        f"{100 * soft:.0f} %, {100 * soft_last:.0f} % of the tokens are sent to all experts; "
        f"{found.experts:.1f} experts a token{dead}"
    )


def law_formula(law: LawFit) -> str:
    """The fit and what it explains."""
    fit = f"{law_line(law)} over {_count(law.num_points, 'rollout')}"
    return fit if math.isnan(law.r2) else f"{fit}, R2 {law.r2:.3f} (a straight line in H: {law.r2_linear:.3f})"


def law_line(law: LawFit) -> str:
    """`R = -0.250 exp(H) + 0.900`."""
    return f"R = {-law.a:.3f} exp(H) {'-' if law.b < 0 else '+'} {abs(law.b):.3f}"


def law_verdict(law: LawFit) -> str:
    """Whether to believe the fit, and what it predicts if so."""
    if law.verdict != "holds":
        return f"{law.verdict}: {law.reason}"
    interval = f"[{law.ceiling_low:.3f}, {law.ceiling_high:.3f}]"
    return f"predicted ceiling {law.ceiling:.3f} {interval}, if the law holds down to H = 0"


def _holding_lines(found: Holding) -> list[str]:
    settings = found.thermostat
    lever = settings.lever if settings else "lever"
    band = f"the band [{settings.low:g}, {settings.high:g}] nats" if settings else "the band"
    alarm = settings is not None and abs(found.outside) >= settings.patience
    lines = [f"inside {band} in {100 * found.inside:.0f} % of the last {_count(found.steps, 'step')}"]
    side, limit = ("below", 1) if found.outside < 0 else ("above", 0)
    if found.outside and found.position == limit:
        lines.append(f"{lever} at {found.value:.4g}, the end of its range: widen it")
    else:
        lines.append(f"{lever} at {found.value:.4g}, {100 * found.position:.0f} % of the way to most entropy")
    if found.outside:
        lines.append(f"{'WARNING: ' if alarm else ''}{side} the band for {_count(abs(found.outside), 'step')} now")
    return lines


def _dynamics_lines(found: Dynamics) -> list[str]:
    lines = [
        f"{found.measured:+.2g} nats per step measured, {found.predicted:+.1e} predicted for SGD "
        f"({_count(found.steps, 'step')} watched)"
    ]
    if found.correlations:
        lines.append(_correlation_line(found.correlations))
    spent = {name: value for name, value in found.by_class.items() if value < 0}
    if spent:
        most = min(spent, key=spent.__getitem__)
        lines.append(f"tokens that spend most entropy: {class_label(most)} ({spent[most]:+.2g} nats per step)")
    for name, effect in found.effects.items():
        lines.append(f"{name} adds {effect:+.1e} to the prediction; without it {found.predicted - effect:+.1e}")
    return lines


def _correlation_line(correlations: Mapping[str, float]) -> str:
    best = max(correlations, key=correlations.__getitem__)
    text = f"best {best} {correlations[best]:.2f}"
    if best != "discriminator" and "discriminator" in correlations:
        text = f"discriminator {correlations['discriminator']:.2f}, {text}"
    return f"correlation over tokens: {text}"


def class_label(name: str) -> str:
    """`rewarded, likely` or `advantage 0`."""
    return name.replace("_", ", " if name in CLASSES else " ")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _block(label: str, lines: Sequence[str]) -> list[str]:
    """The lines beside a label, wrapped to the width of a terminal."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH - LABEL)]
    return [f"{label if number == 0 else '':<{LABEL}}{line}" for number, line in enumerate(wrapped)]
