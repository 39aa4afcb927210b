"""The recommendation table, by stated rules from the comparison alone. No sentence here knows a method."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlvr.law import CONFIDENCE

from .comparison import Compared, Row
from .questions import REFERENCE

MATERIAL = 0.02  # nats, by which a method must hold entropy to be said to hold it

RULES = (
    "A difference is shown if the 95 % interval of the paired difference to GRPO, over the seeds, excludes 0.",
    f"A method holds entropy if it ends with more than GRPO, shown, by at least {MATERIAL} nats.",
    "It ruins the policy if its reward at the end is, by its mean, below that of the base model.",
    "It helps if pass@1 or pass@k (the largest k measured) is better, shown, and neither is worse.",
    "It is a trade if one is better and the other worse, both shown.",
    "It holds entropy at a price if it holds entropy and pass@1 or pass@k is worse, shown; else at no shown price.",
    "It hurts if pass@1 or pass@k is worse, shown, and none of the above; else it does not help here.",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """overall: by RULES.   effects: one phrase per quantity.   good_for: quantities with a shown gain."""

    name: str
    overall: str
    effects: tuple[str, ...]
    good_for: tuple[str, ...]


def verdict(row: Row, base_reward: float) -> Verdict:
    """base_reward: mean reward of the policy that RL started from."""
    quantities = quality(row)
    signs = {what: one.difference.sign for what, one in quantities.items()}
    better = tuple(what for what, sign in signs.items() if sign > 0)
    worse = tuple(what for what, sign in signs.items() if sign < 0)
    effects = (
        _effect("entropy", row.entropy, " nats"),
        *(_effect(what, one, "") for what, one in quantities.items()),
    )
    overall = _overall(row.reward.value.mean < base_reward, holds(row), bool(better), bool(worse))
    ruined = overall == "ruins the policy here"
    good_for = (*better, *(("holding entropy",) if holds(row) else ()))
    return Verdict(row.name, overall, effects, () if ruined else good_for)


def holds(row: Row) -> bool:
    """Whether it holds entropy, by RULES."""
    return row.entropy.difference.sign > 0 and row.entropy.difference.mean >= MATERIAL


def quality(row: Row) -> dict[str, Compared]:
    """pass@1 and pass@k with the largest k, by what the page calls them."""
    largest = max(row.pass_at, key=int, default=None)
    return {f"pass@{k}": row.pass_at[k] for k in dict.fromkeys(("1", largest)) if k in row.pass_at}


def _overall(ruined: bool, holds: bool, better: bool, worse: bool) -> str:
    if ruined:
        return "ruins the policy here"
    if better:
        return "a trade here" if worse else "helps here"
    if holds:
        return "holds entropy at a price" if worse else "holds entropy at no shown price"
    return "hurts here" if worse else "does not help here"


def _effect(what: str, one: Compared, unit: str) -> str:
    if one.difference.sign == 0:
        return f"{what}: no difference shown"
    return f"{what} {one.difference.mean:+.3f}{unit}"


def verdicts(rows: Sequence[Row], base_reward: float) -> list[Verdict]:
    """Of every method but GRPO itself."""
    return [verdict(row, base_reward) for row in rows if row.name != REFERENCE]


def by_goal(found: Sequence[Verdict]) -> dict[str, list[str]]:
    """Names of the methods with a shown gain, by goal; a goal without one is there too, with no name."""
    goals = dict.fromkeys(
        goal
        for one in found
        for goal in (*(e.partition(":")[0].split(" ")[0] for e in one.effects[1:]), "holding entropy")
    )
    return {goal: [one.name for one in found if goal in one.good_for] for goal in goals}


def by_chance(rows: Sequence[Row]) -> tuple[int, int, float]:
    """(differences to GRPO whose intervals were looked at, how many exclude 0, how many would if nothing differed)."""
    looked_at = [
        one.difference.sign
        for row in rows
        if row.name != REFERENCE
        for one in (row.entropy, row.reward, *row.pass_at.values())
    ]
    return len(looked_at), sum(sign != 0 for sign in looked_at), (1 - CONFIDENCE) * len(looked_at)
