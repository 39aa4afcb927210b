"""A mixture of LoRA experts beside the layers of real models: nothing at the start, exact afterwards, saved whole."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlvr.errors import ConfigError
from rlvr.mole.experts import Experts
from rlvr.mole.model import MoleConfig, MoleLinear, expert_layers
from rlvr.mole.routers import ROUTERS, build_router

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "qwen3")
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))


def config(**settings: Any) -> MoleConfig:
    return MoleConfig(**{"r": 4, "lora_alpha": 8, "num_experts": 3, "task_type": "CAUSAL_LM", **settings})


def mole(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base_model(family), config(**settings))


def trained(model: Any) -> Any:
    """With experts that do something, as after training."""
    g = torch.Generator().manual_seed(2)
    for experts in expert_layers(model).values():
        torch.nn.init.normal_(experts.b, std=0.3, generator=g)
    return model.eval()


def ids() -> Tensor:
    return torch.arange(1, 19).view(2, 9)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [ATTENTION_AND_MLP, "all-linear", r".*\.layers\.[02]\.mlp\.\w+_proj"])
def test_at_the_start_the_model_is_its_base_bit_for_bit(family: str, targets: Any) -> None:
    model = mole(family, target_modules=targets).eval()
    assert torch.equal(logits(model), logits(base_model(family).eval()))
    assert len(expert_layers(model)) == (6 if isinstance(targets, str) and targets != "all-linear" else 28)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_add_what_a_loop_over_them_adds(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = build_router(name)
    experts = Experts(8, 6, num_experts=4, r=2, scaling=1.5, router=router).to(dtype)
    torch.nn.init.normal_(experts.b)
    x = torch.randn(3, 5, 8).to(dtype)
    weight = router((x.float() @ experts.router.float().T).softmax(-1)).weight
    want = torch.zeros(3, 5, 6)
    for e in range(4):
        rows = slice(2 * e, 2 * e + 2)
        want += weight[..., e : e + 1] * 1.5 * (x.float() @ experts.a[rows].float().T @ experts.b[:, rows].float().T)
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-5}[dtype]  # routers are float32
    torch.testing.assert_close(experts(x).float(), want, rtol=0, atol=tolerance)


def test_only_adapters_are_trained() -> None:
    model = mole()
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == {n for n in parameters if "mole_" in n}
    trained(model).train()
    model(ids(), labels=ids()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    assert all(p.grad.abs().sum() > 0 for p in parameters.values() if p.requires_grad)


def test_turned_off_the_model_is_its_base_again() -> None:
    model = trained(mole())
    base = logits(base_model().eval())
    assert (logits(model) - base).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), base) and not expert_layers(model)
    assert len(expert_layers(model)) == 12


@pytest.mark.parametrize("router", ["dynmole", {"name": "top_k", "k": 1}])
def test_adapters_are_saved_and_loaded_as_pefts_are(router: Any, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(router=router))
    want = logits(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any("pt" in name.split(".")[1:] or name.endswith(".bin") for name in files)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["peft_type"] == "MOLE" and build_router(saved["router"]) == build_router(router)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), want)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), want)


def test_mola_gives_each_quarter_of_the_layers_its_number_of_experts() -> None:
    model = mole(num_experts=[1, 2, 3, 5], router={"name": "top_k", "k": 1}, target_modules=["q_proj"])
    assert [experts.num_experts for experts in expert_layers(model).values()] == [1, 2, 3, 5]
    assert next(iter(expert_layers(model))) == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_models_have_float32_experts(autocast: bool) -> None:
    torch.manual_seed(1)
    model = trained(get_peft_model(base_model().bfloat16(), config()))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model)
    exact = logits(trained(mole()).float())
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_merging_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not merge"):
        mole().merge_and_unload()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"r": 0}, ("r=0", "at least 1")),
        ({"num_experts": 0}, ("num_experts=0", "at least 1")),
        ({"num_experts": []}, ("num_experts=[]",)),
        ({"num_experts": [4, 0]}, ("num_experts=0", "at least 1")),
        ({"lora_alpha": 0}, ("lora_alpha=0", "> 0")),
        ({"lora_dropout": 1.0}, ("lora_dropout=1.0", "[0, 1)")),
        ({"lora_dropout": "5e-2"}, ("lora_dropout='5e-2'", "[0, 1)")),
        ({"lora_alpha": float("inf")}, ("lora_alpha=inf", "finite")),
        ({"target_modules": None}, ("target_modules=None", "names of layers")),
        ({"target_modules": ["q_proj", 3]}, ("target_modules=['q_proj', 3]", "names of layers")),
        ({"router": {"name": "dynmole", "min_k": 4}}, ("num_experts=3", "4 at least")),
        ({"router": {"name": "dynmole", "q": -1}}, ("q=-1", "> 0")),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"target_modules": ["nope"]}, ("target_modules=['nope']", "no layer")),
        ({"target_modules": ["embed_tokens"]}, ("embed_tokens", "Embedding", "nn.Linear")),
        ({"num_experts": [2, 2, 2]}, ("num_experts=[2, 2, 2]", "multiple of 3")),
    ],
)
def test_layers_that_cannot_have_experts_are_refused(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        get_peft_model(base_model(), config(**settings))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    trained(mole()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has shape \(32, 12\) in the checkpoint, \(48, 12\) in the model"):
        PeftModel.from_pretrained(base_model(hidden_size=48), tmp_path)
    for layers, message in (
        (2, "the model lacks 18 of the checkpoint's"),
        (5, "the checkpoint lacks 9 of the model's"),
    ):
        with pytest.raises(ConfigError, match=message):
            PeftModel.from_pretrained(base_model(num_hidden_layers=layers), tmp_path)


def test_a_layer_has_several_adapters_of_which_one_is_active() -> None:
    model = mole()
    model.add_adapter("second", config(r=2))
    first = logits(trained(model))
    model.set_adapter("second")
    assert not torch.equal(logits(trained(model)), first)
    layer = next(module for module in model.modules() if isinstance(module, MoleLinear))
    assert set(layer.mole_experts) == {"default", "second"} and len(layer.active_experts) == 1
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="2 active adapters: choose one with set_adapter"):
        expert_layers(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert peft.get_peft_model_state_dict(model).keys() == peft.get_peft_model_state_dict(mole()).keys()
