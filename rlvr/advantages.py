"""From rewards to advantages: pure functions, one number in and one out per response (or per token, for whitening)."""

from typing import Literal

import torch
from torch import Tensor

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


def whiten(values: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8, center: bool = True) -> Tensor:
    """Scale to unit (unbiased) variance, and to zero mean unless `center` is off, over the valid entries.

    values, mask: any equal shape. Masked entries come back as 0. Fewer than two valid entries cannot be whitened:
    they are only centered.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    picked = values[valid]
    mean = picked.mean() if picked.numel() else values.new_zeros(())
    var = picked.var(correction=1) if picked.numel() > 1 else values.new_ones(())
    white = (values - mean) * torch.rsqrt(var + eps)
    return torch.where(valid, white if center else white + mean, 0.0)


def _by_group(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index of each response's group [R], scored responses per group, sum of their rewards)."""
    if rewards.shape != group.shape or rewards.dim() != 1:
        raise ValueError(f"rewards and group must both be [R], got {tuple(rewards.shape)} and {tuple(group.shape)}")
    names, index = group.unique(return_inverse=True)
    zeros = rewards.new_zeros(names.numel())
    count = zeros.index_add(0, index, (~rewards.isnan()).to(rewards.dtype))
    total = zeros.index_add(0, index, rewards.nan_to_num(nan=0.0))
    return index, count, total
