"""The specification in plain PyTorch: short enough to trust, and what every faster implementation is tested against.

It holds the logits, [N, V], several times; the other backends return the same numbers without doing that.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from rlvr_kernels.stats import TokenStats, check_want, inverse_temperature


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    want: Collection[str] = ("logps", "entropy"),
) -> TokenStats:
    """Statistics of softmax(softcap(logit_scale (hidden W^T + bias)) / temperature), 0 where there is no label.

    Logits are formed in float32 at least, under autocast too. Arguments: as for `rlvr_kernels.token_stats`.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    labeled = targets != ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
    found = logit_stats(logits, targets.where(labeled, 0), temperature=temperature, want=want)
    return TokenStats(*(None if x is None else x.where(labeled, torch.zeros_like(x)) for x in found))


def logit_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    want: Collection[str] = ("logps", "entropy"),
) -> TokenStats:
    """Statistics of softmax(logits / temperature), for the fields named in want.

    A logit of -inf (a token filtered out, a padded vocabulary) has probability 0: it adds 0 to every sum and gets
    gradient 0, also when it is the target, whose log-prob is then -inf. Each row needs one finite logit.

    logits: [N, V].   targets: [N], integers in [0, V).   temperature: a number or [N].
    Raises: ValueError if the shapes do not fit, a temperature is not > 0 or want names an unknown field.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"want logits [N, V] and targets [N], got {tuple(logits.shape)} and {tuple(targets.shape)}")
    want = check_want(want)

    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z * inverse_temperature(temperature, z.detach()[:, 0]).unsqueeze(-1)
    z = z.masked_fill(z == -torch.inf, -torch.inf)  # same values, but no gradient reaches an impossible token
    lse = z.logsumexp(-1, keepdim=True)
    logp = z - lse
    p = logp.exp()
    finite = logp.masked_fill(p == 0, 0.0)  # 0 log 0 = 0, where 0 * -inf would be NaN
    plogp = p * finite
    target = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    stats = {
        "logps": lambda: logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": lambda: -plogp.sum(-1),
        "lse": lambda: lse.squeeze(-1),
        "sum_p2": lambda: p.square().sum(-1),
        "sum_p_logp2": lambda: (plogp * finite).sum(-1),
        "sum_p2_logp": lambda: (p * plogp).sum(-1),
        "sum_p2_logp2": lambda: plogp.square().sum(-1),
        "p_max": lambda: p.detach().amax(-1),
        "is_greedy": lambda: target.detach() == z.detach().amax(-1),
    }
    return TokenStats(**{name: stats[name]() for name in want})
