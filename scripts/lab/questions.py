"""What the records say of plain GRPO, of the law and of the estimators. Pure: records in, dataclasses out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from rlvr.law import MIN_POINTS, LawFit, fit_law

from .intervals import Interval, correlation, interval
from .records import AGREEMENTS, CLASSES, Record, means, stopped, with_stops

SHARES = (0.10, 0.25, 0.50, 1.0)
WINDOW = 5  # rollouts that are averaged: which problems a rollout draws moves its reward by about .05
LATE = 10  # rollouts at the end, whose mean is the reward of a run
EARLY = (0.15, 0.35)  # of the rollouts, from which the final reward is predicted
SPENT_AT = (1 / 12, 0.25, 1 / 3, 0.5)  # of the run; the first and the third are the paper's 200 and 800 of 2400 steps

BySeed = Mapping[int, Record]


def select(records: Sequence[Record], part: str) -> dict[str, dict[int, Record]]:
    """The part's records by name and seed, in the order in which they come."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record.part == part:
            found.setdefault(record.name, {})[record.seed] = record
    return found


def late(values: Sequence[float]) -> float:
    return fmean(values[-LATE:])


def at(values: Sequence[float], share: float) -> float:
    """Mean of the last 5 values of the first `share` of them."""
    end = max(round(share * len(values)), 1)
    return fmean(values[max(0, end - WINDOW) : end])


def window_means(values: Sequence[float]) -> tuple[float, ...]:
    return means(values, WINDOW)


# ------------------------------------------------------------------------------------------------------- collapse


@dataclass(frozen=True, slots=True)
class Collapse:
    """Nats. start: first rollout.   at: by share of the run."""

    start: Interval
    at: dict[float, Interval]


def collapse(runs: BySeed) -> Collapse:
    entropy = [record.entropy for record in runs.values()]
    return Collapse(
        start=interval([h[0] for h in entropy]),
        at={share: interval([at(h, share) for h in entropy]) for share in SHARES},
    )


# ------------------------------------------------------------------------------------------------------------ law


@dataclass(frozen=True, slots=True)
class Foresight:
    """Of fits to the first `share` of the rollouts: predicted less measured mean reward of the last 10 rollouts.

    law, line: of R = -a exp(H) + b and of a line in H, each at the entropy that those rollouts had.   ceiling: b - a,
    at H = 0, less that reward.   last: what the first part's last 10 rollouts earned, as prediction.   size,
    line_size: mean |law| and |line|.   covered: share of the seeds whose reward lies in the 95 %
    interval of the fitted mean.
    """

    share: float
    law: Interval
    line: Interval
    ceiling: Interval
    last: Interval
    size: Interval
    line_size: Interval
    covered: float


@dataclass(frozen=True, slots=True)
class Law:
    """r2, r2_linear: of the fitted law and of a line in H.   a, b: in units of reward.
    foresight: empty where runs are too short.
    """

    r2: Interval
    r2_linear: Interval
    a: Interval
    b: Interval
    foresight: tuple[Foresight, ...] = ()


def law(runs: BySeed) -> Law:
    fits = [fit_law(window_means(r.made), window_means(r.reward)) for r in runs.values()]
    ahead = tuple(foresight(runs, share) for share in EARLY if round(shortest(runs) * share) >= MIN_POINTS)
    return _law(fits, ahead)


def _law(fits: Sequence[LawFit], ahead: tuple[Foresight, ...] = ()) -> Law:
    return Law(
        r2=interval([fit.r2 for fit in fits]),
        r2_linear=interval([fit.r2_linear for fit in fits]),
        a=interval([fit.a for fit in fits]),
        b=interval([fit.b for fit in fits]),
        foresight=ahead,
    )


def shortest(runs: BySeed) -> int:
    return min((len(record.made) for record in runs.values()), default=0)


def foresight(runs: BySeed, share: float) -> Foresight:
    errors: dict[str, list[float]] = {"law": [], "line": [], "ceiling": [], "last": []}
    inside = []
    for record in runs.values():
        seen = round(share * len(record.made))
        entropy, reward = record.made[:seen], record.reward[:seen]
        final_entropy, final = late(record.made), late(record.reward)
        fit = fit_law(entropy, reward)
        slope, level = np.polyfit(entropy, reward, 1)
        errors["law"].append(fit.b - fit.a * math.exp(final_entropy) - final)
        errors["line"].append(float(level + slope * final_entropy) - final)
        errors["ceiling"].append(fit.ceiling - final)
        errors["last"].append(late(reward) - final)
        low, high = fit.interval(final_entropy)
        inside.append(low <= final <= high)
    found = {name: interval(values) for name, values in errors.items()}
    sizes = {
        which: interval([abs(error) for error in errors[of]]) for which, of in (("size", "law"), ("line_size", "line"))
    }
    return Foresight(share, **found, **sizes, covered=float(np.mean(inside)))


def held_out_law(runs: BySeed) -> Law | None:
    """The law of held-out pass@1, fitted to the runs' stops and ends; None with fewer than 8 of them."""
    fits = []
    for record in with_stops(runs).values():
        way = [*(stopped(record, int(count)) for count in record.stops), record]
        if len(way) >= 8:
            fits.append(fit_law([at(one.entropy, 1.0) for one in way], [one.pass_at["1"] for one in way]))
    return _law(fits) if fits else None


# ------------------------------------------------------------------------------------------------------- spending


@dataclass(frozen=True, slots=True)
class Spending:
    """Of the whole drop of entropy and the whole gain in reward, the shares behind at a share of the run.

    at: by share of the run, (entropy, reward).   curve: (entropy, reward) shares by windows of 5 rollouts, means over
    seeds.
    """

    at: dict[float, tuple[Interval, Interval]]
    curve: tuple[tuple[float, float], ...]


def spending(runs: BySeed) -> Spending:
    length = shortest(runs)
    pairs = [(_shares(record.made[:length]), _shares(record.reward[:length])) for record in runs.values()]

    curve = np.mean([np.stack(pair, axis=1) for pair in pairs], axis=0)
    # The window that ends nearest to a share; before the second one nothing can be spent.
    windows = {share: round(share * len(curve)) - 1 for share in SPENT_AT}

    def reached(window: int, side: int) -> Interval:
        return interval([pair[side][window] for pair in pairs])

    return Spending(
        {share: (reached(window, 0), reached(window, 1)) for share, window in windows.items() if window > 0},
        tuple((float(h), float(r)) for h, r in curve),
    )


def _shares(values: Sequence[float]) -> list[float]:
    """(value - first) / (last - first) of means over 5 rollouts; NaN if the first and the last are the same."""
    windows = window_means(values)
    whole = windows[-1] - windows[0]
    return [(value - windows[0]) / whole if whole else math.nan for value in windows]


# ------------------------------------------------------------------------------------------------------ mechanics


def by_class(runs: BySeed) -> dict[str, Interval]:
    """What the tokens of each of CLASSES, those without an advantage and all add to the entropy change of a run, nats,
    summed over its watched steps.
    """
    watched = [record for record in runs.values() if record.by_class]
    found = {name: [sum(record.by_class[name]) for record in watched] for name in CLASSES}
    whole = [sum(record.measured) for record in watched]
    found["no_advantage"] = [every - sum(of) for every, *of in zip(whole, *found.values(), strict=True)]
    return {name: interval(values) for name, values in {**found, "all_tokens": whole}.items()}


def fall(runs: BySeed) -> Interval:
    """Of entropy from the policy that made the first rollout to that of the last, nats."""
    return interval([record.made[-1] - record.made[0] for record in runs.values()])


# ----------------------------------------------------------------------------------------------------- estimators


@dataclass(frozen=True, slots=True)
class Estimator:
    """How a prediction agrees with the measured entropy change. tokens: within a step, mean (slope: median) over the
    steps of a run, by kind of AGREEMENTS.   steps: of the means of a step, over the steps of a run, likewise.
    correlations: of each run, over tokens and over steps.
    """

    name: str
    tokens: dict[str, Interval]
    steps: dict[str, Interval]
    correlations: tuple[tuple[float, float], ...]


def estimators(runs: BySeed) -> list[Estimator]:
    """Best correlation over tokens first; of runs whose steps were watched."""
    watched = [record for record in runs.values() if record.measured]
    found = []
    for name in watched[0].agreement if watched else ():
        within = [
            {kind: (median if kind == "slope" else fmean)(record.agreement[name][kind]) for kind in AGREEMENTS}
            for record in watched
        ]
        across = [_line(record.predicted[name], record.measured) for record in watched]
        tokens, steps = ({kind: interval([run[kind] for run in of]) for kind in AGREEMENTS} for of in (within, across))
        both = tuple((a["correlation"], b["correlation"]) for a, b in zip(within, across, strict=True))
        found.append(Estimator(name, tokens, steps, both))
    return sorted(found, key=lambda one: -one.tokens["correlation"].mean)


def lead(best: Estimator, other: Estimator) -> tuple[Interval, Interval]:
    """Correlation of the one less that of the other, over tokens and over steps, paired by runs."""
    pairs = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(best.correlations, other.correlations, strict=True)]
    return interval([x for x, _ in pairs]), interval([x for _, x in pairs])


def _line(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    r = correlation(predicted, measured)
    spread = float(np.std(predicted))
    return {"correlation": r, "r2": r * r, "slope": r * float(np.std(measured)) / spread if spread else math.nan}
