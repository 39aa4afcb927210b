"""A run as one self-contained HTML page: no network, no scripts, pictures inlined for light and dark screens."""

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr import __version__
from rlvr.monitor.figures import DARK, LIGHT, Picture, Records, render
from rlvr.monitor.metrics import METRICS
from rlvr.monitor.pictures import PICTURES
from rlvr.monitor.records import read_evals, read_run, read_steps
from rlvr.monitor.samples import escape, samples_html
from rlvr.monitor.summary import format_summary, summarize

_STYLE = """
:root{color-scheme:light dark;--paper:#f4f5f7;--card:#fff;--ink:#23272e;--soft:#5c6470;--line:#dfe3e8;--heat:230 159 0}
@media(prefers-color-scheme:dark){
:root{--paper:#13161b;--card:#1b1f26;--ink:#dfe3e8;--soft:#9aa3af;--line:#363c46;--heat:0 114 178}}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0 0 .2rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:0 0 .6rem}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem 1.2rem;margin:1rem 0}
img{display:block;width:100%;max-width:54rem;height:auto}
pre,.text{font:13px/1.55 ui-monospace,Menlo,Consolas,monospace}
pre{overflow-x:auto;margin:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.note,.facts,footer{color:var(--soft);font-size:.87rem;margin:.2rem 0 .6rem}
article{border-top:1px solid var(--line);padding:.7rem 0}
.t{background:rgb(var(--heat)/var(--a))}.x{text-decoration:underline;text-decoration-thickness:2px}
summary{cursor:pointer;color:var(--soft)}
table{border-collapse:collapse;font-size:.87rem;width:100%}
td,th{text-align:left;vertical-align:top;padding:.15rem .8rem .15rem 0;border-top:1px solid var(--line)}
td{overflow-wrap:anywhere}td:first-child,td.unit{white-space:nowrap}td.unit{color:var(--soft)}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page, by default RUN_DIR/report.html, and its pictures as RUN_DIR/report/*.png. Returns its path.

    Raises: ConfigError if the directory holds no run, or a damaged one.
    """
    run_dir = Path(run_dir)
    page = Path(output) if output is not None else run_dir / "report.html"
    summary = summarize(run_dir)
    run = read_run(run_dir)
    records = Records(read_steps(run_dir), read_evals(run_dir), run)
    sections = [_section("Summary", f"<pre>{escape(format_summary(summary))}</pre>")]
    for picture in PICTURES:
        body = _picture(picture, records, run_dir / "report")
        sections += [_section(picture.title, body)] if body else []
    samples = samples_html(run_dir) or '<p class="note">No token-level records.</p>'
    sections += [_section("Sampled completions", samples), _section("Configuration", _configuration(run))]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_page(run_dir.resolve().name, run, sections), encoding="utf-8")
    return page


def _page(name: str, run: Mapping[str, Any], sections: Sequence[str]) -> str:
    started = _date(run["started"]) if "started" in run else "at an unknown time"
    written = f"Written by rlvr {__version__} on {_date(time.time())}."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · rlvr report</title><style>{_STYLE}</style></head><body>"
        f'<header><h1>{escape(name)}</h1><p class="note">Run started {started}, commit '
        f"{escape(str(run.get('commit') or 'unknown'))}.</p></header>{''.join(sections)}"
        f"<footer>{written}</footer></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _picture(picture: Picture, records: Records, folder: Path) -> str:
    """The picture in both themes with the unit and meaning of its metrics, "" if it is left out; the light one also
    as a file.
    """
    shown = picture.metrics(records)
    missing = "" if picture.optional else ", ".join(name for name in picture.needs if name not in shown)
    absent = f'<p class="note">Not measured: {missing}.</p>' if missing else ""
    if not shown:
        (folder / f"{picture.name}.png").unlink(missing_ok=True)
        return absent
    light, dark = render(picture, records, LIGHT), render(picture, records, DARK)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{picture.name}.png").write_bytes(light)
    rows = "".join(
        f'<tr><td>{name}</td><td class="unit">{METRICS[name].unit}</td><td>{escape(_meaning(name))}</td></tr>'
        for name in shown
    )
    note = escape(picture.note(records))
    return (
        f'<picture><source srcset="{_inline(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{_inline(light)}" alt="{escape(picture.title)}"></picture><p class="note">{note}</p>'
        f"<table>{rows}</table>{absent}"
    )


def _meaning(name: str) -> str:
    entry = METRICS[name]
    return f"{entry.meaning}. Usual: {entry.normal}" if entry.normal else entry.meaning


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _configuration(run: Mapping[str, Any]) -> str:
    rows = [*_flatten(run.get("config", {})), *_flatten(run.get("versions", {}), "version of ")]
    rows += [(f"resumed from step {entry['step']}", _date(entry["time"])) for entry in run.get("resumed", [])]
    if not rows:
        return '<p class="note">Not recorded.</p>'
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<details><summary>{len(rows)} settings and versions</summary><table>{cells}</table></details>"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows `outer.inner`, value."""
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flatten(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(entry)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
