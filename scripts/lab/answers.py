"""The sections on plain GRPO."""

from collections.abc import Collection, Mapping

from . import figures
from .cells import Section, Table, stated
from .claims import CLAIMS
from .intervals import Interval
from .questions import BySeed, collapse, held_out_law, law, spending


def collapse_section(
    plain: BySeed, methods: Mapping[str, BySeed], held: Collection[str], titles: Mapping[str, str]
) -> Section:
    """held: methods that hold entropy."""
    c = collapse(plain)
    rows = [(titles[name], *(stated(x) for x in _entropies(runs))) for name, runs in methods.items()]
    return Section(
        anchor="collapse",
        title="Does entropy collapse under GRPO?",
        answer=f"From {stated(c.start)} to {stated(c.at[0.25])} nats in the first quarter of the run and to "
        f"{stated(c.at[1.0])} at its end, over {len(plain)} seeds.",
        claim=CLAIMS["collapse"],
        draw=figures.entropy_curves(methods, held, titles),
        tables=(Table(("method", "H at the start", "10 %", "25 %", "50 %", "100 %"), tuple(rows)),),
    )


def _entropies(runs: BySeed) -> tuple[Interval, ...]:
    c = collapse(runs)
    return (c.start, *c.at.values())


def law_section(plain: BySeed, methods: Mapping[str, BySeed], titles: Mapping[str, str]) -> Section:
    fit = law(plain)
    fits = {name: law(runs) for name, runs in methods.items()}
    ahead = tuple(
        (f"{f.share:.0%}", stated(f.law, True), stated(f.size), stated(f.line, True), stated(f.line_size),
         stated(f.last, True), stated(f.ceiling, True), f"{f.covered:.0%}")
        for f in fit.foresight
    )  # fmt: skip
    told = "".join(
        f" Told the entropy at the end, the law of the first {f.share:.0%} of the rollouts misses the reward there by "
        f"{stated(f.size)} (mean absolute error), the line by {stated(f.line_size)}."
        for f in fit.foresight
    )
    held = held_out_law(plain)
    asked = (
        f" Of held-out pass@1 on the way of the runs: R² {stated(held.r2)} and {stated(held.r2_linear)}."
        if held
        else ""
    )
    return Section(
        anchor="law",
        title="How well does R = -a exp(H) + b fit, and how well does it predict?",
        answer=f"Of training reward: R² {stated(fit.r2)} for the law, {stated(fit.r2_linear)} for a straight line in "
        f"H.{told}{asked}",
        claim=CLAIMS["law"],
        draw=figures.law_fit(plain),
        tables=(
            Table(
                ("fitted to the first", "error of the law", "its size", "of a line in H", "its size",
                 "of the last reward seen", "of the ceiling b - a", "in the 95 % interval"),
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
