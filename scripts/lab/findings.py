"""The sections on estimators, lengths and knobs."""

from collections.abc import Mapping, Sequence

from . import figures
from .cells import Section, Table, compared, number, stated
from .claims import CLAIMS
from .intervals import Interval
from .methods import METHODS, REFERENCE
from .questions import BySeed, by_class, estimators, fall, lead
from .records import CLASSES, Record
from .scatter import SCATTER, lengths, sensitivity


def mechanics_section(watched: BySeed) -> Section:
    found = by_class(watched)
    names = {name: name.replace("_", ", ") for name in found}
    names |= {"no_advantage": "without an advantage", "all_tokens": "all"}
    spend = [f"{names[name]} {stated(found[name], True)}" for name in CLASSES if found[name].sign < 0]
    give = [f"{names[name]} {stated(found[name], True)}" for name in CLASSES if found[name].sign > 0]
    steps = min(len(record.measured) for record in watched.values())
    return Section(
        anchor="mechanics",
        title="Which tokens spend entropy?",
        answer=f"Over {steps} steps of GRPO, in nats: spent by {'; '.join(spend) or 'none, shown'}; returned by "
        f"{'; '.join(give) or 'none, shown'}.",
        claim=CLAIMS["mechanics"],
        draw=figures.class_curves(watched),
        tables=(
            Table(
                ("tokens", "entropy change, nats"),
                tuple((names[name], stated(one, True)) for name, one in found.items()),
                (f"Rewarded: A > 0. Likely: p > exp(-H). What the tokens of a class add to the mean change over a "
                 f"step's tokens, summed over {steps} steps, measured by passing 64 sequences of the step before and "
                 "after it. That is of completions just trained on: from the first rollout to the last, each of "
                 f"fresh completions, the policy's entropy changed by {stated(fall(watched), True)}. A sum says "
                 "nothing of a single token: the classes are not of one size.",),
            ),
        ),
    )  # fmt: skip


def estimators_section(watched: BySeed) -> Section:
    found = estimators(watched)
    best, *others = found
    told = ""
    if others:
        tokens, steps = (stated(one, True) for one in lead(best, others[0]))
        told = f" Less {others[0].name}: {tokens} over tokens, {steps} over steps."
    rows = tuple(
        (
            one.name,
            *(stated(one.tokens[kind]) for kind in one.tokens),
            *(stated(one.steps[kind]) for kind in one.steps),
        )
        for one in found
    )
    return Section(
        anchor="estimators",
        title="How well does each estimator predict the entropy change of a step?",
        answer=f"Best over the tokens of a step: {best.name}, correlation {stated(best.tokens['correlation'])}; "
        f"over steps it has {stated(best.steps['correlation'])}.{told}",
        claim=CLAIMS["estimators"],
        draw=figures.estimator_bars(found),
        tables=(
            Table(
                ("estimator", "over tokens: correlation", "R²", "slope", "over steps: correlation", "R²", "slope"),
                rows,
            ),
        ),
        notes=("64 sequences of every optimizer step, passed through the model before and after it. Predictions are "
               "of an SGD step and the optimizer is AdamW: slopes tell the scale between the two, not an error.",),
    )  # fmt: skip


def lengths_section(varied: Mapping[str, BySeed], titles: Mapping[str, str]) -> Section:
    found = lengths({name: varied[name] for name in (REFERENCE, "c3po")})
    rows = tuple((SCATTER[what], stated(of[REFERENCE].value), *compared(of["c3po"])) for what, of in found.items())
    told = [
        f"{'shown' if one.sign else 'not shown'} in the {SCATTER[what]} ({stated(one, True)})"
        for what, of in found.items()
        for one in [of["c3po"].difference]
    ]
    return Section(
        anchor="lengths",
        title="What does C3PO do to gradient norms and step times when lengths vary?",
        answer=f"A change of their scatter is {', '.join(told)}.",
        claim=CLAIMS["lengths"],
        draw=figures.length_bars(found, titles),
        tables=(Table(("scatter of", "GRPO", "C3PO", "difference"), rows),),
        notes=("Problems of two or three numbers: 6 or 11 tokens. Scatter: standard deviation over the steps of a "
               "quantity over its moving mean of 21 steps. Times are those of a shared machine.",),
    )  # fmt: skip


def sensitivity_section(records: Sequence[Record], titles: Mapping[str, str]) -> Section:
    found = sensitivity(records)
    fields = {name: knob.field for name in found if (knob := METHODS[name].knob)}
    shown = [titles[name] for name, one in found.items() if one.entropy.sign]
    others = [titles[name] for name, one in found.items() if not one.entropy.sign]
    rows = tuple(
        (
            titles[name],
            fields[name],
            str(knob.rollouts),
            ", ".join(f"{one.value:g}{' (own)' if one.own else ''}" for one in knob.settings),
            ", ".join(number(one.entropy.mean) for one in knob.settings),
            _swing(knob.entropy),
            ", ".join(number(one.reward.mean) for one in knob.settings),
            _swing(knob.reward),
        )
        for name, knob in found.items()
    )
    seeds = max(one.entropy.count for one in found.values())
    return Section(
        anchor="knobs",
        title="How sensitive is each method to its main knob?",
        answer="Between the smallest value and the largest entropy differs, shown, with "
        f"{', '.join(shown) or 'none'}; not shown with {', '.join(others) or 'none'}.",
        claim=CLAIMS["knobs"],
        draw=figures.knobs(found, titles, fields),
        height=1.0 + 1.5 * -(-len(found) // 4),
        tables=(
            Table(
                ("method", "knob", "rollouts", "values", "H", "largest less smallest", "reward",
                 "largest less smallest"),
                rows,
                (f"No held-out evaluation. Differences are paired, with 95 % intervals over {seeds} seeds, and * "
                 "where they exclude 0; they are of values as far apart as the column says. How a knob acts, not "
                 "which value is best.",),
            ),
        ),
    )  # fmt: skip


def _swing(one: Interval) -> str:
    return stated(one, sign=True) + (" *" if one.sign else "")
