"""Which surrogate a run uses, where four fields of TRL, one of ours and the controls' papers may have an opinion."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import trl

from rlvr.controls import build, paper_surrogate
from rlvr.errors import ConfigError
from rlvr.surrogates import SURROGATES, Cispo, Gmpo, Gspo, PpoClip, Surrogate

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig

# Fields of TRL that describe the default surrogate; an explicit `surrogate` carries its own.
SURROGATE_FIELDS = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")


def choose_surrogate(args: "PolicyConfig") -> Surrogate:
    """The surrogate of a run: what `surrogate` says, else what a control's paper uses, else TRL's own fields.

    Raises: ConfigError where two of them speak, or where one of them would have no effect.
    """
    spec = parse("surrogate", args.surrogate) if args.surrogate is not None else paper_surrogate(args.control_list)
    if spec is None:
        surrogate = _of_trl(args)
    else:
        surrogate = build("surrogate", SURROGATES, spec)
        name = spec if isinstance(spec, str) else spec["name"]
        for said in SURROGATE_FIELDS:
            if getattr(args, said) != trl_default(said):
                raise ConfigError(
                    f"{said}={getattr(args, said)} has no effect beside surrogate={name}: put the bounds into "
                    "the surrogate, e.g. surrogate: {name: ppo_clip, low: 0.2, high: 0.28}"
                )
        if args.loss_type == "cispo" and name != "cispo":
            raise ConfigError(f"loss_type=cispo and surrogate={name} name two surrogates: use loss_type: dapo")
    if isinstance(surrogate, Gspo | Gmpo) and args.loss_type != "grpo":
        raise ConfigError(
            f"loss_type={args.loss_type} would weight a sequence's ratio by its length: use loss_type: grpo"
        )
    return surrogate


def _of_trl(args: "PolicyConfig") -> Surrogate:
    low, high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    sequence_level = args.importance_sampling_level == "sequence"
    if args.delta is not None and (sequence_level or args.loss_type == "cispo"):
        name = "loss_type=cispo" if args.loss_type == "cispo" else "importance_sampling_level=sequence"
        raise ConfigError(f"delta={args.delta} does nothing with {name}, which has no dual clip: unset it")
    if sequence_level and args.loss_type == "cispo":
        raise ConfigError("importance_sampling_level=sequence and loss_type=cispo name two surrogates: unset one")
    try:
        if args.loss_type == "cispo":
            if args.epsilon_high is None:
                raise ConfigError("epsilon_high=None: with loss_type=cispo it caps the ratio itself, e.g. 5")
            return Cispo(ratio_high=high)
        if sequence_level:
            return Gspo(low=low, high=high)
        if args.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level must be token or sequence")
        return PpoClip(low=low, high=high, dual_clip=args.delta)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"epsilon={low}, epsilon_high={high}, delta={args.delta}: {error}") from error


def parse(field_name: str, spec: Any) -> Any:
    """A mapping from its JSON text; names and mappings pass through."""
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        return dict(_json(field_name, spec))
    return spec


def parse_list(field_name: str, specs: Any) -> list[Any]:
    """A list of names and mappings; one alone, as YAML and JSON easily give it, is a list of one; `none` is empty."""
    alone = isinstance(specs, str | Mapping)
    parsed: list[Any] = []
    for spec in [specs] if alone else specs or []:
        if isinstance(spec, str) and spec.lstrip().startswith("["):
            parsed += parse_list(field_name, _json(field_name, spec))
        elif spec != "none":
            parsed.append(parse(field_name, spec))
    return parsed


def _json(field_name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{field_name}={text!r} is not valid JSON: {error}") from error


def trl_default(name: str) -> Any:
    found = next(f for f in fields(trl.GRPOConfig) if f.name == name)
    return found.default if found.default is not MISSING else None
