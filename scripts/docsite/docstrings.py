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
    "scope": "rollout: statistics of the whole rollout over all processes; micro\\_batch: as published code does"
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
    """(name, default, meaning) of a dataclass's fields, from its source; [] for what is no class."""
    module, _, name = path.rpartition(".")
    tree = ast.parse(source_of(root, module))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return []
    meanings = _meanings(ast.get_docstring(node) or "")
    found = []
    for item in node.body:
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and "ClassVar" not in ast.unparse(item.annotation)
        ):
            default = "" if item.value is None else ast.unparse(item.value)
            found.append(
                (
                    item.target.id,
                    default or "–",
                    meanings.get(item.target.id, COMMON.get(item.target.id, "see the reference")),
                )
            )
    return found


def fields(root: Path, path: str) -> str:
    """A table of a configuration class's fields with the help of each, as the command line shows it."""
    module, _, name = path.rpartition(".")
    node = next(n for n in ast.parse(source_of(root, module)).body if isinstance(n, ast.ClassDef) and n.name == name)
    rows = ["| field | default | what it says |", "|---|---|---|"]
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call)):
            continue
        given = {word.arg: word.value for word in item.value.keywords}
        if "metadata" not in given:
            continue
        said = ast.literal_eval(given["metadata"])["help"].replace("%(default).0s", "")
        default = ast.unparse(given["default"]) if "default" in given else ast.unparse(given["default_factory"])
        rows.append(f"| `{ast.unparse(item.target)}` | `{default}` | {said.translate(AWAY)} |")
    return "\n".join(rows)


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
            shown.append(f"- **{label[1]}.** {_escaped(entry[label.end() :])}")
        elif option and len(option[1]) < 60:
            names = ", ".join(f"`{name}`" for name in option[1].split(", "))
            shown.append(f"- {names}: {_escaped(option[2])}")
        else:
            shown.append(("" if not shown else "- ") + _escaped(entry))
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
                    found.setdefault(name, _escaped(match[2]))
    return found


def _escaped(text: str) -> str:
    """Signs that Markdown would read, outside of `code`."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if p.startswith("`") and len(p) > 1 else p.translate(AWAY) for p in pieces)
