"""Errors a user can act on: one line that names what is wrong, its value and the fix."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input, found before any model is loaded."""


class RunError(RuntimeError):
    """A run had to stop; what it had saved is whole. A recipe prints the line and exits with status 1."""


def unknown(field: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: says the nearest names, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:20]
    return ConfigError(f"{field}={name!r} is not known; did you mean {', '.join(near)}?")
