"""The sections on plain GRPO."""

from collections.abc import Mapping

from . import figures
from .cells import Section, Table, stated
from .claims import CLAIMS
from .intervals import Interval
from .questions import BySeed, collapse, law, spending


def collapse_section(plain: BySeed, methods: Mapping[str, BySeed], titles: Mapping[str, str]) -> Section:
    c = collapse(plain)
    rows = [(titles[name], *(stated(x) for x in _entropies(runs))) for name, runs in methods.items()]
    return Section(
        anchor="collapse",
        title="Does entropy collapse under GRPO?",
        answer=f"From {stated(c.start)} to {stated(c.at[1.0])} nats over {len(plain)} seeds; "
        f"{stated(c.first_quarter)} of the drop is in the first quarter.",
        claim=CLAIMS["collapse"],
        draw=figures.entropy_curves(methods, titles),
        tables=(Table(("method", "H at the start", "10 %", "25 %", "50 %", "100 %"), tuple(rows)),),
    )


def _entropies(runs: BySeed) -> tuple[Interval, ...]:
    c = collapse(runs)
    return (c.start, *c.at.values())


def law_section(plain: BySeed, methods: Mapping[str, BySeed], titles: Mapping[str, str]) -> Section:
    fit = law(plain)
    fits = {name: law(runs) for name, runs in methods.items()}
    ahead = tuple(
        (f"{f.share:.0%}", stated(f.law, True), stated(f.size), stated(f.line, True), stated(f.last, True),
         stated(f.ceiling, True), f"{f.covered:.0%}")
        for f in fit.foresight
    )  # fmt: skip
    told = "".join(
        f" The first {f.share:.0%} of the rollouts miss the final reward by {stated(f.size)} (mean absolute error)."
        for f in fit.foresight
    )
    return Section(
        anchor="law",
        title="How well does R = -a exp(H) + b fit, and how well does it predict?",
        answer=f"R² {stated(fit.r2)} for the law, {stated(fit.r2_linear)} for a straight line in H.{told}",
        claim=CLAIMS["law"],
        draw=figures.law_fit(plain),
        tables=(
            Table(
                ("fitted to the first", "error of the law", "its size", "of a line in H", "of the last reward seen",
                 "of the ceiling b - a", "in the 95 % interval"),
                ahead,
                ("Error: predicted less measured mean reward of the last 10 rollouts, for law and line at the entropy "
                 "that those rollouts had, which a forecast would not know. The ceiling is what the law says of "
                 "H = 0. The 95 % interval is that of the fitted mean, without the noise of those ten rollouts.",),
            ),
            Table(
                ("method", "R² of the law", "R² of a line", "a", "b"),
                tuple(
                    (titles[name], stated(f.r2), stated(f.r2_linear), stated(f.a), stated(f.b))
                    for name, f in fits.items()
                ),
                ("Fitted to means over 5 rollouts; a method that holds entropy leaves the law little to fit.",),
            ),
        ),
    )  # fmt: skip


def spending_section(plain: BySeed) -> Section:
    found = spending(plain)
    rows = tuple((f"{share:.0%}", stated(h), stated(r)) for share, (h, r) in found.at.items())
    share = 0.25 if 0.25 in found.at else max(found.at)
    spent, made = found.at[share]
    return Section(
        anchor="spending",
        title="Which share of the entropy is spent in which share of the gain?",
        answer=f"After {share:.0%} of the run {stated(spent)} of the entropy is spent and {stated(made)} of the gain "
        "is made.",
        claim=CLAIMS["spending"],
        draw=figures.spent(found),
        tables=(Table(("of the run", "share of the entropy spent", "share of the gain made"), rows),),
        notes=("Shares are of means over 5 rollouts, from the first such window to the last.",),
    )
