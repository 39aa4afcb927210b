"""The laboratory's results in the documentation: docs/lab/results.json and figures, the page made of them, and what
the methods' pages and PAPERS.md say of each method.

    python scripts/docsite/laboratory.py runs/lab      takes over what `make lab` found
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "lab"
COMMAND = "make lab"


@cache
def results() -> dict[str, Any]:
    """about: facts of the suite.   sections: by anchor, each with answer, claim, tables and notes."""
    held = json.loads((KEPT / "results.json").read_text())
    return {"about": held["about"], "sections": {section["anchor"]: section for section in held["sections"]}}


def table(anchor: str, place: int = 0) -> dict[str, dict[str, str]]:
    """Rows of a section's table by their first cell, each by the head of its columns, as in "pass@1 less GRPO"."""
    kept = results()["sections"][anchor]["tables"][place]
    columns = zip(["", *kept["head"]], kept["head"], strict=False)
    heads = [f"{before} {head}" if head == "less GRPO" else head for before, head in columns]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in kept["rows"]}


def titles() -> list[str]:
    """Of the methods that were compared."""
    return list(table("methods"))


def evidence(title: str) -> str:
    """What a method's page says of it."""
    row, verdict = table("methods")[title], table("recommendation", 1).get(title)
    said = [f"entropy {row['H at the end']}{_less(row, 'H at the end')}"]
    said += [f"{k} {row[k]}{_less(row, k)}" for k in row if k.startswith("pass@") and "less" not in k]
    text = f"{title} in [the laboratory](../lab/results.md) ({_setting()}): {', '.join(said)}"
    text += ". ± is half of a 95 % interval"
    if verdict is None:
        return text + "."
    early = _early(title, ("pass@1", "pass@64"))
    early = f" Less GRPO stopped where it has as much entropy: {early}." if early else ""
    scaled = "" if verdict["scaled"] == "no" else f" ({verdict['scaled']})"
    return (
        f"{text}; Δ: paired difference to GRPO, * where its interval excludes 0.{early} By the rules of that page: "
        f"**{verdict['here']}**. Setting there: `{verdict['setting here']}`{scaled}."
    )


def ours(title: str) -> str:
    """A cell of PAPERS.md."""
    row = table("methods")[title]
    names = ("H at the end", "pass@1", "pass@64")
    form = f" {title.partition(' ')[2]}" if title.endswith(")") else ""
    if not row["H at the end less GRPO"]:
        return "[laboratory](docs/lab/results.md): " + ", ".join(f"{_short(name)} {row[name]}" for name in names)
    differences = ", ".join(f"{_short(name)} {_starred(row, name)}" for name in names)
    early = _early(title, ("pass@64",))
    early = f"; less GRPO stopped early: {early}" if early else ""
    return f"[laboratory](docs/lab/results.md){form}, less GRPO: {differences}{early}"


def _early(title: str, names: tuple[str, ...]) -> str:
    """The method less GRPO that was stopped where it had as much entropy."""
    row = table("stopped").get(title) if "stopped" in results()["sections"] else None
    return ", ".join(f"{name} {_starred(row, name)}" for name in names) if row else ""


def _short(name: str) -> str:
    return "entropy" if name == "H at the end" else name


def _less(row: dict[str, str], name: str) -> str:
    return f" (Δ {_starred(row, name)})" if row[f"{name} less GRPO"] else ""


def _starred(row: dict[str, str], name: str) -> str:
    return row[f"{name} less GRPO"].replace(" *", "\\*")


def _setting() -> str:
    about = results()["about"]
    seeds = about["runs"].partition("seeds ")[2]
    return f"a Llama of .3 million parameters on Countdown, {about['a run']}, seeds {seeds}"


def page() -> str:
    """The Markdown of docs/lab/results.md."""
    about, sections = results()["about"], results()["sections"]
    lines = [
        "# What the laboratory found",
        "",
        f"Made of the records of `{COMMAND}` ([how](../lab.md)); papers' claims are quoted, all else is measured.",
        "",
        *(f"- {name}: {value}" for name, value in about.items() if name != "command"),
    ]
    for section in sections.values():
        lines += ["", f"## {section['title']}", "", f"**{_escaped(section['answer'])}**", ""]
        lines += [f"*The papers: {_escaped(section['claim'])}*"]
        if (KEPT / f"{section['anchor']}.png").exists():
            lines += ["", f"![{section['title']}]({section['anchor']}.png)"]
        for one in section["tables"]:
            if one["rows"]:
                lines += ["", _row(one["head"]), "|---" * len(one["head"]) + "|", *map(_row, one["rows"])]
            lines += [line for note in one["notes"] for line in ("", _escaped(note))]
        lines += ["", *(f"- {_escaped(note)}" for note in section["notes"])] if section["notes"] else []
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(f"`{cell}`" if cell.startswith("{") else _escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("|", "\\|")


def take(folder: Path) -> None:
    """Results and figures of a directory that `make lab` wrote."""
    KEPT.mkdir(exist_ok=True)
    shutil.copy(folder / "results.json", KEPT / "results.json")
    for figure in (folder / "figures").glob("*.png"):
        shutil.copy(figure, KEPT / figure.name)
    results.cache_clear()
    (KEPT / "results.md").write_text(page())


if __name__ == "__main__":
    take(Path(sys.argv[1]))
    import methods

    methods.write()
