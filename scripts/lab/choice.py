"""The sections on the comparison of methods, and what follows for the choice of one."""

import json
from collections.abc import Mapping, Sequence

from . import figures, planes
from .cells import Section, Table, compared, stated
from .claims import CLAIMS
from .comparison import DEARER, PASSES, Row, dearer, pareto
from .intervals import interval
from .methods import ALL, REFERENCE, Method, Settings
from .questions import BySeed, at, shortest
from .records import stopped
from .verdicts import RULES, by_chance, goals, holds, verdicts


def comparison_section(rows: Sequence[Row], equal: Sequence[Row], prompts: int, titles: Mapping[str, str]) -> Section:
    """equal: rows at equal compute of methods that are dearer than GRPO."""
    compute = tuple(
        (titles[row.name], "" if row.name == REFERENCE else stated(row.cost),
         *compared(row.reward, row.name == REFERENCE),
         *(f"{share:.1%}" if share else "" for share in (row.clipped, row.touched)))
        for row in rows
    )  # fmt: skip
    held = [titles[row.name] for row in rows if holds(row)]
    looked_at = [one for row in rows if row.name != REFERENCE
                 for one in (row.entropy, row.reward, *row.pass_at.values())]  # fmt: skip
    tables = [
        _passes(rows, titles, (
            "± is half of the 95 % interval over seeds (Student's t). Differences are paired: the same seed draws"
            " the same problems. * : the interval excludes 0. All runs are asked the same "
            f"{prompts} held-out prompts, so the intervals are for these.",
            by_chance(looked_at) + " That counts entropy, and the reward of the next table. All are differences to "
            "the same runs of GRPO: where these were unlucky, all methods look better.")),
        Table(("method", "time per rollout / GRPO's", "reward", "less GRPO", "clipped", "touched"), compute, (
            "Reward: mean of the last 10 rollouts, on training problems that are drawn anew. Time: paired ratio of "
            "time/step, medians over rollouts; several runs share a machine, a few percent are noise. Clipped, "
            "touched: shares of the tokens that the clip stopped, and that the control left out, penalized, "
            "weighted or gave a term.",
            _at_equal_compute(rows, equal, titles))),
    ]  # fmt: skip
    if equal:
        tables.append(
            _passes(
                equal,
                titles,
                ("The same runs after fewer rollouts, which take about the time of GRPO's.",),
                rollouts=True,
            )
        )
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


def stopped_section(rows: Sequence[Row], plain: BySeed, titles: Mapping[str, str]) -> Section:
    """rows: of `at_equal_entropy`."""
    largest = max(set.intersection(*(set(row.pass_at) for row in rows)), key=int)
    better = {
        k: [titles[row.name] for row in rows if row.pass_at[k].difference.sign > 0]
        for k in dict.fromkeys(("1", largest))
    }
    told = "; ".join(f"pass@{k} is higher, shown, with {', '.join(names) or 'none'}" for k, names in better.items())
    looked_at = [one for row in rows for one in row.pass_at.values()]
    return Section(
        anchor="stopped",
        title="Do they do more than to train less?",
        answer=f"Less GRPO that is stopped where it has as much entropy: {told}.",
        claim=CLAIMS["stopped"],
        draw=planes.entropy_plane(rows, plain, titles, largest),
        tables=(
            _passes(rows, titles, (
                "Rollouts: of GRPO, until it was stopped, mean over the seeds. With each seed GRPO is taken where its "
                "entropy was nearest to that at which the method ends, among the rollouts after which the held-out "
                f"problems were asked. {by_chance(looked_at)}",), rollouts=True),
            _through(plain),
        ),
    )  # fmt: skip


def _through(plain: BySeed) -> Table:
    """GRPO at its stops and at its end."""
    way = [(count, [stopped(one, int(count)) for one in plain.values()]) for count in next(iter(plain.values())).stops]
    ks = sorted(next(iter(plain.values())).pass_at, key=int)
    rows = []
    for count, ends in [*way, (str(shortest(plain)), list(plain.values()))]:
        entropy = interval([at(one.entropy, 1.0) for one in ends])
        rows.append((count, stated(entropy), *(stated(interval([one.pass_at[k] for one in ends])) for k in ks)))
    head = ("GRPO after", "H", *(f"pass@{k}" for k in ks))
    return Table(head, tuple(rows), ("After 0 rollouts: the base model, with the entropy of the first rollout.",))


def pareto_section(rows: Sequence[Row], titles: Mapping[str, str]) -> Section:
    k = "16" if all("16" in row.pass_at for row in rows) else "1"
    names = [titles[name] for name in pareto(rows, k)]
    return Section(
        anchor="pareto",
        title=f"Which methods are not beaten in pass@1, pass@{k} and entropy at once?",
        answer=f"By their means: {', '.join(names) or 'none'}.",
        claim=CLAIMS["pareto"],
        draw=planes.pareto_plot(rows, titles, k),
        height=5.0,
        notes=("Bars are 95 % intervals over seeds. A method may stand on the front by chance: see the intervals.",),
    )


def recommendation_section(
    rows: Sequence[Row], early: Sequence[Row], methods: Mapping[str, BySeed], titles: Mapping[str, str]
) -> Section:
    """early: rows of `at_equal_entropy`."""
    plain = methods[REFERENCE]
    used = {name: next(iter(runs.values())).settings for name, runs in methods.items()}
    base = sum(record.reward[0] for record in plain.values()) / len(plain)
    found = verdicts(rows, base, early)
    table = tuple(
        (titles[one.name], one.overall, ", ".join(one.good_for) or "nothing shown",
         *("; ".join(told) or "none" for told in (one.effects, one.early)), *_settings(ALL[one.name], used[one.name]))
        for one in found
    )  # fmt: skip
    by_goal = tuple(
        (
            goal,
            ", ".join(titles[one.name] for one in found if goal in one.good_for) or "none shown",
            ", ".join(titles[one.name] for one in found if goal in one.more_than_early) or "none shown",
        )
        for goal in goals(rows)
    )
    return Section(
        anchor="recommendation",
        title="Which method when?",
        answer="; ".join(f"for {goal}: {names}" for goal, names, _ in by_goal) + ".",
        claim=CLAIMS["recommendation"],
        tables=(
            Table(("goal", "methods with a shown gain over GRPO", "over GRPO stopped early, too"), by_goal),
            Table(("method", "here", "use it for", "shown effects, less GRPO",
                   "shown effects, less GRPO stopped at as much entropy", "setting here", "scaled",
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
