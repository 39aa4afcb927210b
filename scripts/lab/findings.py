"""The sections on estimators, lengths and knobs."""

from collections.abc import Mapping, Sequence

from . import figures
from .cells import Section, Table, compared, number, stated
from .claims import CLAIMS
from .intervals import Interval
from .methods import METHODS
from .questions import REFERENCE, BySeed, by_class, estimators
from .records import Record
from .scatter import SCATTER, lengths, sensitivity


def mechanics_section(watched: BySeed) -> Section:
    found = by_class(watched)
    names = {name: name.replace("_", ", ") for name in found}
    spend = [f"{names[name]} {stated(one, True)}" for name, one in found.items() if one.sign < 0]
    give = [f"{names[name]} {stated(one, True)}" for name, one in found.items() if one.sign > 0]
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
                 "after it; tokens without an advantage add the rest.",),
            ),
        ),
    )  # fmt: skip


def estimators_section(watched: BySeed) -> Section:
    found = estimators(watched)
    best = found[0]
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
        f"over steps it has {stated(best.steps['correlation'])}.",
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
    change = found["grad_norm"]["c3po"].difference
    return Section(
        anchor="lengths",
        title="What does C3PO do to gradient norms and step times when lengths vary?",
        answer=f"C3PO changes the gradient's scatter by {stated(change, True)}.",
        claim=CLAIMS["lengths"],
        draw=figures.length_bars(found, titles),
        tables=(Table(("scatter of", "GRPO", "C3PO", "difference"), rows),),
        notes=("Problems of two or three numbers: 6 or 11 tokens. Scatter: standard deviation over the steps of a "
               "quantity over its moving mean of 21 steps. Times are those of a shared machine.",),
    )  # fmt: skip


def sensitivity_section(records: Sequence[Record], titles: Mapping[str, str]) -> Section:
    found = sensitivity(records)
    fields = {name: knob.field for name in found if (knob := METHODS[name].knob)}
    most, least = (choose(found, key=lambda name: abs(found[name].entropy.mean)) for choose in (max, min))
    rows = tuple(
        (
            titles[name],
            fields[name],
            ", ".join(f"{one.value:g}{' (own)' if one.own else ''}" for one in knob.settings),
            ", ".join(number(one.entropy.mean) for one in knob.settings),
            _swing(knob.entropy),
            ", ".join(number(one.reward.mean) for one in knob.settings),
            _swing(knob.reward),
        )
        for name, knob in found.items()
    )
    length = found[most].rollouts
    return Section(
        anchor="knobs",
        title="How sensitive is each method to its main knob?",
        answer=f"After {length} rollouts entropy moves most with {titles[most]}'s {fields[most]}, by "
        f"{stated(found[most].entropy, True)} nats from the smallest value to the largest, and least with "
        f"{titles[least]}'s {fields[least]}, by {stated(found[least].entropy, True)}.",
        claim=CLAIMS["knobs"],
        draw=figures.knobs(found, titles, fields),
        height=5.0,
        tables=(
            Table(
                ("method", "knob", "values", "H", "largest less smallest", "reward", "largest less smallest"),
                rows,
                (f"{length} rollouts, no held-out evaluation; differences are paired, with 95 % intervals over "
                 f"{found[most].entropy.count} seeds, and * where they exclude 0.",),
            ),
        ),
    )  # fmt: skip


def _swing(one: Interval) -> str:
    return stated(one, sign=True) + (" *" if one.sign else "")
