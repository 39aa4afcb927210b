"""The forward that returns statistics: of every family of heads, under adapters, and what it leaves out."""

import inspect
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from rlvr.errors import ConfigError
from rlvr.theory import entropy
from rlvr.trainers.forward import completion_statistics
from rlvr.trainers.head import add_token_stats, check_token_stats

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # its head has a bias
    "GPT2": {"n_embd": 16, "n_head": 2, "n_layer": 2},  # learns positions: padding must not count
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
}
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
TRAINED = MASK[:, 3:].bool()
TRAINED[0, 1] = False  # the output of a tool
IDS = torch.randint(3, 97, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK


def tiny(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)
    return model


def expected(model: Any, temperature: float) -> dict[str, Tensor]:
    """Of each row passed alone and without its padding, as it was generated."""
    rows = []
    for ids, mask, trained in zip(IDS, MASK.bool(), TRAINED, strict=True):
        predicted_by = torch.cat([trained.new_zeros(2), trained, trained.new_zeros(1)])
        rows.append(model(ids[mask][None]).logits[0][predicted_by[mask]])
    logits = torch.cat(rows) / temperature
    logps = logits.log_softmax(-1).gather(-1, IDS[:, 3:][TRAINED][:, None])[:, 0]
    return {"logps": logps, "entropy": entropy(logits)}


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_and_gradients_are_those_of_the_logits(family: str) -> None:
    model = tiny(family)
    want = expected(model, 0.7)
    add_token_stats(model, temperature=0.7)
    found, _ = completion_statistics(model, IDS, MASK, TRAINED, ("logps", "entropy"), batch_size=2)
    grads = []
    for values in ({name: x[TRAINED] for name, x in found.items()}, want):
        loss = (values["logps"] + 0.3 * values["entropy"]).sum()
        parameters = [p for p in model.parameters() if p.requires_grad]
        one = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads.append(torch.cat([g.flatten() for g in one if g is not None]))
    for name, x in found.items():
        torch.testing.assert_close(x[TRAINED], want[name].to(x.dtype), rtol=1e-5, atol=2e-5)
        assert (x[~TRAINED] == 0).all()
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_only_trained_tokens_reach_the_head_and_nothing_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlvr_kernels

    model = tiny("Llama")
    add_token_stats(model, temperature=1.0)
    projected, passed = [], []
    statistics = rlvr_kernels.token_stats
    monkeypatch.setattr(
        rlvr_kernels, "token_stats", lambda h, *a, **k: projected.append(len(h)) or statistics(h, *a, **k)
    )
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    completion_statistics(model, IDS, MASK, TRAINED, ("logps",))
    assert projected == [int(TRAINED.sum())] == [6]
    assert passed == [(3, 7)]  # of 8 columns the last holds padding alone


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "head trained whole"])
def test_adapters_are_in_the_statistics(whole: bool) -> None:
    model = tiny("Llama")
    add_token_stats(model, temperature=1.0)
    before = expected(model, 1.0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"] if whole else None
    )
    adapted: Any = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    want = expected(adapted, 1.0)
    assert (want["logps"] - before["logps"]).abs().max() > 0.1
    found, _ = completion_statistics(adapted, IDS, MASK, TRAINED, ("logps", "entropy"))
    for name, x in found.items():
        torch.testing.assert_close(x[TRAINED], want[name].to(x.dtype), rtol=1e-5, atol=2e-5)
    found["logps"].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())
    with adapted.disable_adapter():  # the reference
        base, _ = completion_statistics(adapted, IDS, MASK, TRAINED, ("logps",))
    torch.testing.assert_close(base["logps"][TRAINED], before["logps"], rtol=1e-5, atol=2e-5)


def test_the_routers_loss_is_trl_s() -> None:
    theirs, ours = tiny("Qwen3Moe"), tiny("Qwen3Moe")
    add_fused_lm_head(theirs)
    add_token_stats(ours, temperature=1.0)
    shown = MASK.clone()
    labels = IDS.masked_fill(shown == 0, -100)
    want = theirs(IDS, attention_mask=shown, labels=labels, fused_lm_head=True, output_router_logits=True).aux_loss
    _, found = completion_statistics(ours, IDS, shown, TRAINED, ("logps",), router_loss=True)
    assert found is not None
    torch.testing.assert_close(found, want)


def test_the_model_s_own_forward_is_left_alone() -> None:
    model = tiny("Llama")
    before, signature = model(IDS, attention_mask=MASK).logits, inspect.signature(model.forward)
    add_token_stats(model, temperature=1.0)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, before)
    assert inspect.signature(model.forward) == signature
    out = model.generate(IDS[:1, 1:4], attention_mask=MASK[:1, 1:4], max_new_tokens=3, do_sample=False)
    assert out.size(1) > 3


def test_bfloat16_weights_give_float32_statistics() -> None:
    """The backbone rounds, the logits do not."""
    model = tiny("Llama").bfloat16()
    add_token_stats(model, temperature=1.0)
    found, _ = completion_statistics(model, IDS, MASK, TRAINED, ("logps", "entropy"))
    ids, mask = IDS[:, :7], MASK[:, :7]
    outputs = model.base_model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    hidden = outputs.last_hidden_state[:, 2:-1][TRAINED[:, :-1]]
    exact = hidden.double() @ model.lm_head.weight.double().T
    want = exact.log_softmax(-1).gather(-1, IDS[:, 3:][TRAINED][:, None])[:, 0]
    assert found["logps"].dtype == torch.float32
    torch.testing.assert_close(found["logps"][TRAINED].double(), want, rtol=0, atol=1e-5)


def test_a_head_that_does_more_is_refused() -> None:
    model = tiny("Llama")
    add_token_stats(model, temperature=0.7)
    check_token_stats(model, 0.7)
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(torch.tanh(hidden))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM's head does more .* use_trl_head: true"):
        check_token_stats(model, 0.7)


def test_the_check_allows_for_rounded_logits() -> None:
    model = tiny("Llama").bfloat16()
    add_token_stats(model, temperature=0.7)
    check_token_stats(model, 0.7)


def test_router_losses_of_families_that_name_their_experts_otherwise() -> None:
    config = transformers.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0)
    model = transformers.GraniteMoeForCausalLM(config).eval()
    want = model(IDS, attention_mask=MASK, output_router_logits=True).aux_loss
    add_token_stats(model, temperature=1.0)
    _, found = completion_statistics(model, IDS, MASK, TRAINED, ("logps",), router_loss=True)
    assert found is not None
    assert found.item() == pytest.approx(want.item(), rel=0.05)  # the last column, padding, is left out of ours
