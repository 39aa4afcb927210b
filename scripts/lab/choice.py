"""The sections on the comparison of methods, and what follows for the choice of one."""

import json
from collections.abc import Mapping, Sequence

from . import figures
from .cells import Section, Table, compared, stated
from .claims import CLAIMS
from .comparison import DEARER, PASSES, Row, dearer, pareto
from .methods import ALL, Method, Settings
from .questions import REFERENCE, BySeed
from .verdicts import RULES, by_chance, by_goal, holds, verdicts


def comparison_section(rows: Sequence[Row], equal: Sequence[Row], prompts: int, titles: Mapping[str, str]) -> Section:
    """equal: rows at equal compute of methods that are dearer than GRPO."""
    compute = tuple(
        (titles[row.name], "" if row.name == REFERENCE else stated(row.cost),
         *compared(row.reward, row.name == REFERENCE), f"{row.touched:.1%}" if row.touched else "")
        for row in rows
    )  # fmt: skip
    held = [titles[row.name] for row in rows if holds(row)]
    made, shown, chance = by_chance(rows)
    tables = [
        _passes(rows, titles, (
            "± is half of the 95 % interval over seeds (Student's t). Differences are paired: the same seed draws"
            " the same problems. * : the interval excludes 0. All runs are asked the same held-out problems, "
            f"{prompts} of them, so the intervals are for these.",
            f"Of {made} differences on this page, reward included, {shown} exclude 0; about {chance:.1f} would if "
            "nothing differed.")),
        Table(("method", "time per rollout / GRPO's", "reward", "less GRPO", "tokens touched"), compute, (
            "Reward: mean of the last 10 rollouts, on training problems that are drawn anew. Time: paired ratio of "
            "time/step, medians over rollouts; several runs share a machine, a few percent are noise. Tokens touched: "
            "largest share that was clipped, masked, penalized or weighted; terms on every token have none.",
            _at_equal_compute(rows, equal, titles))),
    ]  # fmt: skip
    if equal:
        tables.append(_passes(equal, titles, ("Fewer rollouts, that take about the time of GRPO's.",), rollouts=True))
    return Section(
        anchor="methods",
        title="Which methods hold entropy, and what does it do to pass@1 and pass@k?",
        answer=f"Holding entropy, by the rules below the last table: {', '.join(held) or 'none'}.",
        claim=CLAIMS["methods"],
        draw=figures.differences(rows, titles),
        height=5.0,
        tables=tuple(tables),
    )


def _passes(rows: Sequence[Row], titles: Mapping[str, str], notes: tuple[str, ...], rollouts: bool = False) -> Table:
    ks = [k for k in PASSES if all(k in row.pass_at for row in rows)]
    head = ["method", *(["rollouts"] if rollouts else []), "seeds", "H at the end", "less GRPO"]
    for k in ks:
        head += [f"pass@{k}", "less GRPO"]
    table = []
    for row in rows:
        plain = row.name == REFERENCE and not rollouts
        cells = [titles[row.name], *([str(row.rollouts)] if rollouts else []), str(row.seeds)]
        for one in (row.entropy, *(row.pass_at[k] for k in ks)):
            cells += compared(one, plain)
        table.append(tuple(cells))
    return Table(tuple(head), tuple(table), notes)


def _at_equal_compute(rows: Sequence[Row], equal: Sequence[Row], titles: Mapping[str, str]) -> str:
    dear = dearer(rows)
    again = {row.name for row in equal}
    missing = [titles[row.name] for row in dear if row.name not in again]
    told = f"Equal compute: methods within {DEARER - 1:.0%} of GRPO's time are compared at it above"
    told += f", {', '.join(titles[row.name] for row in equal)} below" if equal else ""
    return told + (f"; {', '.join(missing)}: not run at it." if missing else ".")


def pareto_section(rows: Sequence[Row], titles: Mapping[str, str]) -> Section:
    k = "16" if all("16" in row.pass_at for row in rows) else "1"
    names = [titles[name] for name in pareto(rows, k)]
    return Section(
        anchor="pareto",
        title=f"Which methods are not beaten in pass@1, pass@{k} and entropy at once?",
        answer=f"By their means: {', '.join(names) or 'none'}.",
        claim=CLAIMS["pareto"],
        draw=figures.pareto_plot(rows, titles, k),
        height=5.0,
        notes=("Bars are 95 % intervals over seeds. A method may stand on the front by chance: see the intervals.",),
    )


def recommendation_section(rows: Sequence[Row], methods: Mapping[str, BySeed], titles: Mapping[str, str]) -> Section:
    plain = methods[REFERENCE]
    used = {name: next(iter(runs.values())).settings for name, runs in methods.items()}
    base = sum(record.reward[0] for record in plain.values()) / len(plain)
    found = verdicts(rows, base)
    table = tuple(
        (titles[one.name], one.overall, ", ".join(one.good_for) or "nothing shown", "; ".join(one.effects),
         *_settings(ALL[one.name], used[one.name]))
        for one in found
    )  # fmt: skip
    goals = tuple(
        (goal, ", ".join(titles[name] for name in names) or "none shown") for goal, names in by_goal(found).items()
    )
    return Section(
        anchor="recommendation",
        title="Which method when?",
        answer="; ".join(f"for {goal}: {names}" for goal, names in goals) + ".",
        claim=CLAIMS["recommendation"],
        tables=(
            Table(("goal", "methods with a shown gain over GRPO"), goals),
            Table(("method", "here", "use it for", "shown effects, less GRPO", "setting here", "scaled",
                   "the papers' setting and claim, at their scale"), table),
        ),
        notes=(*RULES,
               "Nothing here is said of other models, other tasks or longer runs than those at the top of this page."),
    )  # fmt: skip


def _settings(method: Method, used: Settings) -> tuple[str, str, str]:
    recipe = f"recipes/{method.recipe}: " if method.recipe else ""
    claim = f"{recipe}{method.claim} ({method.source})" if method.claim else method.source
    scaled = method.scaled or "no" if used == method.settings else "as it was run"
    return json.dumps(used), scaled, claim
