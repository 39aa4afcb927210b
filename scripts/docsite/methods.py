"""The methods of docs/methods/*.yaml as tables of README.md and PAPERS.md, and as pages of the site.

    python scripts/docsite/methods.py    writes the two tables anew

A page takes its formula, and what was measured, from the data; hyper-parameters and what they mean from the class; the
recipe from recipes/; the paper's setting and numbers from PAPERS.md.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstrings
import laboratory
import yaml

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("advantages", "surrogates", "controls", "corrections", "mixtures", "controllers")
TABLES = {  # document: the head of its table
    "README.md": "| method | what it does | setting | recipe |\n|---|---|---|---|\n",
    "PAPERS.md": "| method | paper | use here | ours |\n|---|---|---|---|\n",
}
IN_LABORATORY = {  # titles there of methods that have another one, or several forms
    "STEER": ("STEER (theorem)", "STEER (released)", "STEER (full)"),
    "adaptive entropy bonus": ("adaptive bonus",),
}
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)]+)\)")


@dataclass(frozen=True, kw_only=True)
class Method:
    """name, does, setting, recipe: README's cells.   paper, use, ours: those of PAPERS.md.   section: its heading."""

    name: str
    does: str
    setting: str
    paper: str
    ours: str
    classes: list[str]
    when: str
    formula: str
    measured: str
    group: str
    recipe: str = ""
    use: str = ""
    section: str = ""
    cost: str = ""

    @property
    def slug(self) -> str:
        return self.recipe or re.sub(r"\W+", "_", self.name.lower())

    @property
    def readme_row(self) -> str:
        link = f"[{self.recipe}](recipes/{self.recipe}.yaml) |" if self.recipe else "|"
        return f"| {self.name} | {self.does} | {self.setting} | {link}"

    @property
    def papers_row(self) -> str:
        use = f"`recipes/{self.recipe}.yaml`" if self.recipe else self.use
        return f"| {self.name} | {self.paper} | {use} | {self.ours} |"


def read_methods() -> list[Method]:
    found = []
    for name in ORDER:
        data = yaml.safe_load((ROOT / "docs" / "methods" / f"{name}.yaml").read_text())
        found += [Method(group=data["group"], **entry) for entry in data["methods"]]
    return found


def paper_of(method: Method) -> str:
    """Its paper, also where the table says that it is that of the row above."""
    paper = ""
    for other in read_methods():
        paper = paper if other.paper == "the same" else other.paper
        if other == method:
            break
    return paper


def table(document: str) -> str:
    """The whole table of methods, as it stands in the document."""
    rows, group = [], ""
    for method in read_methods():
        if document == "README.md" and method.group != group:
            group = method.group
            rows.append(f"| {group} | | | |")
        rows.append(method.readme_row if document == "README.md" else method.papers_row)
    return TABLES[document] + "\n".join(rows) + "\n"


def standing(document: str) -> str:
    """The table that stands in the document now."""
    text = (ROOT / document).read_text()
    begin = text.index(TABLES[document])
    return text[begin : text.index("\n\n", begin) + 1]


def section(heading: str) -> str:
    """The text below a heading of PAPERS.md, whose links are made those of a page in docs/methods/."""
    for part in (ROOT / "PAPERS.md").read_text().split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title.partition(" (")[0] == heading:
            return LINK.sub(r"](../../\1)", body.strip())
    raise KeyError(f"PAPERS.md has no section {heading!r}")


def launch_line(recipe: str) -> str:
    """How a recipe is started, as its own comments say."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    script = re.search(r"recipes/(?:ppo|mole_sft)\.py", text)
    launch = re.search(r"recipes/accelerate/\w+\.yaml", text)
    config = launch[0] if launch else "recipes/accelerate/one_gpu.yaml"
    started = script[0] if script else "recipes/grpo.py"
    return f"accelerate launch --config_file {config} {started} --config recipes/{recipe}.yaml"


def page(method: Method) -> str:
    """The Markdown of one method."""
    parts = [
        f"# {method.name}",
        f"{method.does[0].upper()}{method.does[1:]}. Setting: {method.setting}.".replace("(docs/", "(../"),
    ]
    parts += [f"Paper: {paper_of(method)}.", f"**When.** {method.when}"]
    parts += ["## Formula", f"```text\n{method.formula}\n```"]
    knobs = [row for path in method.classes for row in _knobs(path)]
    if knobs:
        head = "| of | option | default | meaning |\n|---|---|---|---|\n"
        parts += ["## Options", head + "\n".join(knobs)]
    if method.classes:
        parts.append("Reference: " + ", ".join(f"[`{path}`][{path}]" for path in method.classes) + ".")
    parts += ["## Recipe", _recipe(method.recipe)]
    said = "what does each control's arithmetic cost?"
    cost = f' Its arithmetic takes {method.cost} µs a token on a CPU (LOG.md, "{said}").'
    parts += [
        "## Measured here",
        (method.measured + (cost if method.cost else "")).replace("LOG.md", "[LOG.md](../../LOG.md)", 1),
    ]
    parts += [
        laboratory.evidence(title)
        for title in IN_LABORATORY.get(method.name, (method.name,))
        if title in laboratory.titles()
    ]
    if method.section:
        parts += ["## The paper's setting and numbers", section(method.section)]
    else:
        parts += ["## The paper's setting and numbers", "None in [PAPERS.md](../../PAPERS.md)."]
    return "\n\n".join(part for part in parts if part) + "\n"


def index() -> str:
    """The Markdown of the table of all methods."""
    lines = [
        "# Methods",
        "One page each, made of the data of the tables of [README](../../README.md) and [PAPERS](../../PAPERS.md).",
        "",
    ]
    group = ""
    for method in read_methods():
        if method.group != group:
            group = method.group
            lines += ["", f"## {_title(group)}", "", "| method | what it does | setting |", "|---|---|---|"]
        lines.append(
            f"| [{method.name}]({method.slug}.md) | {method.does} | {method.setting} |".replace("(docs/", "(../")
        )
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """All pages by their place in docs/."""
    return {"methods/index.md": index(), **{f"methods/{m.slug}.md": page(m) for m in read_methods()}}


def navigation() -> list[Any]:
    """What the site's menu has below Methods."""
    menu: dict[str, list[Any]] = {}
    for method in read_methods():
        menu.setdefault(_title(method.group), []).append({method.name: f"methods/{method.slug}.md"})
    return ["methods/index.md", *({title: entries} for title, entries in menu.items())]


def _title(group: str) -> str:
    return group.split("**")[1]


def _recipe(name: str) -> str:
    if not name:
        return "None of its own: add the setting above to any recipe."
    return (
        f'```bash\n{launch_line(name)}\n```\n\n```yaml title="recipes/{name}.yaml"\n--8<-- "recipes/{name}.yaml"\n```'
    )


def _knobs(path: str) -> list[str]:
    found = docstrings.options(ROOT, path)
    cls = path.rpartition(".")[2]
    return [f"| `{cls}` | `{name}` | `{default}` | {meaning} |" for name, default, meaning in found]


def write() -> None:
    """Put the tables of the data into the documents."""
    for document in TABLES:
        path = ROOT / document
        path.write_text(path.read_text().replace(standing(document), table(document)))


if __name__ == "__main__":
    write()
