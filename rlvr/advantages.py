"""From rewards to advantages: pure functions of responses (group_relative, leave_one_out) or of their tokens."""

from typing import Literal

import torch
from torch import Tensor

from rlvr.types import LocalReduce, Reduce

Scale = Literal["group", "batch", "none"]


def group_relative(
    rewards: Tensor, group: Tensor, *, scale: Scale = "group", eps: float = 1e-6, ddof: int = 1
) -> Tensor:
    """(R - mean of its group) / (std + eps), the GRPO advantage; `scale="none"` is Dr.GRPO's.

    rewards [R], NaN where a response could not be scored: it gets advantage 0 and enters no statistic.   group [R],
    any integers; responses of one prompt share a number.   scale: std of the group, of the whole batch, or none.
    ddof: 1 is the unbiased std of verl and torch. A group of one has mean 0 and std 1.
    Returns [R]. Raises ValueError on an unknown scale or mismatched shapes.
    Ref: Shao et al. 2024, arXiv 2402.03300, Eq. 2; Dr.GRPO: Liu et al. 2025, arXiv 2503.20783.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: must be 'group', 'batch' or 'none'")
    # float64: in float32 the rounding of a group's mean, over a std that is rounding too, would be an advantage.
    dtype, rewards = rewards.dtype, rewards.double()
    index, count, total = _by_group(rewards, group)
    scored = ~rewards.isnan()
    size = torch.bincount(index, minlength=count.numel())
    mean = torch.where(size > 1, total / count.clamp(min=1), 0.0)
    centered = torch.where(scored, rewards - mean[index], 0.0)
    if scale == "none":
        return centered.to(dtype)
    if scale == "batch":
        spread = rewards[scored].std(correction=ddof) if int(scored.sum()) > ddof else rewards.new_zeros(())
        return (centered / (spread + eps)).to(dtype)
    squares = torch.zeros_like(total).index_add_(0, index, centered**2)
    std = torch.where(size > 1, (squares / (count - ddof).clamp(min=1)).sqrt(), 1.0)
    return (centered / (std[index] + eps)).to(dtype)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """R minus the mean of the *other* responses of its group (RLOO); a group of one keeps its reward.

    rewards [R] (NaN: advantage 0, enters no mean), group [R]. Returns [R].
    Ref: Ahmadian et al. 2024, arXiv 2402.14740, Eq. 9.
    """
    index, count, total = _by_group(rewards, group)
    others = count[index] - 1
    alone = (others <= 0) & (torch.bincount(index)[index] > 1)  # the only scored response of its group: no baseline
    advantage = rewards - (total[index] - rewards) / others.clamp(min=1)
    return torch.where(rewards.isnan() | alone, 0.0, advantage)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """A critic's advantages A_t = sum_k (gamma lam)^k delta_{t+k}, and returns A_t + V_t, both (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next valid token and V = 0 after the last. What stands at
    masked places, tool output inside or padding at an end, is never read; the results are 0 there.

    rewards, values, mask: (B, T), the rewards of tokens and the critic's values before them.   gamma: in [0, 1].
    lam: in [0, 1], a number or one per response (B,).
    Returns the wider type of rewards and values, at least float32, rounded once: all is computed in float64.
    Raises: ValueError if shapes differ, gamma or lam lies outside [0, 1], or a valid reward or value is not finite.
    Ref: Schulman et al. 2016, arXiv 1506.02438, Eq. 11-16.
    """
    if mask.dim() != 2 or not rewards.shape == values.shape == mask.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (rewards, values, mask))
        raise ValueError(f"rewards, values and mask must all be (B, T), got {shapes}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: must lie in [0, 1]")
    valid = mask.bool()
    lam = _per_row(lam, valid)
    reward, value = _finite("rewards", rewards, valid), _finite("values", values, valid)
    last, row = _last(valid)[valid], valid.nonzero()[:, 0]
    delta = reward + gamma * torch.where(last, 0.0, value.roll(-1)) - value
    longest = max(valid.sum(1).tolist(), default=0)
    advantage = _discounted_sums(delta, torch.where(last, 0.0, gamma * lam[row]), longest)
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    return _placed(advantage.to(dtype), valid), _placed((advantage + value).to(dtype), valid)


def at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of each response (B,) as the reward of its last valid token: (B, T), zero elsewhere.

    A response without a valid token loses its score: its row is zero. Raises: ValueError if shapes do not fit.
    """
    if mask.dim() != 2 or scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be (B,) and mask (B, T), got {tuple(scores.shape)} and {tuple(mask.shape)}")
    return torch.where(_last(mask.bool()), scores.unsqueeze(1), 0.0)


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """lam = 1 - 1 / (alpha l) for each response of l valid tokens, at least 0: `gae` then looks alpha l tokens ahead.

    mask: (B, T).   alpha: > 0, as a share of the length; VAPO's is 0.05. Responses up to 1 / alpha tokens get 0.
    Returns (B,) float64. Raises: ValueError unless alpha > 0.
    Ref: VAPO, Yue et al. 2025, arXiv 2504.05118, "Length-Adaptive GAE".
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: must be > 0")
    return (1 - 1 / (alpha * mask.bool().sum(1).double())).clamp(min=0)


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    center: bool = True,
    reduce: Reduce | None = None,
) -> Tensor:
    """Scale to unit (unbiased) variance, and to zero mean unless `center` is off, over the valid entries of all ranks.

    values, mask: any equal shape. Masked entries come back as 0. Fewer than two valid entries cannot be whitened:
    they are only centered.
    """
    reduce = reduce or LocalReduce()
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    # float64: equal values of float32 then have their exact mean, and no rounding to be divided by sqrt(eps).
    picked = values[valid].double()
    number = torch.tensor(float(picked.numel()), dtype=torch.float64, device=picked.device)
    count, total = reduce.sum(torch.stack([number, picked.sum()])).unbind()
    mean = total / count.clamp(min=1)
    squares = reduce.sum((picked - mean).square().sum())
    var = torch.where(count > 1, squares / (count - 1).clamp(min=1), 1.0)
    white = (picked - mean) * torch.rsqrt(var + eps)
    return _placed((white if center else white + mean).to(values.dtype), valid)


def _discounted_sums(x: Tensor, decay: Tensor, longest: int) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} [N], where decay is 0 at least once in `longest` tokens.

    By doubling: after each pass y_t has twice as many terms, and decay_t is the factor of the term that follows them.
    """
    y, decay, reach = x.clone(), decay.clone(), 1
    while reach < longest:
        y[:-reach] += decay[:-reach] * y[reach:]
        decay[:-reach] = decay[:-reach] * decay[reach:]
        reach *= 2
    return y


def _per_row(lam: float | Tensor, valid: Tensor) -> Tensor:
    """lam of each row (B,), float64."""
    lam = torch.as_tensor(lam, dtype=torch.float64, device=valid.device)
    if lam.shape not in ((), valid.shape[:1]):
        raise ValueError(f"lam has shape {tuple(lam.shape)}: must be a number or ({valid.size(0)},), one per response")
    outside = ~((lam >= 0) & (lam <= 1))
    if bool(outside.any()):
        raise ValueError(f"lam={float(lam[outside][0])}: must lie in [0, 1]")
    return lam.expand(valid.size(0))


def _finite(name: str, x: Tensor, valid: Tensor) -> Tensor:
    """The valid entries of x (B, T) as [N], float64."""
    picked = x[valid].double()
    bad = ~picked.isfinite()
    if bool(bad.any()):
        row, column = valid.nonzero()[bad][0].tolist()
        raise ValueError(f"{name}[{row}, {column}]={float(x[row, column])}: must be finite, or its token masked")
    return picked


def _last(valid: Tensor) -> Tensor:
    """Where each row's last valid token is: bool, the shape of valid."""
    return valid & (valid.cumsum(1) == valid.sum(1, keepdim=True))


def _placed(picked: Tensor, valid: Tensor) -> Tensor:
    """picked [N] at the valid places, 0 elsewhere."""
    return picked.new_zeros(valid.shape).masked_scatter(valid, picked)


def _by_group(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index of each response's group [R], scored responses per group, sum of their rewards)."""
    if rewards.shape != group.shape or rewards.dim() != 1:
        raise ValueError(f"rewards and group must both be [R], got {tuple(rewards.shape)} and {tuple(group.shape)}")
    names, index = group.unique(return_inverse=True)
    zeros = rewards.new_zeros(names.numel())
    count = zeros.index_add(0, index, (~rewards.isnan()).to(rewards.dtype))
    total = zeros.index_add(0, index, rewards.nan_to_num(nan=0.0))
    return index, count, total
