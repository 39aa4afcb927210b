"""The page: figures, tables and sentences made of the answers, in one self-contained file.

Every number on it comes from the records; the template only arranges them, and escapes whatever it is given.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jinja2

from .answers import collapse_section, law_section, spending_section
from .cells import Section
from .choice import comparison_section, pareto_section, recommendation_section, stopped_section
from .comparison import at_equal_compute, at_equal_entropy, comparison
from .drawing import DARK, LIGHT, render
from .findings import estimators_section, lengths_section, mechanics_section, sensitivity_section
from .methods import ALL, REFERENCE
from .questions import WINDOW, select, shortest
from .records import Kept, Record, with_stops
from .verdicts import holds

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def sections(records: Sequence[Record]) -> list[Section]:
    """The questions that the records can answer, in order."""
    methods = {name: runs for name, runs in select(records, "compare").items() if name in ALL}
    if REFERENCE not in methods:
        return []
    titles = {name: ALL[name].title for name in ALL}
    plain, rows = methods[REFERENCE], comparison(methods)
    held = [row.name for row in rows if holds(row)]
    found = [
        collapse_section(plain, methods, held, titles),
        law_section(plain, methods, titles),
        *([spending_section(plain)] if shortest(plain) > 2 * WINDOW else []),
        comparison_section(rows, at_equal_compute(methods), max(one.prompts for one in plain.values()), titles),
    ]
    if early := at_equal_entropy(methods):
        found.append(stopped_section(early, with_stops(plain), titles))
    if watched := select(records, "probe").get(REFERENCE):
        found += [mechanics_section(watched), estimators_section(watched)]
    varied = select(records, "lengths")
    if {REFERENCE, "c3po"} <= varied.keys():
        found.append(lengths_section(varied, titles))
    if any(record.part == "knob" for record in records):
        found.append(sensitivity_section(records, titles))
    if len(rows) > 1 and all("1" in row.pass_at for row in rows):
        found += [pareto_section(rows, titles), recommendation_section(rows, early, methods, titles)]
    return found


def write_page(kept: Kept, out: Path) -> Path:
    """report.html, what it says as results.json, and figures/*.png in the directory; returns the page."""
    found = sections(kept.records)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[str, str]] = {}
    for section in found:
        if section.draw is not None:
            light = render(section.draw, LIGHT, section.height)
            (out / "figures" / f"{section.anchor}.png").write_bytes(light)
            pictures[section.anchor] = (_inline(light), _inline(render(section.draw, DARK, section.height)))
    told = [{f.name: getattr(section, f.name) for f in fields(section) if f.name != "draw"} for section in found]
    plain = {"about": kept.about, "sections": told}
    (out / "results.json").write_text(json.dumps(plain, default=asdict, ensure_ascii=False, indent=1) + "\n")
    page = out / "report.html"
    page.write_text(html(found, kept.about, kept.missing, pictures), encoding="utf-8")
    return page


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def html(
    found: Sequence[Section],
    about: Mapping[str, str],
    missing: Sequence[str],
    pictures: Mapping[str, tuple[str, str]],
) -> str:
    """The page.   pictures: (light, dark) as data URIs, by the section's anchor."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template: Any = environment.from_string(TEMPLATE.read_text())
    return template.render(sections=found, about=about, missing=missing, pictures=pictures)
