"""Held-out results of a run, before and after training; pure functions of its evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

PASS = "heldout/pass_at_"


@dataclass(frozen=True, slots=True)
class Heldout:
    """Mean held-out reward after `step`, with the half width of its 95 % interval if that was recorded.

    pass_at: share of the prompts solved by one of k samples, by k.
    domains: the same of each domain, where the run's task has several.
    """

    step: int
    reward: float
    ci95: float | None
    pass_at: dict[int, float] = field(default_factory=dict)
    domains: "dict[str, Heldout]" = field(default_factory=dict)


def heldout(evals: Sequence[dict[str, Any]]) -> list[Heldout]:
    """The evaluations that measured a held-out reward, in order."""
    found = []
    for record in evals:
        if "name" in record:  # of other rows than the run's own
            continue
        of_all = _heldout_of(record["step"], record["metrics"])
        parts = {name: _heldout_of(record["step"], part) for name, part in record.get("domains", {}).items()}
        if of_all is not None:
            found.append(replace(of_all, domains={name: part for name, part in parts.items() if part is not None}))
    return found


def _heldout_of(step: int, metrics: dict[str, Any]) -> Heldout | None:
    reward, ci95 = (float(metrics.get(f"heldout/{name}", math.nan)) for name in ("reward", "reward_ci95"))
    if not math.isfinite(reward):
        return None
    rates = {int(name.removeprefix(PASS)): value for name, value in metrics.items() if name.startswith(PASS)}
    return Heldout(step, reward, ci95 if math.isfinite(ci95) else None, dict(sorted(rates.items())))


def heldout_rows(before: Heldout | None, after: Heldout | None) -> list[str]:
    """Rows of the summary: label, before, after."""
    rows = [f"{'held-out reward':<18}{_text(before):<30}{_text(after)}"]
    ends = (before, after)
    rates = [end.pass_at if end else {} for end in ends]
    most = max({**rates[0], **rates[1]}, default=1)
    if most > 1:
        first, last = (_rates_text(end, most) for end in ends)
        rows.append(f"{f'  pass@1, @{most}':<18}{first:<30}{last}")
    parts = [end.domains if end else {} for end in ends]
    for domain in {**parts[0], **parts[1]}:
        first, last = (_text(part.get(domain)) for part in parts)
        rows.append(f"{'  ' + domain[-15:]:<18}{first:<30}{last}")
    return rows


def _text(value: Heldout | None) -> str:
    if value is None:
        return "not measured"
    interval = f" ± {value.ci95:.3f}" if value.ci95 is not None else ""
    return f"{value.reward:.3f}{interval}  (step {value.step})"


def _rates_text(value: Heldout | None, most: int) -> str:
    if value is None or not {1, most} <= value.pass_at.keys():
        return "not measured"
    return f"{value.pass_at[1]:.3f}, {value.pass_at[most]:.3f}"
