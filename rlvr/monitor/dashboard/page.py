"""The page: its styles and scripts in their order, as links for a server or all in one file for a report."""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from rlvr.monitor.payloads.numbers import to_json

VIEWS = ("overview", "law", "dynamics", "controls", "tokens", "positions", "prompts", "engine", "router", "run")
STYLES = ("style.css",)
SCRIPTS = (
    "dom.js",
    "source.js",  # asks the server while the next one, which is large, is parsed
    "vendor/echarts.min.js",
    "charts.js",
    "lines.js",
    "bars.js",
    *(f"views/{name}.js" for name in VIEWS),
    "app.js",
)
KINDS = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}

# What the page may do: run its own scripts, and no others; ask its own server, and no other.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_ESCAPED = {
    ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
}


def policy(parts: Mapping[str, str] = POLICY) -> str:
    """A Content-Security-Policy."""
    return "; ".join(f"{name} {value}" for name, value in parts.items())


@cache
def static_text(name: str) -> str:
    """A file of the page. Raises: FileNotFoundError if this installation lacks it."""
    return resources.files("rlvr.monitor.dashboard").joinpath("static", *name.split("/")).read_text(encoding="utf-8")


def served_page() -> str:
    """The page that asks the server it came from, with links to its files below static/."""
    return _fill(
        styles="".join(f'<link rel="stylesheet" href="static/{name}">\n' for name in STYLES),
        scripts="".join(f'<script src="static/{name}"></script>\n' for name in SCRIPTS),
        data="",
    )


def report_page(data: Mapping[str, Any]) -> str:
    """The page as one file that needs nothing else.   data: what a server would answer, by what it would be asked."""
    scripts = [_script(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    may = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return _fill(
        styles=f'<meta http-equiv="Content-Security-Policy" content="{policy(may)}">\n'
        + "".join(f"<style>{static_text(name)}</style>\n" for name in STYLES),
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
        data=f'<script type="application/json" id="embedded">{embedded(data)}</script>',
    )


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element it stands in, nor a line of a script, nor reorder the text around it."""
    return to_json(data).decode("utf-8").translate(_ESCAPED)


def _script(name: str) -> str:
    """A script that can stand in a page as it is, and has the hash there that it has here."""
    text = static_text(name).replace("\r\n", "\n").replace("\r", "\n")
    lowered = text.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise ValueError(f"{name} would end the element of a page that holds it")
    return text


def _fill(**parts: str) -> str:
    page = static_text("index.html")
    for name, text in parts.items():
        mark = f"<!--{name}-->"
        before, found, after = page.partition(mark)
        if not found:
            raise ValueError(f"index.html has no {mark}")
        page = before + text + after
    return page
