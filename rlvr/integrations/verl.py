"""rlvr's surrogates and controls as a policy loss of verl, without a fork; docs/verl.md says what works.

verl's configuration carries them to every worker:

    actor_rollout_ref.actor.policy_loss:
      _target_: rlvr.integrations.verl.policy_loss
      loss_mode: rlvr
      surrogate: {name: ppo_clip, high: 0.28}
      controls: [steer]

verl shows a loss one micro-batch of one rank at a time, so each control decides on that much. Written for verl 0.9.1.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlvr.controls import CONTROLS, Control, apply, build, build_controls, paper_surrogate
from rlvr.controls.entropy import EntropyBonus
from rlvr.errors import ConfigError, unknown
from rlvr.objective import token_losses
from rlvr.surrogates import SURROGATES, Gmpo, Gspo, Surrogate, log_ratio
from rlvr.types import LocalReduce, Mean, Tokens, token_keys

LOSS_MODE = "rlvr"
Spec = str | Mapping[str, Any]

# What verl's loss cannot know of a token, and what to do instead.
NOT_IN_VERL: Mapping[str, str] = {
    "mean_discriminator": "verl does not compute it; steer without form: full and clip_b do without",
    "ref_logps": "verl has its own penalty, actor.use_kl_loss and actor.kl_loss_coef",
    "rollout_logps": "verl has its own correction, algorithm.rollout_correction",
}
# Fields of verl's actor that its own losses read and this one does not.
UNREAD = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "tau_pos", "tau_neg")

_entropy: ContextVar[Tensor | None] = ContextVar("rlvr_entropy", default=None)


class Objective(NamedTuple):
    """What the loss is made of; it travels as `config.policy_loss.rlvr`."""

    surrogate: Surrogate
    controls: tuple[Control, ...]


def policy_loss(
    *, loss_mode: str, surrogate: Spec | None = None, controls: Spec | Sequence[Spec] = (), **options: Any
) -> Any:
    """verl's PolicyLossConfig with the objective attached; the loss is registered with verl, in this process.

    surrogate: a name or {name: ..., option: ...}; without one, that of the controls' paper, else ppo_clip.
    controls: a list of the same.   options: the rest of verl's section, which must be left alone.
    Raises: ConfigError if verl cannot give what the objective asks for, or a setting would do nothing.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.workers.config import PolicyLossConfig

    if loss_mode != LOSS_MODE:
        raise ConfigError(f"policy_loss.loss_mode={loss_mode!r} and its _target_ name two losses: write {LOSS_MODE}")
    defaults = {f.name: f.default for f in fields(PolicyLossConfig)}
    for name, value in options.items():
        if name not in defaults:
            raise unknown("policy_loss option", name, {"surrogate", "controls", *defaults})
        if defaults[name] is not MISSING and value != defaults[name]:
            raise ConfigError(f"policy_loss.{name}={value} does nothing in loss_mode {LOSS_MODE}: leave it out")
    config = PolicyLossConfig(loss_mode=loss_mode, **options)
    config.rlvr = objective(surrogate, [controls] if isinstance(controls, str | Mapping) else controls)
    register_policy_loss(LOSS_MODE)(rlvr_loss)
    if any("entropy" in control.needs for control in config.rlvr.controls):
        pass_entropy()
    return config


def objective(surrogate: Spec | None, controls: Sequence[Spec]) -> Objective:
    """The objective that is named. Raises: ConfigError, also for a control that does not fit into verl's loss."""
    for spec in controls:
        if isinstance(spec, Mapping) and spec.get("scope", "micro_batch") != "micro_batch":
            raise ConfigError(
                f"controls {spec.get('name')}: scope={spec['scope']!r} needs more than verl's loss sees: leave it out"
            )
    chosen = tuple(in_micro_batch(control) for control in build_controls(controls))
    spec = paper_surrogate(chosen) or "ppo_clip" if surrogate is None else surrogate
    built = build("surrogate", SURROGATES, spec)
    if getattr(built, "anchor", "old") == "rollout":
        raise ConfigError(f"surrogate anchor='rollout' needs tokens.rollout_logps: {NOT_IN_VERL['rollout_logps']}")
    return Objective(built, chosen)


def in_micro_batch(control: Control) -> Control:
    """The control, deciding on one micro-batch. Raises: ConfigError if that, or what it reads, is not possible."""
    said = f"controls {control.name}"
    for name, instead in NOT_IN_VERL.items():
        if name in control.needs:
            raise ConfigError(f"{said} needs tokens.{name}: {instead}")
    if isinstance(control, EntropyBonus):
        raise ConfigError(f"{said}: verl has its own bonus, set actor.entropy_coeff={control.coef}")
    if type(control).observe is not Control.observe:
        raise ConfigError(
            f"{said} follows entropy from step to step, and verl's loss does not see steps: leave it out"
        )
    if any(f.name == "scope" for f in fields(CONTROLS[control.name])):
        return replace(control, scope="micro_batch")  # type: ignore[type-var]
    if control.scope != "micro_batch":
        raise ConfigError(
            f"{said} decides on a whole {control.scope}, and verl's loss sees a micro-batch: leave it out"
        )
    return control


def rlvr_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(scalar, metrics) of one micro-batch, in verl's own signature; tensors are (B, T), entropy comes beside it.

    The objective's token losses, times verl's rollout_is_weights, in verl's own aggregation. Tokens that a control
    takes out leave the mask, but not the denominator where verl counted it over the whole batch before.
    Raises: ConfigError if the actor's settings do not fit the objective.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    surrogate, controls = config.policy_loss.rlvr
    _check_actor(config, config.policy_loss.rlvr, loss_agg_mode)
    mask = response_mask.bool()
    tokens = keyed_tokens(mask, logps=log_prob, old_logps=old_log_prob, advantages=advantages, entropy=_entropy.get())
    with torch.no_grad():
        clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
        coefficients, metrics = apply(controls, tokens, clipped, LocalReduce())
        metrics = {**metrics, "pg_clipfrac": Mean.of(clipped.any), "ppo_kl": Mean.of(-log_ratio(tokens))}
    if coefficients.keep is not None:
        mask = mask.masked_scatter(mask, coefficients.keep)
        tokens, coefficients = tokens.select(coefficients.keep), coefficients.select(coefficients.keep)
    losses = token_losses(tokens, surrogate, coefficients)
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights[mask]
    padded = losses.new_zeros(mask.shape).masked_scatter(mask, losses)
    loss = agg_loss(loss_mat=padded, loss_mask=mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    # verl averages over micro-batches and cannot take NaN for an empty one.
    return loss, {f"actor/{name}": mean.value() if mean.count else 0.0 for name, mean in metrics.items()}


def keyed_tokens(mask: Tensor, **padded: Tensor | None) -> Tokens:
    """The valid tokens, with keys that depend on what is in the micro-batch: verl tells no step and no seed."""
    tokens, (rows, columns) = Tokens.from_padded(mask, **padded), mask.nonzero(as_tuple=True)
    contents = int(tokens.old_logps.double().view(torch.int64).sum())
    return replace(tokens, key=token_keys(0, contents, rows, columns))


def _check_actor(config: Any, objective: Objective, loss_agg_mode: str) -> None:
    """Refuse settings of verl's actor that contradict the objective."""
    from verl.workers.config import ActorConfig

    defaults = {f.name: f.default for f in fields(ActorConfig)}
    for name in UNREAD:
        if config.get(name) != defaults[name]:
            raise ConfigError(
                f"actor.{name}={config.get(name)} does nothing in loss_mode {LOSS_MODE}: put the bounds into the "
                "surrogate, e.g. surrogate: {name: ppo_clip, low: 0.2, high: 0.28, dual_clip: 3.0}"
            )
    if isinstance(objective.surrogate, Gspo | Gmpo) and loss_agg_mode != "seq-mean-token-mean":
        raise ConfigError(
            f"actor.loss_agg_mode={loss_agg_mode} would weight a sequence's ratio by its length: "
            "use seq-mean-token-mean"
        )
    readers = [control.name for control in objective.controls if "entropy" in control.needs]
    if readers and _entropy.get() is None:
        raise ConfigError(f"controls {readers[0]} needs each token's entropy: set actor.calculate_entropy=true")


def pass_entropy() -> None:
    """Let the loss see the entropies that verl's engine computes, which `ppo_loss` is given but does not hand on.

    Wraps `ppo_loss` in this process, wherever it has been imported; the wrapper calls verl's own. Once is enough.
    Raises: ConfigError if verl's functions are not those that this was written for.
    """
    from verl.workers.utils import losses

    original = losses.ppo_loss
    if original.__module__ == __name__:
        return
    for function, expected in (
        (original, ["config", "model_output", "data", "dp_group"]),
        (losses.no_padding_2_padding, ["tensor", "data"]),
    ):
        found = list(inspect.signature(function).parameters)
        if found != expected:
            raise ConfigError(
                f"verl's {function.__name__} takes {', '.join(found)} instead of {', '.join(expected)}: controls that "
                "need entropy work with verl 0.9.1"
            )
    wrapped = with_entropy(original, losses.no_padding_2_padding)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("ppo_loss") is original:
            module.ppo_loss = wrapped  # type: ignore[attr-defined]


def with_entropy(original: Callable[..., Any], padded: Callable[..., Tensor]) -> Callable[..., Any]:
    """verl's `ppo_loss` that leaves the entropy of its micro-batch, (B, T) and detached, where `rlvr_loss` looks."""

    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
        entropy = model_output.get("entropy")
        token = _entropy.set(None if entropy is None else padded(entropy, data).detach())
        try:
            return original(config, model_output, data, dp_group)
        finally:
            _entropy.reset(token)

    return ppo_loss
