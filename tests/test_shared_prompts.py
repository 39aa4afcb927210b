"""Packing completions behind one copy of their prompt changes nothing but the work."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlvr.errors import ConfigError
from rlvr.trainers.forward import completion_statistics
from rlvr.trainers.head import add_token_stats
from rlvr.trainers.shared_prompts import pack, require_full_attention

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [42]]


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Nine rows of three prompts in random order, completions of 1 to 6 tokens and one of none."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(9, 11, dtype=torch.int64), torch.zeros(9, 11, dtype=torch.int64)
    lengths = [6, 1, 3, 2, 5, 4, 1, 0, 6]
    for row, prompt in enumerate(torch.randperm(9, generator=generator).tolist()):
        tokens = PROMPTS[prompt % 3]
        ids[row, 5 - len(tokens) : 5] = torch.tensor(tokens)
        mask[row, 5 - len(tokens) : 5 + lengths[row]] = 1
        ids[row, 5 : 5 + lengths[row]] = torch.randint(3, 250, (lengths[row],), generator=generator)
    return ids, mask, 6


def test_pack_holds_each_prompt_once() -> None:
    ids, mask, length = batch()
    packed = pack(ids, mask, length)
    assert packed.input_ids.size(0) == 3
    place = packed.place[mask[:, -length:].bool()]
    assert len(place) == len(place.unique())  # each token of a completion is predicted in a place of its own
    inputs = packed.input_ids[packed.position_ids.gt(0) | packed.input_ids.gt(0)]
    assert len(inputs) == sum(len(prompt) - 1 for prompt in PROMPTS) + len(place)


def test_shared_prompts_give_the_same_statistics_and_gradients(tiny_model_dir: Path) -> None:
    ids, mask, length = batch()
    valid = mask[:, -length:].bool()
    results = []
    for shared in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
        add_token_stats(model, temperature=0.7)
        found, _ = completion_statistics(model, ids, mask, valid, ("logps", "entropy"), share_prompts=shared)
        weights = torch.linspace(-1, 1, int(valid.sum()), dtype=torch.float64)
        ((found["logps"][valid] + 0.3 * found["entropy"][valid]) * weights).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((found["logps"][valid].detach(), found["entropy"][valid].detach(), grads))
    for plain, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)  # rotary angles are float32
    assert results[0][0].std() > 0.1


def test_attention_without_a_mask_is_refused(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        require_full_attention(model)
