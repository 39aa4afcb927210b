"""What a run did, in numbers a person would ask for first; pure functions of the run directory."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvr.alarm import KINDS
from rlvr.errors import ConfigError
from rlvr.monitor.evaluations import Heldout, heldout, heldout_rows
from rlvr.monitor.instruments import Instruments, instrument_rows, read_instruments
from rlvr.monitor.metrics import METRICS, TOUCHED
from rlvr.monitor.records import alerts_of, holds_run, read_evals, read_run, read_steps, series

# Phase of an optimizer step -> the metric that counts the tokens it works through.
PHASES: dict[str, str | None] = {
    "rollout": "rollout/tokens",
    "sync_weights": None,
    "old_logps": "rollout/tokens",
    "verify": None,
    "critic": None,
    "update": "policy/tokens",
}
MISMATCH: dict[str, Callable[[Sequence[float]], float] | None] = {  # None: token-weighted mean over the run
    "mismatch/abs_logp_mean": None,
    "mismatch/abs_logp_max": max,
    "mismatch/kl": None,
    "mismatch/ratio_mean": None,
    "mismatch/ratio_min": min,
    "mismatch/ratio_max": max,
}
VERIFIER = ("reward/verifier_timeouts", "reward/verifier_errors", "reward/unscored")


@dataclass(frozen=True, slots=True)
class Change:
    """first, last: means over the first and last `window` records.   low, low_step: the smallest and its step."""

    first: float
    last: float
    window: int
    low: float
    low_step: int


@dataclass(frozen=True, slots=True)
class Phase:
    """seconds: over the run.   share: of the time in optimizer steps.   tokens_per_s: None if nothing to count."""

    name: str
    seconds: float
    share: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """None or an empty collection means that it was not measured. Times in seconds, entropy in nats."""

    run_dir: str
    status: str
    num_steps: int
    last_step: int
    num_resumes: int
    tokens: int
    wall_seconds: float | None
    step_seconds: float | None
    heldout_before: Heldout | None
    heldout_after: Heldout | None
    entropy: Change | None
    reward: Change | None
    instruments: Instruments
    touched: dict[str, float]
    mismatch: dict[str, float]
    verifier: dict[str, float]
    phases: tuple[Phase, ...]
    non_finite: dict[str, int]
    skipped: int  # optimizer steps whose loss or gradient was not finite
    alerts: dict[str, int]  # how many of each kind, in the order of KINDS


def summarize(run_dir: str | Path) -> Summary:
    """Read the records of a run and reduce them.

    Fractions of tokens and mismatch means are weighted by the tokens of their step, so that they are token means.
    Raises: ConfigError if the directory holds no run, or a damaged one.
    """
    if not holds_run(run_dir):
        raise ConfigError(
            f"RUN_DIR={str(run_dir)!r} holds no run (neither run.json nor steps.jsonl); give its output_dir"
        )
    run, steps = read_run(run_dir), read_steps(run_dir)
    held_out = heldout(read_evals(run_dir))
    seconds = series(steps, "time/step")[1]
    last = steps[-1] if steps else {"step": 0, "tokens": 0}
    mismatch = {name: _reduce(steps, name, reduce) for name, reduce in MISMATCH.items()}
    return Summary(
        run_dir=str(run_dir),
        status=run.get("status", "unknown"),
        num_steps=len(steps),
        last_step=last["step"],
        num_resumes=len(run.get("resumed", [])),
        tokens=last["tokens"],
        wall_seconds=last["time"] - run["started"] if steps and "started" in run else None,
        step_seconds=sum(seconds) if seconds else None,
        heldout_before=held_out[0] if held_out else None,
        heldout_after=held_out[-1] if len(held_out) > 1 else None,
        entropy=_change(steps, "entropy/mean"),
        reward=_change(steps, "reward/mean"),
        instruments=read_instruments(run, steps),
        touched=_measured({name: _reduce(steps, name) for name in TOUCHED}),
        mismatch=_measured(mismatch),
        verifier=_measured({name: _mean(series(steps, name)[1]) for name in VERIFIER}),
        phases=phases(steps),
        non_finite=_non_finite(steps),
        skipped=int(sum(series(steps, "optim/skipped")[1])),
        alerts=count_alerts(steps),
    )


def format_summary(summary: Summary) -> str:
    """Plain text for a terminal of 100 columns, at most 40 lines, a dozen of instruments and one for each domain."""
    rows = [_header(summary), "", *_quality(summary), ""]
    instruments = instrument_rows(summary.instruments)
    rows += [*instruments, ""] if instruments else []
    rows += _touched(summary.touched)
    rows += _table("engine against trainer", summary.mismatch, None)
    rows += _table("verifier failures, share of completions", summary.verifier, "fraction")
    rows += _times(summary.phases)
    if summary.non_finite:
        names = sorted(summary.non_finite, key=lambda name: -summary.non_finite[name])
        found = ", ".join(f"{name} in {summary.non_finite[name]} steps" for name in names[:3])
        rows += ["", f"WARNING  not finite: {found}" + (f", {len(names) - 3} more" if len(names) > 3 else "")]
    if summary.skipped:
        rows.append(
            f"WARNING  {summary.skipped} step{'s' * (summary.skipped > 1)} skipped, see {summary.run_dir}/skipped"
        )
    if summary.alerts:
        rows.append(f"{'alerts':<18}{format_alerts(summary.alerts)}")
    return "\n".join(rows)


def count_alerts(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many alerts of each kind there were, in the order of KINDS, without those that there were none of."""
    found = Counter(alert.kind for record in steps for alert in alerts_of(record))
    return {kind: found[kind] for kind in KINDS if found[kind]}


def format_alerts(counts: Mapping[str, int]) -> str:
    """`3: 2 collapse, 1 stall`."""
    return f"{sum(counts.values())}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())


def format_seconds(seconds: float) -> str:
    """`45.2 s`, `12 min 3 s` or `1 h 32 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _change(steps: Sequence[dict[str, Any]], name: str) -> Change | None:
    at, values = series(steps, name)
    if not values:
        return None
    window = min(10, max(1, len(values) // 5))
    low = min(range(len(values)), key=values.__getitem__)
    return Change(
        first=sum(values[:window]) / window,
        last=sum(values[-window:]) / window,
        window=window,
        low=values[low],
        low_step=at[low],
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _reduce(
    steps: Sequence[dict[str, Any]], name: str, reduce: Callable[[Sequence[float]], float] | None = None
) -> float | None:
    """`reduce` over the run, or the mean weighted by tokens; the plain mean if a step lacks its token count."""
    at, values = series(steps, name)
    if not values or reduce is not None:
        return reduce(values) if values and reduce else None
    tokens = dict(zip(*series(steps, "policy/tokens"), strict=True))
    weights = [tokens.get(step, 0) for step in at]
    if min(weights) <= 0:
        return _mean(values)
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _measured(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def phases(steps: Sequence[dict[str, Any]]) -> tuple[Phase, ...]:
    """Where the time of the steps went, with what no phase claims as `other`; () if it was not measured."""
    totals = {name: sum(series(steps, f"time/{name}")[1]) for name in PHASES if series(steps, f"time/{name}")[1]}
    whole = sum(series(steps, "time/step")[1]) or sum(totals.values())
    if not totals or whole <= 0:
        return ()
    found = [Phase(name, total, total / whole, _rate(steps, name)) for name, total in totals.items()]
    rest = max(0.0, whole - sum(totals.values()))
    return (*found, Phase("other", rest, rest / whole, None))


def _rate(steps: Sequence[dict[str, Any]], phase: str) -> float | None:
    """Tokens per second of a phase: total over total, of the steps that recorded both."""
    count = PHASES[phase]
    if count is None:
        return None
    tokens = dict(zip(*series(steps, count), strict=True))
    spent = [(at, seconds) for at, seconds in zip(*series(steps, f"time/{phase}"), strict=True) if at in tokens]
    seconds = sum(seconds for _, seconds in spent if seconds > 0)
    return sum(tokens[at] for at, value in spent if value > 0) / seconds if seconds else None


def _non_finite(steps: Sequence[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in steps:
        for name, value in record["metrics"].items():
            if not math.isfinite(value):
                counts[name] = counts.get(name, 0) + 1
    return counts


def _header(summary: Summary) -> str:
    parts = [summary.run_dir, summary.status]
    last = f" (last {summary.last_step})" if summary.num_steps else ""
    parts.append(f"{summary.num_steps} optimizer step{'' if summary.num_steps == 1 else 's'}{last}")
    if summary.num_resumes:
        parts.append(f"resumed {summary.num_resumes} x")
    wall = format_seconds(summary.wall_seconds) if summary.wall_seconds is not None else "not measured"
    inside = format_seconds(summary.step_seconds) if summary.step_seconds is not None else "not measured"
    return (
        " · ".join(parts) + f"\n{summary.tokens:,} tokens trained on · total time {wall} · in optimizer steps {inside}"
    )


def _quality(summary: Summary) -> list[str]:
    rows = [f"{'':<18}{'before':<30}{'after'}"]
    rows += heldout_rows(summary.heldout_before, summary.heldout_after)
    for label, change in (("training reward", summary.reward), ("entropy (nats)", summary.entropy)):
        if change is None:
            rows.append(f"{label:<18}not measured")
            continue
        span = f"mean of {change.window} steps" if change.window > 1 else "one step"
        first = f"{change.first:.3f}  ({span})"
        low = f"  (lowest {change.low:.3f} at step {change.low_step})" if change is summary.entropy else ""
        rows.append(f"{label:<18}{first:<30}{change.last:.3f}{low}")
    return rows


def _touched(shares: dict[str, float]) -> list[str]:
    """The table without a clip that never acted, which many surrogates do not even have."""
    acting = {name: share for name, share in shares.items() if share or not name.startswith("clip/")}
    title = "share of trained tokens touched"
    return [f"{title}: none"] if shares and not acting else _table(title, acting, "fraction")


def _table(title: str, values: dict[str, float], unit: str | None) -> list[str]:
    if not values:
        return [f"{title}: not measured"]
    rows = [title]
    for name, value in list(values.items())[:9]:
        shown = f"{100 * value:.3g} %" if unit == "fraction" else f"{value:.4g} {METRICS[name].unit}"
        rows.append(f"  {name:<26}{shown:<16}{METRICS[name].meaning}")
    return rows if len(values) <= 9 else [*rows, f"  and {len(values) - 9} more"]


def _times(phases: Sequence[Phase]) -> list[str]:
    if not phases:
        return ["time per phase: not measured"]
    rows = [f"{'time per phase':<28}{'share':<16}{'total':<16}tokens/s"]
    for phase in phases:
        rate = f"{phase.tokens_per_s:,.0f}" if phase.tokens_per_s is not None else "-"
        rows.append(f"  {phase.name:<26}{f'{100 * phase.share:.1f} %':<16}{format_seconds(phase.seconds):<16}{rate}")
    return rows
