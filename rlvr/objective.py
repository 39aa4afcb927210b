"""The whole policy objective: surrogate, coefficients and aggregation, composed in one place; and a critic's loss.

loss = aggregate( weight * surrogate(A + advantage) + drift |log r| - entropy H + reference KL ) / denominator
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlvr.surrogates import Surrogate, log_ratio
from rlvr.surrogates.base import at_least_float32
from rlvr.types import Coefficients, Tokens

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "dr_grpo", "token_budget"]
AGGREGATIONS: tuple[Aggregation, ...] = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "dr_grpo",
    "token_budget",
)


def policy_loss(
    tokens: Tokens,
    surrogate: Surrogate,
    coefficients: Coefficients,
    *,
    mode: Aggregation,
    denominator: Tensor | float | None = None,
    corrected_kl: bool = False,
) -> Tensor:
    """The scalar to minimize. Without tokens it is a differentiable zero.

    denominator: see `aggregate`.   corrected_kl: multiply the reference KL by the importance ratio (DeepSeek-V3.2).
    Raises: ValueError if a coefficient needs a field of `tokens` that is None.
    """
    c = coefficients
    if c.keep is not None:
        tokens, c = tokens.select(c.keep), c.select(c.keep)
    loss = token_losses(tokens, surrogate, c, corrected_kl=corrected_kl)
    return aggregate(loss, tokens, mode=mode, denominator=denominator)


def token_losses(
    tokens: Tokens, surrogate: Surrogate, coefficients: Coefficients, *, corrected_kl: bool = False
) -> Tensor:
    """The loss of each token [N]; `keep` is left to whoever aggregates. Raises: as `policy_loss`."""
    c = coefficients
    shifted = tokens if c.advantage is None else replace(tokens, advantages=tokens.advantages + c.advantage)
    ratio = surrogate.ratio(tokens)
    # Before the surrogate, as TRL does: the gradients that meet in the ratio are then summed in the same order.
    kl = None if c.reference is None else reference_kl(tokens) * (ratio if corrected_kl else 1.0)
    loss = surrogate.loss(ratio, shifted)
    if c.weight is not None:
        loss = loss * c.weight
    if c.drift is not None:
        loss = loss + torch.where(c.drift == 0, 0.0, c.drift * log_ratio(tokens).abs())
    if c.entropy is not None:
        loss = loss - c.entropy * _required(tokens.entropy, "entropy")
    if c.reference is not None and kl is not None:
        loss = loss + c.reference * kl
    return loss


def idle_sequences(advantages: Tensor, coefficients: Coefficients, sequence: Tensor, num_sequences: int) -> Tensor:
    """Which sequences [num_sequences] have no gradient at all, whatever their log-probs are.

    Under a surrogate that does not penalize, a sequence whose tokens have neither an advantage nor a coefficient of
    a penalty adds exactly nothing: a group of equal rewards, or one that an engine correction takes out.
    advantages, sequence: [N], of the tokens as in Tokens.
    """
    c = coefficients
    pushed = (advantages if c.advantage is None else advantages + c.advantage) != 0
    if c.weight is not None:
        pushed = pushed & (c.weight != 0)
    for penalty in (c.drift, c.entropy, c.reference):
        if penalty is not None:
            pushed = pushed | (penalty != 0)
    if c.keep is not None:
        pushed = pushed & c.keep
    return torch.ones(num_sequences, dtype=torch.bool, device=sequence.device).index_fill(0, sequence[pushed], False)


def reference_kl(tokens: Tokens) -> Tensor:
    """KL(pi || pi_ref) per token [N], the k3 estimator exp(d) - d - 1 with d = log pi_ref - log pi.

    Ref: Schulman 2020, "Approximating KL divergence"; GRPO's Eq. 4.
    """
    ref_logps = _required(tokens.ref_logps, "ref_logps")
    # d is written twice, as TRL does: its gradient is then summed in the same order, and results are equal exactly.
    return torch.exp(ref_logps - tokens.logps) - (ref_logps - tokens.logps) - 1


class ValueLoss(NamedTuple):
    """loss: of each token [N].   clipped: bool [N], tokens without gradient, as the clip holds their value back."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float | None) -> ValueLoss:
    """0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) of each token; the gradient goes to `values` alone.

    A value that is more than c away from the old one learns no further while it is nearer to its return than the
    clipped value is.
    values, old_values, returns: [N], of the critic now, of the critic at the start of the update, and its targets.
    cliprange: c > 0, in units of reward; None does not clip.
    Raises: ValueError if cliprange is not positive or shapes differ.
    Ref: ppo2 of OpenAI baselines; verl's compute_value_loss.
    """
    if cliprange is not None and not cliprange > 0:
        raise ValueError(f"cliprange={cliprange}: must be > 0, or None not to clip")
    if not values.shape == old_values.shape == returns.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (values, old_values, returns))
        raise ValueError(f"values, old_values and returns must all be [N], got {shapes}")
    values, old, returns = at_least_float32(values), at_least_float32(old_values.detach()), returns.detach()
    error = (values - returns).square()
    if cliprange is None:
        return ValueLoss(error / 2, torch.zeros_like(values, dtype=torch.bool))
    held = (values.clamp(old - cliprange, old + cliprange) - returns).square()
    clipped = held > error  # within the range they are equal, so that a larger one is a saturated one
    return ValueLoss(torch.where(clipped, held, error) / 2, clipped)


def aggregate(
    token_loss: Tensor, tokens: Tokens, *, mode: Aggregation, denominator: Tensor | float | None = None
) -> Tensor:
    """One scalar from the losses of the tokens [N]: a sum over what is here, divided by the whole batch's denominator.

    token_mean: sum / tokens.   seq_mean_token_mean: sum of each sequence's mean / sequences.   seq_mean_token_sum:
    sum / sequences.   dr_grpo: sum / (sequences * maximum length).   token_budget: sum / budget.
    denominator: tokens, non-empty sequences, sequences * maximum length, or the budget, of the *whole* batch, so that
    the losses of micro-batches and ranks add up; None takes the tokens at hand for the whole (first three modes).
    Fully masked sequences are no part of a sequence mean. Raises: ValueError if the mode is unknown, or has no
    denominator to fall back on.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(AGGREGATIONS)}")
    token_loss = at_least_float32(token_loss)  # bfloat16 counts to 256
    lengths = tokens.sequence_sums(torch.ones_like(token_loss))
    if denominator is None:
        if mode in ("dr_grpo", "token_budget"):
            raise ValueError(f"mode={mode!r} needs a denominator: it is a constant that the tokens do not know")
        denominator = (lengths.sum() if mode == "token_mean" else (lengths > 0).sum()).clamp(min=1)
    if mode == "seq_mean_token_mean":
        token_loss = tokens.sequence_sums(token_loss) / lengths.clamp(min=1)
    return token_loss.sum() / denominator


def _required(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the objective needs tokens.{name}, which was not computed")
    return value
