"""Compute each prompt once for all of its completions.

A group's completions repeat one prompt; with short answers that repetition is most of the training step. Here the
prompt and its completions become one row: every completion starts with its own copy of the prompt's last token,
attends to the prompt and to itself, and counts positions from where the prompt ended. The result is the same function
of the same weights, so log-probs agree up to rounding. Attention is quadratic in the row: this is for completions that
are short beside their prompt, and off by default.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """P prompts in rows of L tokens.

    input_ids, position_ids [P, L].
    attention_mask [P, 1, L, L] bool: True where the query (third) may look at the key (last).
    valid [P, L] bool: False for padding.
    place [B, T] int64: where token t of completion b is predicted, in the flattened [P * L]; 0 where there is none.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    valid: Tensor
    place: Tensor


def pack(input_ids: Tensor, attention_mask: Tensor, num_completion: int) -> Packed:
    """Pack rows of (left-padded prompt, right-padded completion) that share prompts.

    input_ids, attention_mask: [B, prompt + T].   num_completion: T. Rows with equal prompts need not be neighbors.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    prompts = ids[:, :-num_completion].masked_fill(~mask[:, :-num_completion], -1)
    unique, group = prompts.unique(dim=0, return_inverse=True)
    lengths = mask[:, -num_completion:].sum(dim=1).tolist()
    rows: list[list[tuple[int, int, int]]] = []  # token, position, segment
    place = torch.zeros(ids.size(0), num_completion, dtype=torch.int64)
    starts: list[tuple[int, int, int]] = []  # row of the batch, packed row, offset in it
    for number, prompt in enumerate(unique):
        *before, last = prompt[prompt >= 0].tolist()
        row = [(token, position, 0) for position, token in enumerate(before)]
        for segment, member in enumerate((group == number).nonzero()[:, 0].tolist(), start=1):
            completion = ids[member, -num_completion:][: lengths[member]].tolist()
            starts.append((member, number, len(row)))
            row += [(token, len(before) + i, segment) for i, token in enumerate([last, *completion][:-1])]
        rows.append(row)
    width = max(map(len, rows))
    for member, number, offset in starts:
        place[member, : lengths[member]] = number * width + offset + torch.arange(lengths[member])
    table = torch.tensor([row + [(0, 0, -1)] * (width - len(row)) for row in rows])
    segments = table[..., 2]
    visible = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    device = input_ids.device
    return Packed(
        input_ids=table[..., 0].to(device),
        position_ids=table[..., 1].to(device),
        attention_mask=(visible & causal)[:, None].to(device),
        valid=(segments >= 0).to(device),
        place=place.to(device),
    )


def require_full_attention(model: Any) -> None:
    """Refuse models for which a 4-D attention mask is not the whole truth.

    Raises: ConfigError for attention kernels that take no mask, for sliding windows and for recurrent layers.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation != "sdpa":
        raise ConfigError(
            f"share_prompts=True needs attention with a boolean mask, not attn_implementation={implementation!r}: "
            "set attn_implementation: sdpa, or share_prompts: false"
        )
    windowed = ["sliding_attention"] if getattr(config, "sliding_window", None) else ["full_attention"]
    kinds = set(getattr(config, "layer_types", None) or windowed)
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"share_prompts=True needs full attention in every layer; this model has {', '.join(sorted(kinds))}: "
            "set share_prompts: false"
        )
