"""A critic is its policy's backbone with a value head: the same hidden states, the value 0 at first, no chance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedModel,
)

from rlvr.errors import ConfigError
from rlvr.trainers.critic_model import ValueHead, adapted, copy_critic, load_critic, with_float32_head

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROPOUT = {"attention_dropout": 0.3}
# What a family's configuration needs besides, dropout above all where it has any.
FAMILIES: dict[str, dict[str, Any]] = {
    "falcon": {"hidden_dropout": 0.3, **DROPOUT},
    "gemma3_text": {"head_dim": 8, **DROPOUT},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, **DROPOUT},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "granite": DROPOUT,
    "llama": DROPOUT,
    "mistral": DROPOUT,
    "mixtral": {"num_local_experts": 4, **DROPOUT},
    "olmo2": DROPOUT,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "layerdrop": 0.3, **DROPOUT},
    "phi3": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, **DROPOUT},
    "qwen2": DROPOUT,
    "qwen3": {"head_dim": 8, **DROPOUT},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def policy_of(family: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    """Two sequences of nine tokens, the first padded on the left."""
    ids, mask = torch.arange(3, 21).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def hidden_states(model: Any) -> Tensor:
    hidden: Tensor = model.base_model(**inputs()).last_hidden_state
    return hidden[inputs()["attention_mask"].bool()]


@torch.no_grad()
def values(critic: Any) -> Tensor:
    found: Tensor = critic(**inputs()).logits[..., 0]
    return found


def perturbed(critic: Any) -> Any:
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return critic


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------ backbone and head


def test_a_checkpoint_without_the_backbones_weights_is_refused(tmp_path: Path) -> None:
    policy = policy_of("llama")
    saved(policy, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"backbone.{name}": x for name, x in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks \d+ weights of its backbone.* first model\.") as error:
        load_critic(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_classifier_of_several_labels_gives_its_backbone(tmp_path: Path) -> None:
    config = policy_of("llama").config
    config.num_labels = 2
    model = AutoModelForTokenClassification.from_config(config)
    with pytest.warns(UserWarning, match=r"score.* does not fit; the value head starts as 0"):
        critic = load_critic(saved(model, tmp_path)).eval()
    torch.testing.assert_close(hidden_states(critic), hidden_states(model.eval()), rtol=1e-5, atol=1e-6)
    assert torch.equal(values(critic), torch.zeros(2, 9))


def test_changes_of_the_policys_configuration_are_the_critics(tmp_path: Path) -> None:
    policy = policy_of("llama")
    critic = load_critic(saved(policy, tmp_path), {"num_hidden_layers": 1, "rms_norm_eps": 0.1})
    assert (critic.config.num_hidden_layers, critic.config.rms_norm_eps) == (1, 0.1)


def test_a_bfloat16_critic_has_a_float32_head() -> None:
    critic = with_float32_head(copy_critic(policy_of("llama").bfloat16()))
    assert {p.dtype for p in critic.score.parameters()} == {torch.float32}
    assert {p.dtype for p in critic.base_model.parameters()} == {torch.bfloat16}


@every_family
def test_a_copied_critic_has_the_policys_hidden_states_and_the_value_0(family: str) -> None:
    policy = policy_of(family)
    critic = copy_critic(policy)
    assert torch.equal(hidden_states(critic.eval()), hidden_states(policy))
    assert torch.equal(values(critic), torch.zeros(2, 9))
    own = {p.data_ptr() for p in critic.parameters()}
    assert not own & {p.data_ptr() for p in policy.parameters()}


@every_family
def test_a_policys_checkpoint_loads_as_its_critic_of_the_value_0(family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    critic = load_critic(saved(policy, tmp_path)).eval()
    torch.testing.assert_close(hidden_states(critic), hidden_states(policy), rtol=1e-5, atol=1e-6)
    assert torch.equal(values(critic), torch.zeros(2, 9))


@every_family
def test_training_mode_changes_no_value(family: str) -> None:
    policy = policy_of(family).train()
    assert not torch.equal(hidden_states(policy), hidden_states(policy))  # it has dropout
    critic = perturbed(copy_critic(policy))
    assert torch.equal(values(critic.train()), values(critic.eval()))


@every_family
def test_a_saved_critic_gives_its_values_again(family: str, tmp_path: Path) -> None:
    critic = perturbed(copy_critic(policy_of(family))).eval()
    assert values(critic).abs().max() > 0
    again = load_critic(saved(critic, tmp_path)).eval()
    torch.testing.assert_close(values(again), values(critic), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_saved_critic_is_a_model_for_token_classification(family: str, tmp_path: Path) -> None:
    critic = perturbed(copy_critic(policy_of(family))).eval()
    plain = AutoModelForTokenClassification.from_pretrained(saved(critic, tmp_path)).eval()
    assert plain.config.num_labels == 1
    torch.testing.assert_close(values(plain), values(critic), rtol=1e-5, atol=1e-6)


@every_family
def test_padding_on_the_left_changes_no_value(family: str) -> None:
    critic = perturbed(copy_critic(policy_of(family))).eval()
    padded, mask = inputs()["input_ids"][:1], inputs()["attention_mask"][:1]
    takes_positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family != "opt" else {}
    with torch.no_grad():
        with_padding = critic(input_ids=padded, attention_mask=mask, **takes_positions).logits[0, 3:]
        without = critic(input_ids=padded[:, 3:], attention_mask=mask[:, 3:]).logits[0]
    torch.testing.assert_close(with_padding, without, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ other beginnings


def reward_model_of(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], "num_labels": 1})
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_reward_model_starts_the_critic_with_its_head(family: str, tmp_path: Path) -> None:
    reward_model = reward_model_of(family)
    critic = load_critic(saved(reward_model, tmp_path)).eval()
    torch.testing.assert_close(hidden_states(critic), hidden_states(reward_model), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        score = reward_model(**inputs()).logits[:, 0]  # of the last token
    torch.testing.assert_close(values(critic)[:, -1], score, rtol=1e-5, atol=1e-6)


def test_a_head_of_another_name_is_said_to_be_lost(tmp_path: Path) -> None:
    reward_model = reward_model_of("gpt2")  # `score`, and its models for token classification have a `classifier`
    with pytest.warns(UserWarning, match=r"score\.weight does not fit; the value head starts as 0"):
        critic = load_critic(saved(reward_model, tmp_path)).eval()
    torch.testing.assert_close(hidden_states(critic), hidden_states(reward_model), rtol=1e-5, atol=1e-6)
    assert torch.equal(values(critic), torch.zeros(2, 9))


def test_a_critic_of_another_width_gives_values(tmp_path: Path) -> None:
    narrow = policy_of("llama", hidden_size=16, num_attention_heads=2)
    critic = load_critic(saved(narrow, tmp_path))
    assert torch.equal(values(critic), torch.zeros(2, 9))
    assert critic.config.hidden_size == 16


@pytest.mark.parametrize("make", ["copy", "load"])
def test_values_of_a_bfloat16_critic_are_float32_numbers(make: str, tmp_path: Path) -> None:
    policy = policy_of("llama").to(torch.bfloat16)
    loads: Callable[[], Any] = lambda: load_critic(saved(policy, tmp_path), dtype=torch.bfloat16)  # noqa: E731
    critic = perturbed(copy_critic(policy) if make == "copy" else loads())
    assert critic.dtype == torch.bfloat16
    head = next(module for module in critic.modules() if isinstance(module, ValueHead))
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    exact = hidden.double() @ head.weight[0].double() + head.bias.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)  # a bfloat16 result is off by 1e-3
    assert values(critic).dtype == torch.float32


def test_the_attention_asked_for_is_the_copys() -> None:
    config = LlamaConfig(**SMALL)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert copy_critic(policy).config._attn_implementation == "eager"


# ------------------------------------------------------------------------------------------------ adapters


@every_family
def test_an_adapted_critic_trains_its_adapters_and_its_head_alone(family: str) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    critic = adapted(copy_critic(policy_of(family)), lora)
    assert torch.equal(values(critic), torch.zeros(2, 9))
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    trained = {name for name, p in critic.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "modules_to_save" in name}
    assert heads and trained - heads and all("lora_" in name for name in trained - heads)
    optimizer = torch.optim.SGD([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):  # head, then the adapters' second factor, then their first
        (critic(**inputs()).logits - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in critic.named_parameters() if not torch.equal(p, before[name])}
    assert heads < moved <= trained
    assert lora.task_type == "CAUSAL_LM" and lora.modules_to_save is None  # the policy's settings are untouched


# ------------------------------------------------------------------------------------------------ refusals


def test_a_policy_with_adapters_is_not_copied() -> None:
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(policy_of("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(
        ConfigError, match=r"critic=copy cannot copy .* PeftModel.*give the policy or the critic by name"
    ):
        copy_critic(policy)


@pytest.mark.parametrize("family", ["vit", "modernbert"])
def test_a_model_that_reads_no_text_in_order_is_no_critic(family: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model_type='{family}': must be a causal language model"):
        load_critic(str(tmp_path))
