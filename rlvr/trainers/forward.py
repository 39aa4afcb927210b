"""Statistics of completions by one policy: what is passed through the model, and what of it through the head."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlvr.trainers.head import Asked, Measured
from rlvr.trainers.shared_prompts import pack

Statistics = dict[str, Tensor]


def completion_statistics(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    trained: Tensor,
    want: Collection[str],
    *,
    batch_size: int | None = None,
    share_prompts: bool = False,
    router_loss: bool = False,
) -> tuple[Statistics, Tensor | None]:
    """Fields of `rlvr_kernels.TokenStats` by name, each [B, T], 0 where `trained` is false; and the routers' loss.

    Only trained tokens are projected, and what stands behind the last one of the rows at hand is not computed.

    model: with `add_token_stats`, wrapped or not.   input_ids, attention_mask: [B, prompt + T], prompts padded on the
    left.   trained: [B, T] bool.   batch_size: rows at a time, all by default.
    """
    parts: list[Statistics] = []
    router_losses: list[Tensor] = []
    size = batch_size or len(input_ids)
    for ids, mask, mine in zip(input_ids.split(size), attention_mask.split(size), trained.split(size), strict=True):
        needed = _last(mine) + 1
        length = ids.size(1) - mine.size(1) + needed
        ids, mask, kept = ids[:, :length], mask[:, :length], mine[:, :needed]
        inputs = (_shared if share_prompts else _plain)(ids, mask, kept, want)
        measured: Measured = model(**inputs, **({"output_router_logits": True} if router_loss else {}))
        parts.append({name: _padded(getattr(measured.stats, name), kept, mine.size(1)) for name in want})
        router_losses += [] if measured.router_loss is None else [measured.router_loss]
    statistics = {name: torch.cat([part[name] for part in parts]) for name in want}
    return statistics, torch.stack(router_losses).mean() if router_losses else None


def _plain(ids: Tensor, mask: Tensor, trained: Tensor, want: Collection[str]) -> dict[str, Any]:
    rows, places = trained.nonzero(as_tuple=True)
    columns = places - trained.size(1) - 1  # a token is predicted one place before it
    asked = Asked(rows, columns, ids[:, -trained.size(1) :][trained], tuple(want))
    return {"input_ids": ids, "attention_mask": mask, "token_stats": asked}


def _shared(ids: Tensor, mask: Tensor, trained: Tensor, want: Collection[str]) -> dict[str, Any]:
    packed = pack(ids, mask, trained.size(1))
    place, width = packed.place[trained], packed.input_ids.size(1)
    asked = Asked(place // width, place % width - width, ids[:, -trained.size(1) :][trained], tuple(want))
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": packed.attention_mask,
        "token_stats": asked,
    }


def _last(trained: Tensor) -> int:
    """The last column with a trained token in any row, 0 if there is none."""
    columns = trained.any(0).nonzero()
    return int(columns[-1]) if len(columns) else 0


def _padded(values: Tensor, trained: Tensor, width: int) -> Tensor:
    """Values [N] of the trained tokens as [B, width]; stays connected to the model without any."""
    x = values.new_zeros(trained.shape).masked_scatter(trained, values)
    return pad(x, (0, width - trained.size(1)))


def mean_discriminator(statistics: Mapping[str, Tensor]) -> Tensor:
    """E_S = sum_v p_v^2 (H + log p_v) from its moments (arXiv 2602.03392)."""
    return statistics["sum_p2_logp"] + statistics["entropy"] * statistics["sum_p2"]
