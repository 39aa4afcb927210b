"""The recommendation table, by stated rules from the comparison alone. No sentence here knows a method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlvr.law import CONFIDENCE

from .comparison import Compared, Row
from .methods import REFERENCE

MATERIAL = 0.02  # nats, by which a method must hold entropy to be said to hold it

RULES = (
    "A difference is shown if the 95 % interval of the paired difference to GRPO, over the seeds, excludes 0.",
    f"A method holds entropy if it ends with more than GRPO, shown, by at least {MATERIAL} nats.",
    "It ruins the policy if its reward at the end is, by its mean, below that of the base model.",
    "It helps if pass@1 or pass@k (the largest k measured) is better, shown, and neither is worse, both than with "
    "GRPO at its end and than with GRPO stopped at as much entropy; without the latter it does no more than stopping "
    "early.",
    "It is a trade if one is better and the other worse than with GRPO at its end, both shown.",
    "It holds entropy at a price if it holds entropy and pass@1, pass@k or training reward is worse, shown; else at "
    "no shown price.",
    "It hurts if pass@1 or pass@k is worse, shown, and none of the above; else no effect on them is shown, which is "
    "not to say that there is none: see how wide the intervals are.",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """overall: by RULES.   effects: shown ones, a phrase per quantity, less GRPO at its end.   early: the same, less
    GRPO stopped at as much entropy.   good_for: quantities with a shown gain.   more_than_early: those of them with a
    shown gain over GRPO stopped, too.
    """

    name: str
    overall: str
    effects: tuple[str, ...]
    early: tuple[str, ...]
    good_for: tuple[str, ...]
    more_than_early: tuple[str, ...]


def verdict(row: Row, base_reward: float, early: Row | None = None) -> Verdict:
    """base_reward: mean reward of the policy that RL started from.   early: the method less GRPO stopped at as much
    entropy; None: GRPO was not measured on its way.
    """
    better, worse = _shown(row, 1), _shown(row, -1)
    more = better
    if early is not None:
        more = () if _shown(early, -1) else tuple(what for what in better if what in _shown(early, 1))
    ruined = row.reward.value.mean < base_reward
    if ruined:
        overall = "ruins the policy here"
    elif better and worse:
        overall = "a trade here"
    elif better:
        overall = "helps here" if more else "no more than stopping early"
    elif holds(row):
        price = worse or row.reward.difference.sign < 0
        overall = "holds entropy at a price" if price else "holds entropy at no shown price"
    else:
        overall = "hurts here" if worse else "no effect shown here"
    good_for = (*better, *(("holding entropy",) if holds(row) else ()))
    return Verdict(
        name=row.name,
        overall=overall,
        effects=_told({"entropy": row.entropy, "training reward": row.reward, **quality(row)}),
        early=_told(quality(early) if early else {}),
        good_for=() if ruined else good_for,
        more_than_early=() if ruined else more,
    )


def holds(row: Row) -> bool:
    """Whether it holds entropy, by RULES."""
    return row.entropy.difference.sign > 0 and row.entropy.difference.mean >= MATERIAL


def quality(row: Row) -> dict[str, Compared]:
    """pass@1 and pass@k with the largest k, by what the page calls them."""
    largest = max(row.pass_at, key=int, default=None)
    return {f"pass@{k}": row.pass_at[k] for k in dict.fromkeys(("1", largest)) if k in row.pass_at}


def _shown(row: Row, sign: int) -> tuple[str, ...]:
    return tuple(what for what, one in quality(row).items() if one.difference.sign == sign)


def _told(effects: Mapping[str, Compared]) -> tuple[str, ...]:
    return tuple(f"{what} {one.difference.mean:+.3f}" for what, one in effects.items() if one.difference.sign)


def verdicts(rows: Sequence[Row], base_reward: float, early: Sequence[Row] = ()) -> list[Verdict]:
    """Of every method but GRPO itself.   early: of `at_equal_entropy`."""
    stopped = {row.name: row for row in early}
    return [verdict(row, base_reward, stopped.get(row.name)) for row in rows if row.name != REFERENCE]


def goals(rows: Sequence[Row]) -> tuple[str, ...]:
    """What a method can be good for."""
    return (*quality(rows[0]), "holding entropy")


def by_chance(looked_at: Sequence[Compared]) -> str:
    """How many differences were looked at, how many exclude 0, and how many would if nothing differed."""
    shown = sum(one.difference.sign != 0 for one in looked_at)
    return (
        f"Of {len(looked_at)} differences {shown} exclude 0; about {(1 - CONFIDENCE) * len(looked_at):.1f} would if "
        "nothing differed."
    )
