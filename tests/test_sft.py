"""Supervised fine-tuning: TRL's own without experts, with the routers' loss where there are some; recipe to model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from peft import LoraConfig
from test_mole_training import adapters, config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.mole.model import expert_layers
from rlvr.mole.routers import auxiliary_loss, build_router
from rlvr.trainers.launch import parse_arguments, train_sft
from rlvr.trainers.sft import SFTConfig, SFTTrainer, demonstrations

ROWS = Dataset.from_list(
    [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(9) for b in range(0, 36, 9)]
)


def trainer(model_dir: Path, out: Path, *, kind: Any = SFTTrainer, peft_config: Any = None, **settings: Any) -> Any:
    config_class = SFTConfig if kind is SFTTrainer else trl.SFTConfig
    args = config_class(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "learning_rate": 0.1,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    torch.manual_seed(1)
    one = kind(model, args=args, train_dataset=ROWS, processing_class=tokenizer, peft_config=peft_config)
    g = torch.Generator().manual_seed(2)
    for experts in expert_layers(one.model).values():
        torch.nn.init.normal_(experts.b, std=0.1, generator=g)
    return one


def logged(one: Any) -> list[dict[str, float]]:
    return [entry for entry in one.state.log_history if "loss" in entry]


def test_without_experts_it_is_trls_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    ends = []
    for kind in (SFTTrainer, trl.SFTTrainer):
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        one = trainer(tiny_model_dir, tmp_path / kind.__module__, kind=kind, peft_config=lora)
        one.train()
        ends.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    assert torch.equal(*ends)


def test_the_routers_loss_is_added_as_a_mean_over_micro_batches(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One step with and one without it differ by the gradient of the formula, padding left out."""
    coefs = {"entropy_coef": 0.5, "balance_coef": 0.3, "z_coef": 0.2}
    moved, batches = [], []
    for name, given in (("with", coefs), ("without", dict.fromkeys(coefs, 0.0))):
        mole = config(router={"name": "dynmole", **given}, lora_dropout=0.0)
        one = trainer(tiny_model_dir, tmp_path / name, peft_config=mole, max_steps=1)
        compute = one.compute_loss

        def remembered(model: Any, inputs: Any, *args: Any, compute: Any = compute, **kwargs: Any) -> Any:
            batches.append(dict(inputs))
            return compute(model, inputs, *args, **kwargs)

        one.compute_loss = remembered
        start = adapters(one)
        one.train()
        moved.append(adapters(one) - start)
    again = trainer(tiny_model_dir, tmp_path / "again", peft_config=mole)
    router, total = build_router({"name": "dynmole", **coefs}), torch.zeros(())
    assert len(batches) == 4 and (batches[0]["attention_mask"] == 0).any()
    for batch in batches[:2]:
        again.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        recorded = [logits[batch["attention_mask"].bool()] for logits in again.routers._last.logits]
        total = total + auxiliary_loss(router, torch.cat(recorded))[0] / 2
    trained = [p for name, p in again.model.named_parameters() if "mole_" in name]
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    known = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained, strict=True)]
    want = -0.1 * torch.cat([g.flatten() for g in known])
    assert want.norm() > 1e-3
    assert (moved[0] - moved[1] - want).norm() < 1e-3 * want.norm()


def test_routers_are_told_in_the_log(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, peft_config=config(), gradient_checkpointing=True)
    one.train()
    for entry in logged(one):
        assert 0 < entry["router/entropy"] < 1 and 2 <= entry["router/experts"] <= 4
        assert entry["router/aux_loss"] > 0 and 0 <= entry["router/soft"] <= 1


def test_demonstrations_are_prompts_with_their_answers() -> None:
    plain = Dataset.from_list([{"prompt": "1 + 1 =", "answer": "2", "question": "1 + 1"}])
    assert demonstrations(plain)[0] == {"prompt": "1 + 1 =", "completion": " 2"}
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2"}])
    assert demonstrations(chat, "it is {answer}")[0]["completion"] == [{"role": "assistant", "content": "it is 2"}]
    with pytest.raises(ConfigError, match="1 of 1 rows have no reference answer"):
        demonstrations(Dataset.from_list([{"prompt": "?", "answer": ""}]))


def recipe(model_dir: Path, folder: Path, **settings: Any) -> list[str]:
    path = folder / "recipe.yaml"
    given = yaml.safe_load((Path(__file__).parents[1] / "recipes/mole_sft.yaml").read_text())
    small = {
        "model_name_or_path": str(model_dir),
        "task": "chain_sum",
        "chat": False,
        "train_size": 20,
        "heldout_size": 4,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    path.write_text(yaml.safe_dump({**given, **small, **settings}))
    return ["--config", str(path)]


def test_the_recipe_trains_and_saves_a_mixture(tiny_model_dir: Path, tmp_path: Path) -> None:
    train_sft(*parse_arguments(SFTConfig, recipe(tiny_model_dir, tmp_path)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    layers = expert_layers(model)
    assert len(layers) == 6 and {experts.num_experts for experts in layers.values()} == {6}
    assert all(experts.b.abs().sum() > 0 for experts in layers.values())


def test_a_saved_mixture_is_trained_further(tiny_model_dir: Path, tmp_path: Path) -> None:
    """By its folder, as any other model; adapters upon it are refused."""
    train_sft(*parse_arguments(SFTConfig, recipe(tiny_model_dir, tmp_path)))
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    (tmp_path / "again").mkdir()
    given = recipe(tmp_path / "run/model", tmp_path / "again", mole=None, learning_rate=1.0e-3)
    train_sft(*parse_arguments(SFTConfig, given))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again/run/model")
    moved = adapters_of(second) - adapters_of(first)
    assert 0 < moved.norm() < 0.5 * adapters_of(first).norm()
    with pytest.raises(ConfigError, match="holds adapters, which are trained further: unset mole"):
        train_sft(*parse_arguments(SFTConfig, recipe(tmp_path / "run/model", tmp_path)))


def adapters_of(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "mole_" in name])


@pytest.mark.parametrize("family", ["opt", "qwen2_moe"])
def test_layers_that_get_their_texts_as_one_are_counted_alike(
    family: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """These families flatten what some of their linear layers read."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    own = {
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **sizes, **own[family]))
    names = {"opt": ["q_proj", "fc1"], "qwen2_moe": ["q_proj", "up_proj"]}[family]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    one = trainer(tmp_path / "model", tmp_path / "run", peft_config=config(target_modules=names))
    one.train()
    for entry in logged(one):
        assert 2 <= entry["router/experts"] <= 4 and entry["router/aux_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mole": {"num_experts": 0}}, ("num_experts=0",)),
        ({"use_peft": True}, ("use_peft", "mole", "remove one")),
        ({"model_name_or_path": None}, ("model_name_or_path is not set",)),
        ({"mole": {"target_modules": ["nope"]}}, ("target_modules=['nope']", "no layer")),
    ],
)
def test_bad_input_is_one_line(
    settings: dict[str, Any], parts: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        train_sft(*parse_arguments(SFTConfig, recipe(tiny_model_dir, tmp_path, **settings)))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_the_recipe_is_accepted_where_it_stands() -> None:
    """Its bf16 needs no word more on a machine without an accelerator."""
    recipe = Path(__file__).parents[1] / "recipes" / "mole_sft.yaml"
    _, args, _ = parse_arguments(SFTConfig, ["--config", str(recipe)])
    assert args.bf16 and args.use_cpu == (not torch.accelerator.is_available())
