"""The specification in plain PyTorch: short enough to trust, and what every faster implementation is tested against.

It holds the logits, [N, V], several times; a fused kernel has to return the same numbers without doing that.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """Statistics of p = softmax(logits / temperature) at each token, all [N]; None where not wanted.

    float32, or float64 for float64 inputs. All are differentiable.
    """

    logps: Tensor | None = None  # log p(target), <= 0
    entropy: Tensor | None = None  # H = -sum_v p log p in nats, >= 0
    sum_p2: Tensor | None = None  # sum_v p^2
    sum_p2_logp: Tensor | None = None  # sum_v p^2 log p; E_S = sum_v p^2 (log p + H) = sum_p2_logp + entropy * sum_p2
    sum_p2_logp2: Tensor | None = None  # sum_v (p log p)^2; sum_v S_v^2 = it + 2 H sum_p2_logp + H^2 sum_p2


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    want: Collection[str] = ("logps", "entropy"),
) -> TokenStats:
    """Statistics of the logits hidden @ weight.T, which are formed in float32 at least, under autocast too.

    hidden: [N, D].   weight: [V, D].   targets: [N], integers in [0, V).   temperature, want: as for logit_stats.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
    return logit_stats(logits, targets, temperature=temperature, want=want)


def logit_stats(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, want: Collection[str] = ("logps", "entropy")
) -> TokenStats:
    """Statistics of softmax(logits / temperature), for the fields named in want.

    A logit of -inf (a token filtered out, a padded vocabulary) has probability 0: it adds 0 to every sum and gets
    gradient 0, also when it is the target, whose log-prob is then -inf. Each row needs one finite logit.

    logits: [N, V].   targets: [N], integers in [0, V).
    Raises: ValueError if the shapes do not fit, temperature <= 0 or want names an unknown field.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"want logits [N, V] and targets [N], got {tuple(logits.shape)} and {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if unknown := set(want) - set(TokenStats._fields):
        raise ValueError(f"want={sorted(unknown)} is not known; choose from {', '.join(TokenStats._fields)}")

    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    z = z.masked_fill(z == -torch.inf, -torch.inf)  # same values, but no gradient reaches an impossible token
    logp = z - z.logsumexp(-1, keepdim=True)
    p = logp.exp()
    plogp = p * logp.masked_fill(p == 0, 0.0)  # 0 log 0 = 0, where 0 * -inf would be NaN

    stats = {
        "logps": lambda: logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": lambda: -plogp.sum(-1),
        "sum_p2": lambda: p.square().sum(-1),
        "sum_p2_logp": lambda: (p * plogp).sum(-1),
        "sum_p2_logp2": lambda: plogp.square().sum(-1),
    }
    return TokenStats(**{name: stats[name]() for name in want})
