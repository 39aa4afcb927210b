"""Sampled completions as HTML, each token shaded by its entropy. Model output is untrusted: all of it is escaped."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr.monitor.records import read_tokens, token_steps

MAX_TOKENS = 800  # shown per completion
MAX_PROMPT = 4000  # characters shown per prompt

_UNSHOWN = dict.fromkeys((0, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def samples_html(run_dir: str | Path) -> str:
    """A few sequences of the first and of the last recorded step, "" if there are none."""
    steps = token_steps(run_dir)
    chosen = (
        [row for step in sorted({steps[0], steps[-1]}) for row in _spread(read_tokens(run_dir, step))] if steps else []
    )
    if not chosen:
        return ""
    scale = _scale(chosen)
    legend = "".join(f'<span class="t" style="--a:{level / 10:.2f}">&emsp;</span>' for level in range(0, 10, 2))
    note = (
        f'<p class="note">Shade: entropy, 0 {legend} {scale:.2f} nats and above. Underlined: tokens that a control '
        "took out of the loss, gave another weight or penalized. Hover over a token for its numbers.</p>"
    )
    return note + "".join(_sequence(row, scale) for row in chosen)


def _spread(rows: Sequence[dict[str, Any]], count: int = 3) -> list[dict[str, Any]]:
    """The lowest, the middle and the highest reward."""
    ranked = sorted(rows, key=lambda row: row.get("reward") or 0.0)
    last = len(ranked) - 1
    return (
        [ranked[index] for index in sorted({round(last * part / (count - 1)) for part in range(count)})]
        if rows
        else []
    )


def _scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """The entropy that gets the full shade: the 98th percentile of the shown tokens, at least 0.5 nats."""
    entropy = sorted(value for row in rows for value in row.get("entropy") or () if _is_number(value))
    return max(0.5, entropy[int(0.98 * (len(entropy) - 1))]) if entropy else 0.5


def _sequence(row: Mapping[str, Any], scale: float) -> str:
    facts = [f"step {row['step']}"]
    facts += [f"{name} {row[name]:.3f}" for name in ("reward", "advantage") if _is_number(row.get(name))]
    entropy = [value for value in row.get("entropy") or () if _is_number(value)]
    if entropy:
        facts.append(f"{len(entropy)} tokens, mean entropy {sum(entropy) / len(entropy):.3f} nats")
    tokens = row.get("tokens") or ()
    if tokens:
        body = "".join(_token(row, index, scale) for index in range(min(len(tokens), MAX_TOKENS)))
        if len(tokens) > MAX_TOKENS:
            body += f'<span class="note"> … and {len(tokens) - MAX_TOKENS} more tokens</span>'
    else:
        body = escape(row.get("completion") or "")
    prompt = row.get("prompt") or ""
    shown = escape(prompt[:MAX_PROMPT]) + (" …" if len(prompt) > MAX_PROMPT else "")
    return (
        f'<article><p class="facts">{" · ".join(facts)}</p><details><summary>prompt</summary>'
        f'<div class="text">{shown}</div></details><div class="text">{body}</div></article>'
    )


def _token(row: Mapping[str, Any], index: int, scale: float) -> str:
    entropy, weight = _at(row, "entropy", index), _at(row, "weight", index)
    touched = _at(row, "keep", index) is False or weight not in (None, 1) or _at(row, "drift", index) not in (None, 0)
    names = ("entropy", "logps", "old_logps", "rollout_logps", "weight", "drift")
    numbers = ((name, _at(row, name, index)) for name in names)
    title = ", ".join(f"{name} {value:.3f}" for name, value in numbers if _is_number(value))
    shade = min(max(entropy / scale, 0.0), 1.0) * 0.9 if _is_number(entropy) else 0.0
    text = escape(row["tokens"][index] or "").replace("\n", "↵\n")
    return f'<span class="t{" x" if touched else ""}" style="--a:{shade:.2f}" title="{title}">{text}</span>'


def _at(row: Mapping[str, Any], name: str, index: int) -> Any:
    values = row.get(name) or ()
    return values[index] if index < len(values) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def escape(text: str) -> str:
    """Text that HTML shows as it is, in content and in attributes; without signs that reorder the text around them."""
    return html.escape(text.translate(_UNSHOWN), quote=True)
