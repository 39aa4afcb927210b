"""What controls, thermostat and TRL's fields demand of each other, checked before any model is loaded."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from rlvr.alarm import EntropyAlarm
from rlvr.controls import construct
from rlvr.controls.budget import TokenBudget
from rlvr.controls.mismatch import EngineCorrection
from rlvr.errors import ConfigError
from rlvr.thermostat import Thermostat
from rlvr.trainers.steering import find_lever
from rlvr.trainers.surrogate_choice import parse, trl_default

SPANNING = ("dapo", "cispo", "grpo")  # loss types whose denominator is counted over the whole rollout

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig


def choose_thermostat(args: "PolicyConfig") -> Thermostat | None:
    """The thermostat of a run, able to start at its lever's present value. Raises: ConfigError."""
    spec = parse("thermostat", args.thermostat)
    if spec is None or spec == "none":
        return None
    if not isinstance(spec, Mapping):
        raise ConfigError(f"thermostat={spec!r}: write a mapping with lever, low, high, lowest and highest")
    thermostat: Thermostat = construct("thermostat", Thermostat, spec)
    lever = find_lever(thermostat, args.control_list, args.surrogate_fn)
    try:
        thermostat.start(lever.value, lever.direction)
        for end in (thermostat.lowest, thermostat.highest):
            replace(lever.moved, **{lever.field: end})
    except ValueError as error:
        raise ConfigError(f"thermostat lever={thermostat.lever}: {error}") from error
    return thermostat


def choose_alarm(args: "PolicyConfig") -> EntropyAlarm:
    """The alarm of a run. Raises: ConfigError."""
    spec = parse("entropy_alarm", args.entropy_alarm)
    if not isinstance(spec, Mapping | None):
        raise ConfigError(f"entropy_alarm={spec!r}: write a mapping of low, high, patience and action")
    alarm: EntropyAlarm = construct("entropy_alarm", EntropyAlarm, spec or {})
    if alarm.action == "thermostat" and args.thermostat_config is None:
        raise ConfigError("entropy_alarm action=thermostat has no thermostat to set off: write thermostat: {...}")
    return alarm


def check_controls(args: "PolicyConfig") -> None:
    """Settle what controls and TRL's fields both have a say in: aggregation, reference KL, engine correction.

    Sets `beta` and `vllm_importance_sampling_correction` for the controls that take their place.
    Raises: ConfigError where two would say the same thing, or one would do nothing.
    """
    controls = {control.name: control for control in args.control_list}
    if "adaptive_entropy" in controls and args.thermostat_config is not None:
        raise ConfigError("controls adaptive_entropy and thermostat both steer entropy: use one of them")
    if {"adaptive_entropy", "entropy_bonus"} <= controls.keys():
        raise ConfigError("controls adaptive_entropy and entropy_bonus would add two bonuses: keep one")
    if "token_budget" in controls and args.loss_type != "dapo":
        raise ConfigError(
            f"loss_type={args.loss_type} and controls token_budget both choose the denominator: use loss_type: dapo"
        )
    for name, control in controls.items():
        if name in ("clip_b", "clip_v") and control.scope == "micro_batch" and args.loss_type in SPANNING:
            raise ConfigError(
                f"controls {name} scope=micro_batch takes tokens out after loss_type={args.loss_type} has counted "
                "them over the rollout: use scope: rollout, or loss_type: bnpo, which counts in the micro-batch"
            )
    if "reference_kl" in controls:
        if args.beta:
            raise ConfigError(f"beta={args.beta} and controls reference_kl say the same thing twice: set one")
        args.beta = controls["reference_kl"].coef  # type: ignore[attr-defined]  # TRL then computes ref_logps
    for name, control in controls.items():
        if "rollout_logps" in control.needs and not args.use_vllm:
            raise ConfigError(f"controls {name} reads the log-probs of a separate engine: set use_vllm: true")
    corrections = [f"controls {name}" for name, control in controls.items() if isinstance(control, EngineCorrection)]
    if getattr(args.surrogate_fn, "anchor", "old") == "rollout":
        corrections.append("surrogate anchor=rollout")
    if len(corrections) > 1:
        raise ConfigError(
            f"{' and '.join(corrections)} each weigh by the engine's ratio, which would multiply: keep one"
        )
    if corrections:
        _replace_engine_correction(args, corrections[0])


def _replace_engine_correction(args: "PolicyConfig", name: str) -> None:
    if not args.use_vllm:
        raise ConfigError(f"{name} reads the log-probs of a separate engine: set use_vllm: true")
    for said in ("mode", "clip_max", "clip_min", "cap"):
        field = f"vllm_importance_sampling_{said}"
        if getattr(args, field) != trl_default(field):
            raise ConfigError(f"{field}={getattr(args, field)} and {name} would correct twice: unset it")
    args.vllm_importance_sampling_correction = False


def check_updates(args: "PolicyConfig") -> None:
    """After TRL has resolved the batch sizes: refuse controls that would do nothing, or half of it."""
    lever = args.thermostat_config.lever if args.thermostat_config is not None else ""
    if lever.startswith("surrogate.") and args.updates_per_rollout <= 1:
        raise ConfigError(
            f"thermostat lever={lever} does nothing with {args.updates_per_rollout:g} update(s) per rollout, as the "
            f"ratio is 1: set num_iterations >= 2 or steps_per_generation >= {2 * args.gradient_accumulation_steps}"
        )
    for control in args.control_list:
        if control.idle and not lever.startswith(f"{control.name}."):
            raise ConfigError(
                f"controls {control.name} does nothing with {_settings(control)}: change it or remove it"
            )
        if control.off_policy_only and args.updates_per_rollout <= 1:
            raise ConfigError(
                f"controls {control.name} does nothing with {args.updates_per_rollout:g} update(s) per rollout, since "
                "old and current policy are equal: set num_iterations >= 2 or steps_per_generation >= "
                f"{2 * args.gradient_accumulation_steps}"
            )
        if isinstance(control, TokenBudget):
            _check_budget(args, control)


def _check_budget(args: "PolicyConfig", budget: TokenBudget) -> None:
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ConfigError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} must divide steps_per_generation="
            f"{args.steps_per_generation}: controls token_budget needs whole optimizer steps in a rollout"
        )
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    most = completions * args.max_completion_length
    if budget.tokens > most:
        raise ConfigError(
            f"controls token_budget tokens={budget.tokens}: a step has at most {most} ({completions} completions of "
            f"max_completion_length={args.max_completion_length}), so nothing would ever be cut: lower it"
        )


def _settings(control: Any) -> str:
    return ", ".join(f"{f.name}={getattr(control, f.name)}" for f in fields(control))
