"""What MkDocs is told beside docs/: the root's documents, recipes, the methods' pages, and links between all.

The files of docs/ and the root link to each other as they lie in the repository, so that a code host shows them, too;
here each link is turned to where its target lies in the site.
"""

import argparse
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import methods
from mkdocs.structure.files import File

ROOT = methods.ROOT
PAGES = {"README.md": "index.md", "LOG.md": "LOG.md", "PAPERS.md": "PAPERS.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
PAGES |= {"CHANGELOG.md": "CHANGELOG.md"}
OF_REPOSITORY = {site: real for real, site in PAGES.items()}
FIELDS = re.compile(r"^<!-- fields: ([\w.]+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")
COMMANDS, METRICS = "<!-- commands -->", "<!-- metrics -->"
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = methods.navigation()
    return config


def on_files(files: Any, *, config: Any) -> Any:
    for real, site in PAGES.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / real)))
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        files.append(File.generated(config, str(recipe.relative_to(ROOT)), abs_src_path=str(recipe)))
    for site, text in methods.pages().items():
        files.append(File.generated(config, site, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    site = page.file.src_uri
    markdown = FIELDS.sub(lambda found: docstrings.fields(ROOT, found[1]), markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    if METRICS in markdown:
        markdown = markdown.replace(METRICS, _metrics())
    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(lambda m: _link(m, site), part) for part in parts)


def _commands() -> str:
    """Each subcommand of `rlvr` as its own --help says."""
    sys.path.insert(0, str(ROOT))
    from rlvr.cli import _parser

    found = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    said = {choice.dest: choice.help for choice in found._choices_actions}
    return "\n\n".join(f"## rlvr {name}\n\n{_command(said[name], one)}" for name, one in found.choices.items())


def _command(said: str | None, parser: argparse.ArgumentParser) -> str:
    if not parser.add_help:  # its flags are fields of dataclasses
        from rlvr.trainers import checkpoint_choice, planner

        parser = {"plan": planner, "select-checkpoint": checkpoint_choice}[parser.prog.split()[-1]]._parser()
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    return f"{said}.\n\n```text\n{parser.format_help().strip()}\n```"


def _metrics() -> str:
    """The table of all metrics, one area after the other, as `rlvr metrics` prints it."""
    sys.path.insert(0, str(ROOT))
    from rlvr.monitor.metrics import EFFECT, METRICS

    lines = ["| metric | unit | meaning | normal |", "|---|---|---|---|"]
    for name, entry in [*METRICS.items(), ("<control>/effect", EFFECT)]:
        cells = (docstrings.escaped(cell or "") for cell in (entry.unit, entry.meaning, entry.normal))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _link(found: re.Match[str], site: str) -> str:
    """A link of the repository as one of the site; the name alone where the site does not have the target."""
    image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    here = posixpath.dirname(OF_REPOSITORY.get(site, f"docs/{site}"))
    real = posixpath.normpath(posixpath.join(here, target))
    there = PAGES.get(real) or (real if real.startswith("recipes/") else real.removeprefix("docs/"))
    if site == "index.md" and real.startswith("recipes/"):
        there = _method_of(Path(real).stem) or there
    if real not in PAGES and not real.startswith(("docs/", "recipes/")):
        return f"`{real}`" if (ROOT / real).exists() else found[0]
    if image and not (ROOT / real).is_file():
        return f"*{text}*"
    return f"{image}[{text}]({posixpath.relpath(there, posixpath.dirname(site) or '.')}{anchor})"


def _method_of(recipe: str) -> str | None:
    """The page of the method that a recipe is of."""
    return next((f"methods/{m.slug}.md" for m in methods.read_methods() if m.recipe == recipe), None)
