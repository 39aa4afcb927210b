"""Which prompts are solved, which partly and which never: what the groups of all rollouts earned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvr.monitor.downsample import spread
from rlvr.monitor.payloads.numbers import significant
from rlvr.monitor.records import GROUPS, PROMPTS
from rlvr.monitor.table import Table
from rlvr.monitor.tail import Tail, parse_json

MAX_TEXT = 300  # characters of a prompt
MAX_PROMPTS = 500
MAX_VISITS = 60
COLUMNS = 300


class PromptTable:
    """groups.jsonl and prompts.jsonl as columns, an entry per group in the order of training.

    ids: of the prompts, by their number.   texts: their first characters, by id.
    """

    def __init__(self, run_dir: Path) -> None:
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._parts: list[np.ndarray] = []
        self._groups: Tail[Rollout] = Tail(run_dir / GROUPS, _parse_groups)
        self._prompts: Tail[tuple[str, str]] = Tail(run_dir / PROMPTS, _parse_prompt)
        self._generations = (0, 0)

    def refresh(self) -> None:
        """Read what is new. Raises: ConfigError for a damaged line that is not the last."""
        for tail in (self._groups, self._prompts):
            tail.look()
        generations = (self._groups.generation, self._prompts.generation)
        if generations[0] != self._generations[0]:
            self.ids, self._numbers, self._parts = [], {}, []
        if generations[1] != self._generations[1]:
            self.texts = {}
        self._generations = generations
        for records in self._groups.read():
            self._parts += [self._columns(record) for record in records]
        for prompts in self._prompts.read():
            self.texts.update(prompts)

    @property
    def groups(self) -> np.ndarray:
        """Step, number of the prompt, passed and scored completions of each group, int64 [4, n]."""
        whole = np.concatenate(self._parts, axis=1) if self._parts else np.zeros((4, 0), np.int32)
        self._parts = [whole]
        return whole.astype(np.int64)

    def _columns(self, record: "Rollout") -> np.ndarray:
        numbers = self._numbers
        for name in record.prompts:
            if name not in numbers:
                numbers[name] = len(numbers)
                self.ids.append(name)
        prompts = np.array([numbers[name] for name in record.prompts], np.int32)
        return np.stack([np.full_like(prompts, record.step), prompts, *record.outcomes])


@dataclass(frozen=True, slots=True)
class Rollout:
    """outcomes [2, n]: passed and scored completions of the group of each prompt."""

    step: int
    prompts: list[str]
    outcomes: np.ndarray


def _parse_groups(line: bytes) -> Rollout:
    record = parse_json(line)
    outcomes = np.array([record["passed"], record["scored"]], np.int32)
    if not isinstance(record["step"], int) or outcomes.shape != (2, len(record["prompts"])):
        raise ValueError("no record of groups")
    return Rollout(record["step"], record["prompts"], outcomes)


def _parse_prompt(line: bytes) -> tuple[str, str]:
    record = parse_json(line)
    text = str(record["text"])
    return str(record["id"]), text[:MAX_TEXT]


def prompts_payload(found: PromptTable, table: Table) -> dict[str, Any]:
    """table: the step records of the run, for the share of groups without any variance of their rewards."""
    groups = found.groups
    states, rows = _by_prompt(found, groups)
    return {
        "total": len(found.ids),
        **{state: int((states == number).sum()) for number, state in enumerate(STATES)},
        "prompts": rows,
        "omitted": max(0, len(found.ids) - len(rows)),
        **_over_training(groups, table),
    }


STATES = ("solved", "partly", "never", "unscored")


def _by_prompt(found: PromptTable, groups: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """State [prompts] of each, and rows of the most informative: rates near one half, then those met most often.

    No state takes the places of another, see `_places`.
    """
    step, prompt, passed, scored = groups
    count = len(found.ids)
    order = np.argsort(prompt, kind="stable")
    begins = np.searchsorted(prompt[order], np.arange(count + 1))
    lasts = order[begins[1:] - 1] if count else order
    seen = np.diff(begins)
    all_passed, all_scored = (np.bincount(prompt, part, count).astype(np.int64) for part in (passed, scored))
    solved = (passed[lasts] == scored[lasts]) & (scored[lasts] > 0)
    states = np.where(solved, 0, np.where(all_passed > 0, 1, np.where(all_scored > 0, 2, 3)))
    rate = passed[lasts] / np.maximum(scored[lasts], 1)
    ranked = np.lexsort((-seen, -rate * (1 - rate)))
    places = _places(np.bincount(states, minlength=len(STATES)).tolist())
    best = [ranked[states[ranked] == state][:most] for state, most in enumerate(places)]
    rows = []
    for number in ranked[np.isin(ranked, np.concatenate(best))].tolist():
        visits = order[begins[number] : begins[number + 1]]
        shown = visits[spread(len(visits), MAX_VISITS)]
        shown = shown[scored[shown] > 0]
        rates = significant(passed[shown] / scored[shown]).tolist()
        rows.append(
            {
                "id": found.ids[number],
                "text": found.texts.get(found.ids[number], ""),
                "seen": int(seen[number]),
                "passed": int(all_passed[number]),
                "scored": int(all_scored[number]),
                "state": STATES[states[number]],
                "points": [list(point) for point in zip(step[shown].tolist(), rates, strict=True)],
            }
        )
    return states, rows


def _places(counts: list[int], most: int = MAX_PROMPTS) -> list[int]:
    """How many prompts of each state of STATES are listed: equally many, and more where others have fewer.

    Those that could not be scored get what is left.
    """
    places, free = [0] * len(counts), most
    scored = sorted(range(len(counts) - 1), key=counts.__getitem__)
    for done, state in enumerate(scored):
        places[state] = min(counts[state], free // (len(scored) - done))
        free -= places[state]
    places[-1] = min(counts[-1], free)
    return places


def _over_training(groups: np.ndarray, table: Table) -> dict[str, Any]:
    """Shares of the groups of neighboring rollouts, in at most COLUMNS columns."""
    step, _, passed, scored = groups
    counted = scored > 0
    step, passed, scored = step[counted], passed[counted], scored[counted]
    rollouts = np.unique(step)
    per = max(1, -(-len(rollouts) // COLUMNS))
    at = np.searchsorted(rollouts, step) // per
    columns = -(-len(rollouts) // per)
    total = np.maximum(np.bincount(at, minlength=columns), 1)
    every, none = passed == scored, passed == 0
    kinds = {"all_passed": every, "some_passed": ~(every | none), "none_passed": none}
    shares = {name: significant(np.bincount(at, kind, columns) / total) for name, kind in kinds.items()}
    last = np.minimum(np.arange(1, columns + 1) * per, len(rollouts)) - 1
    return {"step": rollouts[last], **shares, "zero_variance": _zero_variance(table, rollouts, per, columns)}


def _zero_variance(table: Table, rollouts: np.ndarray, per: int, columns: int) -> np.ndarray:
    """Means of reward/zero_variance_groups, NaN where it was not recorded."""
    values = table.column("reward/zero_variance_groups")
    known = np.isfinite(values) & np.isin(table.step, rollouts)
    at = np.searchsorted(rollouts, table.step[known]) // per
    count = np.bincount(at, minlength=columns)
    sums = np.bincount(at, values[known], columns)
    return significant(np.divide(sums, count, out=np.full(columns, np.nan), where=count > 0))
