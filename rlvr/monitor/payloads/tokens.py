"""Sampled completions token by token, and the tokens at which the policy was least certain."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlvr.errors import ConfigError
from rlvr.monitor.downsample import spread
from rlvr.monitor.payloads.numbers import DIGITS, number, significant
from rlvr.monitor.records import TOKENS

MAX_TOKENS = 4000  # shown of a completion
SHORT = 4  # digits of a token's numbers in a report
FORKS = 40
FORKING = 0.2  # share of the tokens, those with the highest entropy. Ref: Wang et al. 2025, arXiv 2506.01939

OF_ROW = ("sequence", "prompt_index", "prompt", "completion", "reward", "advantage", "estimator")
OF_TOKEN = (
    *("entropy", "logps", "old_logps", "rollout_logps", "weight", "drift", "keep", "covariance", "predicted"),
    *("advantages", "values"),
)
CONTROL = "control:"


def steps_payload(steps: Sequence[int], recorded: int) -> dict[str, Any]:
    """The steps with a sample of rollouts.   recorded: how many the run has, of which a report holds some."""
    return {"steps": list(steps), "recorded_steps": recorded}


def tokens_payload(
    run_dir: Path,
    step: int,
    max_tokens: int = MAX_TOKENS,
    max_rows: int | None = None,
    max_prompt: int | None = None,
    digits: int = DIGITS,
) -> dict[str, Any]:
    """The sample of one step, with what is known of each token.

    recorded: completions of the sample.   max_rows: of more, those spread evenly from lowest to highest reward.
    max_prompt: characters.
    Raises: FileNotFoundError if the step has none; ConfigError if its file is damaged.
    """
    table = _read(run_dir, step)
    chosen = range(table.num_rows) if max_rows is None else _ranked(table, max_rows)
    rows = [_row(table, row, max_tokens, max_prompt, digits) for row in chosen]
    return {"step": step, "recorded": table.num_rows, "rows": rows}


def _read(run_dir: Path, step: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run_dir / TOKENS / f"step-{step:06d}.parquet"
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())}); delete it") from error


def _ranked(table: Any, most: int) -> list[int]:
    rewards = table["reward"].to_pylist() if "reward" in table.column_names else [0.0] * table.num_rows
    ranked = sorted(range(len(rewards)), key=lambda row: rewards[row] or 0.0)
    return [ranked[at] for at in spread(len(ranked), most)]


def _row(table: Any, row: int, max_tokens: int, max_prompt: int | None, digits: int) -> dict[str, Any]:
    names = table.column_names
    found = {name: table[name][row].as_py() for name in OF_ROW if name in names}
    found |= {name: number(found[name]) for name in ("reward", "advantage") if name in found}
    if max_prompt is not None and len(found.get("prompt") or "") > max_prompt:
        found["prompt"] = found["prompt"][:max_prompt] + " …"
    tokens = _values(table, "tokens", row)
    entropy = _values(table, "entropy", row)
    length = max(len(part) for part in (tokens, entropy) if part is not None) if (tokens or entropy) else 0
    omitted = max(0, length - max_tokens)
    if omitted and tokens:
        found["completion"] = "".join(str(token) for token in tokens[:max_tokens].to_pylist())
    found |= {"length": length, "omitted": omitted}
    found["tokens"] = tokens[:max_tokens].to_pylist() if tokens is not None else []
    for name in OF_TOKEN:
        if name in names and (values := _values(table, name, row)) is not None:
            found[name] = _plain(values[:max_tokens], digits)
    controls = [name for name in names if name.startswith(CONTROL)]
    marks = {name.removeprefix(CONTROL): _values(table, name, row) for name in controls}
    return found | {"controls": {n: v[:max_tokens].to_pylist() for n, v in marks.items() if v is not None}}


def _values(table: Any, name: str, row: int) -> Any:
    """The list of a row as an Arrow array, None if there is none."""
    if name not in table.column_names:
        return None
    found = table[name][row]
    return found.values if found.is_valid else None


def _plain(values: Any, digits: int) -> Any:
    array = values.to_numpy(zero_copy_only=False)
    return significant(array, digits) if array.dtype.kind == "f" else array.tolist()


def forks_payload(run_dir: Path, step: int) -> dict[str, Any]:
    """The strings that are most often among the 20 % of the sampled tokens with the highest entropy.

    threshold: nats from which on a token is one of them, null if no token has any entropy: what is equal at the limit
    counts, what is 0 does not.   count: how often.   share_forking: of all places where the string stands.
    mean_entropy: over all of those, nats.
    Raises: as tokens_payload.
    """
    tokens, entropy = _sampled(run_dir, step)
    threshold = _threshold(entropy)
    count = Counter(tokens[at] for at in np.flatnonzero(entropy >= threshold).tolist())
    everywhere = Counter(tokens)
    total: dict[str, float] = dict.fromkeys(count, 0.0)
    for token, value in zip(tokens, entropy.tolist(), strict=True):
        if token in total:
            total[token] += value
    return {
        "tokens": [
            {
                "token": token,
                "count": times,
                "mean_entropy": number(total[token] / everywhere[token]),
                "share_forking": number(times / everywhere[token]),
            }
            for token, times in count.most_common(FORKS)
        ],
        "threshold": number(threshold),
    }


def _threshold(entropy: np.ndarray) -> float:
    """Nats that the share FORKING of the tokens reaches, rounded down to as few digits as a report has of a token's
    entropy; the least that is not 0 if fewer have any, infinity if none.
    """
    ranked = np.sort(entropy[entropy > 0])[::-1]
    wanted = math.ceil(FORKING * len(entropy))
    if not len(ranked):
        return math.inf
    least = float(ranked[min(wanted, len(ranked)) - 1])
    unit = 10.0 ** (math.floor(math.log10(least)) - SHORT + 1)
    near = float(significant(least, SHORT))
    return near if near <= least else float(significant(near - unit, SHORT))


def _sampled(run_dir: Path, step: int) -> tuple[list[str], np.ndarray]:
    """All tokens of a sample whose entropy is known, and that."""
    table = _read(run_dir, step)
    pairs = [pair for row in range(table.num_rows) for pair in _pairs(table, row)]
    return [token for token, _ in pairs], np.array([value for _, value in pairs], float)


def _pairs(table: Any, row: int) -> Iterator[tuple[str, float]]:
    tokens, entropy = _values(table, "tokens", row), _values(table, "entropy", row)
    if tokens is not None and entropy is not None:
        for token, value in zip(tokens.to_pylist(), entropy.to_pylist(), strict=False):
            if token is not None and value is not None and math.isfinite(value):
                yield token, value
