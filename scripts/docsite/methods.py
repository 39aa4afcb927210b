"""The methods of docs/methods/*.yaml as tables of README.md and PAPERS.md, and as pages of the site.

    python scripts/docsite/methods.py    writes the two tables anew

A page takes its formula, how it is set, and what was measured, from the data; hyper-parameters and what they mean from
the class; the recipe from recipes/; the paper's setting and numbers from PAPERS.md.
"""

import re
from dataclasses import dataclass, field
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
OPTIONS = "| of | option | default | meaning |\n|---|---|---|---|\n"
NONE = ["Not measured here."]
COST = "what does each control's arithmetic cost?"
IN_LABORATORY = {  # titles there of methods that have another one, or several forms
    "STEER": ("STEER (theorem)", "STEER (released)", "STEER (full)"),
    "adaptive entropy bonus": ("adaptive bonus",),
}
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)]+)\)")


@dataclass(frozen=True, kw_only=True)
class Method:
    """name, does, setting, recipe: README's cells.   paper, use, ours: those of PAPERS.md.   section: its heading.

    yaml: what makes the method of the recipe `into`, in place of its lines of the same names.   needs: what else it
    asks for.   fields: TRL's that belong to it, each [default, meaning].   more: other recipes.   at: its page's name.
    """

    name: str
    does: str
    setting: str
    paper: str
    ours: str
    classes: list[str]
    when: str
    formula: str
    group: str
    yaml: str
    into: str
    needs: str = ""
    recipe: str = ""
    use: str = ""
    section: str = ""
    measured: str = ""
    cost: str = ""
    at: str = ""
    more: list[str] = field(default_factory=list)
    fields: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return self.at or self.recipe or re.sub(r"\W+", "_", self.name.lower())

    @property
    def readme_row(self) -> str:
        link = f"[{self.recipe}](recipes/{self.recipe}.yaml) |" if self.recipe else "|"
        return f"| {self.name} | {self.does} | {self.setting} | {link}"

    @property
    def papers_row(self) -> str:
        use = f"`recipes/{self.recipe}.yaml`" if self.recipe else self.use
        found = [laboratory.ours(title) for title in self.compared]
        return f"| {self.name} | {self.paper} | {use} | {'; '.join([self.ours, *found])} |"

    @property
    def compared(self) -> list[str]:
        """Its titles in the laboratory's results."""
        wanted = IN_LABORATORY.get(self.name, (self.name,))
        return [title for title in wanted if title in laboratory.titles()]


def read_methods() -> list[Method]:
    found = []
    for name in ORDER:
        data = yaml.safe_load((ROOT / "docs" / "methods" / f"{name}.yaml").read_text())
        found += [Method(group=data["group"], **entry) for entry in data["methods"]]
    return found


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
    launch = re.search(r"recipes/accelerate/\w+\.yaml", text)
    if launch is None and yaml.safe_load(text).get("bf16") is False:
        return f"python {_script(recipe)} --config recipes/{recipe}.yaml    # on a CPU, after make quickstart"
    config = launch[0] if launch else "recipes/accelerate/one_gpu.yaml"
    return f"accelerate launch --config_file {config} {_script(recipe)} --config recipes/{recipe}.yaml"


def _script(recipe: str) -> str:
    """What a recipe is launched with."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text()
    script = re.search(r"Launch it with (recipes/\w+\.py)", text)
    return script[1] if script else "recipes/grpo.py"


def page(method: Method) -> str:
    """The Markdown of one method."""
    setting = f"Setting: {method.setting}.".replace("(docs/", "(../")
    parts = [f"# {method.name}", f"{method.does[0].upper()}{method.does[1:]}. {setting}".replace("(docs/", "(../")]
    parts += [f"Paper: {method.paper}.", f"**When.** {method.when}"]
    parts += [f"**Needs.** {method.needs}"] if method.needs else []
    parts += ["## Formula", f"```text\n{method.formula}\n```"]
    parts += ["## Setting", _added(method), f"```yaml\n{method.yaml.strip()}\n```"]
    parts += ["## Options", OPTIONS + "\n".join(_knobs(method))]
    if method.classes:
        parts.append("Reference: " + ", ".join(f"[`{path}`][{path}]" for path in method.classes) + ".")
    parts += ["## Recipe", *map(_recipe, [method.recipe, *method.more])] if method.recipe else []
    found = [laboratory.evidence(title) for title in method.compared]
    parts += ["## Measured here", *([_measured(method), *found] if method.measured or method.cost or found else NONE)]
    parts += ["## The paper's setting and numbers", section(method.section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def started(method: Method) -> str:
    """What its setting is launched with."""
    has_critic = any(path.endswith(".PPOConfig") for path in method.classes)
    return "recipes/ppo.py" if has_critic else _script(method.into)


def _added(method: Method) -> str:
    return (
        f"In place of the lines of the same names in `recipes/{method.into}.yaml`, launched with `{started(method)}`:"
    )


def _measured(method: Method) -> str:
    cost = f'Its arithmetic takes {method.cost} µs a token on a CPU with other load (LOG.md, "{COST}").'
    said = " ".join(part for part in (method.measured, cost if method.cost else "") if part)
    return said.replace("LOG.md", "[LOG.md](../../LOG.md)")


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
    return (
        f'```bash\n{launch_line(name)}\n```\n\n```yaml title="recipes/{name}.yaml"\n--8<-- "recipes/{name}.yaml"\n```'
    )


def _knobs(method: Method) -> list[str]:
    found = []
    for path in method.classes:
        found += [(path.rpartition(".")[2], *option) for option in docstrings.options(ROOT, path)]
    found += [("TRL", name, *said) for name, said in method.fields.items()]
    return [f"| `{of}` | `{name}` | `{default}` | {meaning} |" for of, name, default, meaning in found]


def write() -> None:
    """Put the tables of the data into the documents."""
    for document in TABLES:
        path = ROOT / document
        path.write_text(path.read_text().replace(standing(document), table(document)))


if __name__ == "__main__":
    write()
