"""The project's docstrings as Markdown: `name: meaning.   other: meaning.` become a list, Raises and Ref labels.

Also what needs a class's source without importing it: its options and their defaults.
"""

import ast
import re
from pathlib import Path
from typing import Any

try:
    from griffe import Extension
except ImportError:  # the options of a class need no griffe
    Extension = object

LABELS = ("Raises", "Returns", "Metrics", "Ref", "Differs")
LABEL = re.compile(rf"(?<![\w.])({'|'.join(LABELS)}): ")
OPTION = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)", re.DOTALL)
COMMON = {
    "scope": "rollout: once per rollout, over all processes, by the policy that made it; micro\\_batch: in each "
    "micro-batch of one process, by the current policy."
}
AWAY = str.maketrans({"<": "&lt;", ">": "&gt;", "*": r"\*", "_": r"\_", "[": r"\[", "]": r"\]", "|": r"\|"})


class Docstrings(Extension):
    """What mkdocstrings shows: every docstring, rewritten once when it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring as Markdown: paragraphs as they are, except those that hold options or labels."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n[ \t]*\n", text.strip("\n")))


def entries(paragraph: str) -> list[str]:
    """The options and labeled sentences of a paragraph, one each; a paragraph of prose is one entry."""
    lines: list[str] = []
    for line in paragraph.splitlines():
        begins = OPTION.match(line.strip()) or LABEL.match(line.strip())
        if begins or not lines:
            lines.append(line.strip())
        else:
            lines[-1] += " " + line.strip()
    pieces = [piece.strip() for line in lines for piece in re.split(r" {3,}", line)]
    return [piece for piece in pieces if piece]


def options(root: Path, path: str) -> list[tuple[str, str, str]]:
    """(name, default, meaning) of a dataclass's fields and of those it inherits here, from the source; [] for what is
    no class. Of a configuration, whose fields have a help, its own alone.
    """
    meanings, found = {}, {}
    for node in reversed(_lineage(root, path)):
        meanings |= {**COMMON, **_meanings(ast.get_docstring(node) or "")}
        own = {ast.unparse(item.target): item for item in node.body if _is_field(item)}
        if any(_given(item).get("metadata") for item in own.values()):
            found = {}
        found = {**own, **{name: item for name, item in found.items() if name not in own}}
    constants = _constants(root, path)
    defaults = {name: _default(item) for name, item in found.items()}
    return [
        (name, constants.get(defaults[name], defaults[name]), _help(item) or meanings.get(name, ""))
        for name, item in found.items()
    ]


def fields(root: Path, path: str) -> str:
    """A table of a configuration class's own fields with the help of each, as the command line shows it."""
    rows = [f"| `{name}` | `{default}` | {meaning} |" for name, default, meaning in options(root, path)]
    return "\n".join(["| field | default | what it says |", "|---|---|---|", *rows])


def _lineage(root: Path, path: str) -> list[ast.ClassDef]:
    """A class and the classes of this repository that it inherits from, in the order in which they are asked."""
    module, _, name = path.rpartition(".")
    tree = ast.parse(source_of(root, module))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return []
    imported = {
        alias.asname or alias.name: f"{n.module}.{alias.name}"
        for n in tree.body
        if isinstance(n, ast.ImportFrom) and str(n.module).startswith("rlvr")
        for alias in n.names
    }
    here = {n.name: f"{module}.{n.name}" for n in tree.body if isinstance(n, ast.ClassDef)}
    bases = [{**imported, **here}.get(ast.unparse(base)) for base in node.bases]
    return [node, *(above for base in bases if base for above in _lineage(root, base))]


def _constants(root: Path, path: str) -> dict[str, str]:
    """The values of a class's module that have a name there."""
    found = {}
    for item in ast.parse(source_of(root, path.rpartition(".")[0])).body:
        if isinstance(item, ast.Assign):
            target, value = item.targets[0], item.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=True) if several else [(target, value)]
            found |= {ast.unparse(name): ast.unparse(x) for name, x in pairs}
    return found


def _is_field(item: ast.stmt) -> bool:
    return isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)


def _given(item: ast.AnnAssign) -> dict[str | None, ast.expr]:
    """The arguments of a field's `field(...)`."""
    return {word.arg: word.value for word in item.value.keywords} if isinstance(item.value, ast.Call) else {}


def _default(item: ast.AnnAssign) -> str:
    given = _given(item)
    value = given.get("default", given.get("default_factory", item.value))
    if value is None:
        return "–"
    return ast.unparse(value.body if isinstance(value, ast.Lambda) else value)


def _help(item: ast.AnnAssign) -> str:
    metadata = _given(item).get("metadata")
    if metadata is None:
        return ""
    said: str = ast.literal_eval(metadata)["help"].replace("%(default).0s", "")
    return escaped(said)


def source_of(root: Path, module: str) -> str:
    """The text of a module of the repository."""
    place = module.replace(".", "/")
    for base in (root, root / "kernels"):
        for path in (base / f"{place}.py", base / place / "__init__.py"):
            if path.is_file():
                return path.read_text()
    raise FileNotFoundError(f"no source of {module}")


def _paragraph(part: str) -> str:
    if all(line.startswith("    ") for line in part.splitlines()):
        return part  # an example or a formula of its own
    shown = []
    for entry in entries(part):
        label, option = LABEL.match(entry), OPTION.match(entry)
        if label:
            shown.append(f"- **{label[1]}.** {escaped(entry[label.end() :])}")
        elif option and len(option[1]) < 60:
            names = ", ".join(f"`{name}`" for name in option[1].split(", "))
            shown.append(f"- {names}: {escaped(option[2])}")
        else:
            shown.append(("" if not shown else "- ") + escaped(entry))
    first = shown[0]
    rest = shown[1:]
    return first + ("\n\n" if rest and not first.startswith("- ") else "\n" if rest else "") + "\n".join(rest)


def _meanings(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in re.split(r"\n[ \t]*\n", text):
        for entry in entries(part):
            match = OPTION.match(entry)
            if match and not LABEL.match(entry):
                for name in match[1].split(", "):
                    found.setdefault(name, escaped(match[2]))
    return found


def escaped(text: str) -> str:
    """Signs that Markdown would read, outside of `code`."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if p.startswith("`") and len(p) > 1 else p.translate(AWAY) for p in pieces)
