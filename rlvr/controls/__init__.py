"""Entropy controls by name. Adding one is a class in this folder and a line in `CONTROLS`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from rlvr.controls.base import Control, Outcome, Scope
from rlvr.controls.covariance import ClipCov, KlCov
from rlvr.errors import ConfigError, unknown
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens

CONTROLS: Mapping[str, Any] = {"clip_cov": ClipCov, "kl_cov": KlCov}

__all__ = ["CONTROLS", "ClipCov", "Control", "KlCov", "Outcome", "Scope", "apply", "build", "build_controls"]


def build(field: str, table: Mapping[str, Any], spec: str | Mapping[str, Any]) -> Any:
    """An instance from `name` or `{name: ..., hyper-parameter: ...}`. Raises ConfigError naming field and value."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{field}={spec!r}: give a name or {{name: ..., ...}}; known: {', '.join(sorted(table))}")
    if name not in table:
        raise unknown(field, name, table)
    defaults = {f.name: f.default for f in fields(table[name])}
    for option, value in options.items():
        if option not in defaults:
            raise unknown(f"{field} {name}: option", option, defaults)
        _check_kind(f"{field} {name}: {option}={value!r}", value, defaults[option])
    try:
        return table[name](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field} {name}: {error}") from error


def _check_kind(said: str, value: Any, default: Any) -> None:
    """Refuse a value of another kind than the option's default: true or false, text, or a number."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{said}: write true or false")
    elif isinstance(default, str):
        if not isinstance(value, str):
            raise ConfigError(f"{said}: write a name, such as {default}")
    elif isinstance(value, str):
        raise ConfigError(f"{said} is text; write a number (YAML reads 1e-3 as text: 1.0e-3)")
    elif isinstance(value, bool) or not (isinstance(value, int | float) or value is default is None):
        raise ConfigError(f"{said}: write a number")


def build_controls(specs: Sequence[str | Mapping[str, Any]]) -> tuple[Control, ...]:
    """The controls of a run, in order. Raises ConfigError on an unknown name or option, a bad value or a
    repetition.
    """
    controls = tuple(build("controls", CONTROLS, spec) for spec in specs)
    names = [control.name for control in controls]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"controls names {name} {names.count(name)} times: list it once")
    return controls


@torch.no_grad()
def apply(controls: Iterable[Control], tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
    """All controls on the same tokens, without gradient: coefficients combined, metrics side by side."""
    coefficients = Coefficients()
    metrics: dict[str, Mean] = {}
    for control in controls:
        outcome = control(tokens, clipped, reduce)
        coefficients = coefficients.combine(outcome.coefficients)
        metrics.update(outcome.metrics)
    return Outcome(coefficients, metrics)
