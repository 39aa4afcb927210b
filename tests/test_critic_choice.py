"""A critic by name must read the policy's tokens in order; else one line says so before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from test_end_to_end import config as recipe_config
from transformers import AutoConfig, AutoTokenizer

from rlvr import PPOConfig, PPOTrainer
from rlvr.errors import ConfigError
from rlvr.trainers.critic_model import check_critic
from rlvr.trainers.launch import parse_arguments, train


def folder_of_critic(
    model: Path, folder: Path, *, config: dict[str, Any] | None = None, tokens: dict[str, int] | None = None
) -> Path:
    """Configuration and tokenizer of `model`, with changes, and no weights; tokens: other ids of tokens."""
    AutoConfig.from_pretrained(model, **(config or {})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"].update(tokens or {})
    path.write_text(json.dumps(told))
    return folder


def critics(model: Path, folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Names of critics, and what the refusal of each must hold."""
    swapped = folder_of_critic(model, folder / "swapped", tokens={"a": 100, "b": 99})
    more = folder_of_critic(model, folder / "more", tokens={"new": 259})
    few = folder_of_critic(model, folder / "few", config={"vocab_size": 258})
    (folder / "vision").mkdir()
    AutoConfig.for_model("vit").save_pretrained(folder / "vision")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "vision")
    bare = folder / "bare"
    AutoConfig.from_pretrained(model).save_pretrained(bare)
    return {
        "another vocabulary": (str(more), ("another tokenizer", "260 tokens instead of 259", "'new' is 259 ", "none")),
        "other ids": (str(swapped), ("another tokenizer", "critic: copy")),
        "too few rows": (str(few), ("vocab_size=258", "the policy's 259 token ids")),
        "no language model": (str(folder / "vision"), ("model_type='vit'", "causal language model")),
        "no tokenizer": (str(bare), ("not copy, shared, or a model with its tokenizer",)),
        "no such folder": (str(folder / "none"), ("not copy, shared, or a model with its tokenizer",)),
        "no such model": ("copi", ("'copi'", "not copy, shared, or a model with its tokenizer")),
    }


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)


def settings_of(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for PPO, one completion per prompt."""
    return {**recipe_config(model, folder / "run"), "num_generations": 1, "num_generations_eval": 1, **changes}


def refusal_of_run(settings: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError) as error:
        train(PPOTrainer, *parse_arguments(PPOConfig, ["--config", str(path)]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_critic_that_does_not_read_the_policys_tokens_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for name, parts in critics(tiny_model_dir, tmp_path).values():
        with pytest.raises(ConfigError) as error:
            check_critic(name, tokenizer)
        message = str(error.value)
        assert "\n" not in message and len(message) < 400
        for part in ("critic", *parts):
            assert part in message


def test_a_critic_of_the_policys_tokens_passes(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    check_critic(str(tiny_model_dir), tokenizer)
    check_critic(str(folder_of_critic(tiny_model_dir, tmp_path, config={"vocab_size": 300})), tokenizer)


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"lam": 1.5}, ("lam=1.5", "[0, 1]")),
        ({"critic_warmup_steps": 3}, ("critic_warmup_steps=3", "2 optimizer step(s)")),
        ({"critic_lora": True}, ("critic_lora=True", "use_peft: true")),
        ({"critic": "copi"}, ("critic='copi'", "copy, shared, or a model with its tokenizer")),
        ({"crtic": "copy"}, ("crtic", "critic")),
        ({"per_device_train_batch_size": 1}, ("per_device_train_batch_size", "at least 2")),
        ({"train_size": 7}, ("train_dataset", "7 rows", "8 prompts")),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    changes: dict[str, Any], parts: tuple[str, ...], tiny_model_dir: Path, tmp_path: Path
) -> None:
    message = refusal_of_run(settings_of(tmp_path, tiny_model_dir, **changes), tmp_path)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()
