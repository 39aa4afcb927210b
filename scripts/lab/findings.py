"""The sections on estimators, lengths and knobs."""

from collections.abc import Mapping, Sequence

from . import figures
from .cells import Section, Table, compared, number, signed, stated
from .claims import CLAIMS
from .methods import METHODS
from .questions import REFERENCE, BySeed, estimators
from .records import Record
from .scatter import SCATTER, lengths, sensitivity


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
    told = (
        "no difference in the gradient's scatter shown"
        if not change.sign
        else f"the gradient's scatter by {signed(change.mean)}"
    )
    return Section(
        anchor="lengths",
        title="What does C3PO do to gradient norms and step times when lengths vary?",
        answer=f"C3PO changes {told}." if change.sign else f"C3PO: {told}.",
        claim=CLAIMS["lengths"],
        draw=figures.length_bars(found, titles),
        tables=(Table(("scatter of", "GRPO", "C3PO", "difference"), rows),),
        notes=("Problems of two or three numbers: 6 or 11 tokens. Scatter: standard deviation over the steps of a "
               "quantity over its moving mean of 21 steps. Times are those of a shared machine.",),
    )  # fmt: skip


def sensitivity_section(records: Sequence[Record], titles: Mapping[str, str]) -> Section:
    found = sensitivity(records)
    fields = {name: knob.field for name in found if (knob := METHODS[name].knob)}
    rows, spread = [], {}
    for name, settings in found.items():
        spread[name] = max(s.entropy.mean for s in settings) - min(s.entropy.mean for s in settings)
        for one in settings:
            rows.append((
                titles[name], fields[name], f"{one.value:g}{' (own)' if one.own else ''}", str(one.entropy.count),
                f"{number(one.entropy.mean)} ({number(one.low_entropy)} to {number(one.high_entropy)})",
                number(one.reward.mean),
            ))  # fmt: skip
    widest = max(spread, key=lambda name: spread[name])
    length = next(iter(found.values()))[0].rollouts
    return Section(
        anchor="knobs",
        title="How sensitive is each method to its main knob?",
        answer=f"Entropy after {length} rollouts moves most with {titles[widest]}'s {fields[widest]}: by "
        f"{number(spread[widest])} nats over the three values.",
        claim=CLAIMS["knobs"],
        draw=figures.knobs(found, titles, fields),
        height=5.0,
        tables=(Table(("method", "knob", "value", "seeds", "H (range over seeds)", "reward"), tuple(rows)),),
        notes=(f"Fewer seeds than above and {length} rollouts: ranges, no intervals, and no held-out evaluation.",),
    )
