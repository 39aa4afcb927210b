"""The sections on plain GRPO and on the comparison of methods."""

from collections.abc import Mapping, Sequence

from . import figures
from .cells import Section, Table, compared, number, stated
from .claims import CLAIMS
from .intervals import Interval
from .questions import PASSES, BySeed, Row, collapse, law, spending


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
                 "H = 0.",),
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
    quarter = found.at[0.25]
    return Section(
        anchor="spending",
        title="Which share of the entropy is spent in which share of the gain?",
        answer=f"After a quarter of the run {stated(quarter[0])} of the entropy is spent and {stated(quarter[1])} of "
        "the gain is made.",
        claim=CLAIMS["spending"],
        draw=figures.spent(found),
        tables=(Table(("of the run", "share of the entropy spent", "share of the gain made"), rows),),
        notes=("Shares are of means over 5 rollouts, from the first such window to the last; the first five rollouts"
               " are the learning rate's warmup.",),
    )  # fmt: skip


def comparison_section(rows: Sequence[Row], prompts: int, titles: Mapping[str, str]) -> Section:
    ks = [k for k in PASSES if all(k in row.pass_at for row in rows)]
    head = ["method", "seeds", "H at the end", "less GRPO"]
    for k in ks:
        head += [f"pass@{k}", "less GRPO"]
    table = []
    for row in rows:
        cells = [titles[row.name], str(row.seeds), *compared(row.entropy)]
        for k in ks:
            cells += compared(row.pass_at[k])
        table.append(tuple(cells))
    compute = tuple(
        (titles[row.name], number(row.seconds.mean, 3), *compared(row.reward), str(row.affordable),
         *compared(row.equal_compute), f"{row.touched:.1%}")
        for row in rows
    )  # fmt: skip
    held = [titles[row.name] for row in rows if row.entropy.difference.sign > 0]
    return Section(
        anchor="methods",
        title="Which methods hold entropy, and what does it do to pass@1 and pass@k?",
        answer=f"More entropy than GRPO at the end, with an interval that excludes 0: {', '.join(held) or 'none'}.",
        claim=CLAIMS["methods"],
        draw=figures.differences(rows, titles),
        height=5.0,
        tables=(
            Table(tuple(head), tuple(table), (
                "± is half of the 95 % interval over seeds (Student's t). Differences are paired: the same seed draws"
                " the same problems. * : the interval excludes 0. All runs are asked the same held-out problems, "
                f"{prompts} of them, so the intervals are for these.",)),
            Table(
                ("method", "s per rollout", "reward, equal samples", "less GRPO", "rollouts at equal compute",
                 "reward, equal compute", "less GRPO", "tokens touched"),
                compute,
                ("Reward: mean of the last 10 rollouts, on training problems that are drawn anew. Equal compute: read "
                 "after as many rollouts as fit into the time of the fastest method, by time/step; several runs share "
                 "a machine, so differences of some percent in time are noise. Tokens touched: largest share that the "
                 "clip or the control changed.",),
            ),
        ),
    )  # fmt: skip
