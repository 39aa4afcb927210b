"""Statistics of completions by one policy: what is passed through the model, and what of it through the head."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlvr.trainers.head import Asked, Measured
from rlvr.trainers.shared_prompts import pack

Statistics = dict[str, Tensor]
VALUE = "value"  # a statistic where a critic shares the policy's backbone


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
    watch: Callable[[Tensor], None] | None = None,
) -> tuple[Statistics, Tensor | None]:
    """Fields of `rlvr_kernels.TokenStats`, and VALUE, by name, each [B, T], 0 where `trained` is false; and the
    routers' loss.

    Only trained tokens are projected, and what stands behind the last one of the rows at hand is not computed.

    model: with `add_token_stats`, wrapped or not.   input_ids, attention_mask: [B, prompt + T], prompts padded on the
    left.   trained: [B, T] bool.   batch_size: rows at a time, all by default.   watch: is told which places of a
    forward are no padding before each.
    """
    parts: list[Statistics] = []
    router_losses: list[Tensor] = []
    routed = {"output_router_logits": True} if router_loss else {}
    wanted = tuple(name for name in want if name != VALUE)
    for passed in passes(input_ids, attention_mask, trained, batch_size, share_prompts):
        if watch is not None:
            watch(passed.valid)
        asked = Asked(passed.rows, passed.columns, passed.targets, wanted)
        measured: Measured = model(**passed.inputs, token_stats=asked, **routed)
        found = {name: getattr(measured.stats, name) for name in wanted}
        if VALUE in want:
            assert measured.value is not None
            found[VALUE] = measured.value
        parts.append({name: passed.padded(x) for name, x in found.items()})
        router_losses += [] if measured.router_loss is None else [measured.router_loss]
    statistics = {name: torch.cat([part[name] for part in parts]) for name in want}
    return statistics, torch.stack(router_losses).mean() if router_losses else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Some rows for one forward. inputs: of the model.   valid: [b, L] bool, False for padding.   rows, columns: [N]
    where its outputs predict the trained tokens; columns are negative, from the end.   targets: [N] these tokens.
    trained: [b, needed] bool.   width: T.
    """

    inputs: dict[str, Tensor]
    valid: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    trained: Tensor
    width: int

    def padded(self, values: Tensor) -> Tensor:
        """Values [N] of the trained tokens as [b, T]; stays connected to the model without any."""
        x = values.new_zeros(self.trained.shape).masked_scatter(self.trained, values)
        return pad(x, (0, self.width - self.trained.size(1)))


def passes(
    input_ids: Tensor, attention_mask: Tensor, trained: Tensor, batch_size: int | None, share_prompts: bool
) -> Iterator[Pass]:
    """The forwards over a batch, without what stands behind the last trained token of their rows."""
    size = batch_size or len(input_ids)
    for ids, mask, mine in zip(input_ids.split(size), attention_mask.split(size), trained.split(size), strict=True):
        needed = _last(mine) + 1
        length = ids.size(1) - mine.size(1) + needed
        ids, mask, kept = ids[:, :length], mask[:, :length], mine[:, :needed]
        rows, places = kept.nonzero(as_tuple=True)
        columns = places - needed - 1  # a token is predicted one place before it
        inputs, valid = {"input_ids": ids, "attention_mask": mask}, mask.bool()
        if share_prompts:
            packed = pack(ids, mask, needed)
            inputs = {name: getattr(packed, name) for name in ("input_ids", "position_ids", "attention_mask")}
            valid = packed.valid
            place, width = packed.place[kept], packed.input_ids.size(1)
            rows, columns = place // width, place % width - width
        targets = ids[:, -needed:][kept]
        yield Pass(
            inputs=inputs,
            valid=valid,
            rows=rows,
            columns=columns,
            targets=targets,
            trained=kept,
            width=mine.size(1),
        )


def _last(trained: Tensor) -> int:
    """The last column with a trained token in any row, 0 if there is none."""
    columns = trained.any(0).nonzero()
    return int(columns[-1]) if len(columns) else 0


def mean_discriminator(statistics: Mapping[str, Tensor]) -> Tensor:
    """E_S = sum_v p_v^2 (H + log p_v) from its moments (arXiv 2602.03392)."""
    return statistics["sum_p2_logp"] + statistics["entropy"] * statistics["sum_p2"]
