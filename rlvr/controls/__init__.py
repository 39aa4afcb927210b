"""Entropy controls by name. Adding one is a class in this folder and a line in `CONTROLS`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from rlvr.controls.base import Control, Outcome, Scope
from rlvr.controls.budget import TokenBudget
from rlvr.controls.covariance import ClipCov, KlCov
from rlvr.controls.discriminator import ClipB, ClipV
from rlvr.controls.entropy import AdaptiveEntropy, EntropyAdvantage, EntropyBonus, HighEntropyTokens
from rlvr.controls.mismatch import GeometricGate, IcePop, Mis, OffPolicyMask, Tis
from rlvr.controls.reference import ReferenceKl
from rlvr.controls.steer import Steer
from rlvr.errors import ConfigError, unknown
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens

CONTROLS: Mapping[str, Any] = {
    "adaptive_entropy": AdaptiveEntropy,
    "clip_b": ClipB,
    "clip_cov": ClipCov,
    "clip_v": ClipV,
    "entropy_advantage": EntropyAdvantage,
    "entropy_bonus": EntropyBonus,
    "geometric_gate": GeometricGate,
    "high_entropy": HighEntropyTokens,
    "icepop": IcePop,
    "kl_cov": KlCov,
    "mis": Mis,
    "off_policy_mask": OffPolicyMask,
    "reference_kl": ReferenceKl,
    "steer": Steer,
    "tis": Tis,
    "token_budget": TokenBudget,
}
"""Controls by the name that `controls` gives them."""

__all__ = [
    "CONTROLS",
    "ClipCov",
    "Control",
    "KlCov",
    "Outcome",
    "Scope",
    "apply",
    "build",
    "build_controls",
    "construct",
    "decide",
    "paper_surrogate",
]


def build(field: str, table: Mapping[str, Any], spec: str | Mapping[str, Any]) -> Any:
    """An instance from `name` or `{name: ..., hyper-parameter: ...}`. Raises ConfigError naming field and value."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{field}={spec!r}: give a name or {{name: ..., ...}}; known: {', '.join(sorted(table))}")
    if name not in table:
        raise unknown(field, name, table)
    return construct(f"{field} {name}", table[name], options)


def construct(said: str, cls: type, options: Mapping[str, Any]) -> Any:
    """An instance of a dataclass. Raises ConfigError, which begins with `said`, naming option and value."""
    defaults = {f.name: _empty(f.type) if f.default is MISSING else f.default for f in fields(cls)}
    for option, value in options.items():
        if option not in defaults:
            raise unknown(f"{said}: option", option, defaults)
        _check_kind(f"{said}: {option}={value!r}", value, defaults[option])
    absent = [f.name for f in fields(cls) if f.default is MISSING and f.name not in options]
    if absent:
        raise ConfigError(f"{said}: set {', '.join(absent)}")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{said}: {error}") from error


def _empty(annotation: Any) -> Any:
    """What stands for the kind of an option without a default: "" or 0.0."""
    return annotation()


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


def paper_surrogate(controls: Iterable[Control]) -> str | None:
    """The surrogate that the controls' papers use, where it is not the PPO clip. Raises ConfigError if they differ."""
    wanted = {control.name: control.surrogate for control in controls if control.surrogate is not None}
    if len(set(wanted.values())) > 1:
        raise ConfigError(f"controls {', '.join(wanted)} come with different surrogates: set `surrogate` yourself")
    return next(iter(wanted.values()), None)


@torch.no_grad()
def decide(controls: Iterable[Control], tokens: Tokens, clipped: Clipped, reduce: Reduce) -> dict[str, Outcome]:
    """What each control says of the same tokens, without gradient, by its name."""
    return {control.name: control(tokens, clipped, reduce) for control in controls}


def apply(controls: Iterable[Control], tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
    """All controls on the same tokens: coefficients combined, metrics side by side."""
    coefficients = Coefficients()
    metrics: dict[str, Mean] = {}
    for outcome in decide(controls, tokens, clipped, reduce).values():
        coefficients = coefficients.combine(outcome.coefficients)
        metrics.update(outcome.metrics)
    return Outcome(coefficients, metrics)
