"""What is refused of a tokenizer and of prompts before a model is loaded."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import rlvr
from rlvr.errors import ConfigError
from rlvr.trainers.tokenizer_checks import check_tokens


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))


def arguments(**settings: Any) -> rlvr.GRPOConfig:
    return rlvr.GRPOConfig(output_dir="x", bf16=False, use_cpu=True, **{"max_completion_length": 12, **settings})


def prompts(*given: Any) -> dict[str, Dataset | None]:
    return {"train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in given]), "eval_dataset": None}


def without_eos(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by", ["name", "processing_class"])
def test_tokenizer_without_an_end_is_refused(by: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    endless = without_eos(tiny_model_dir, tmp_path / "endless")
    given = (str(endless), None) if by == "name" else (str(tiny_model_dir), AutoTokenizer.from_pretrained(endless))
    with pytest.raises(ConfigError, match=r"its tokenizer has no eos_token.*: set eos_token") as error:
        check_tokens(*given, arguments(), prompts("x"))
    assert "\n" not in str(error.value)
    check_tokens(str(tiny_model_dir), None, arguments(), prompts("x"))


def test_tokenizer_of_a_model_that_is_there_is_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    endless = without_eos(tiny_model_dir, tmp_path / "endless")
    model = LlamaForCausalLM(AutoConfig.from_pretrained(endless))
    with pytest.raises(ConfigError, match="has no eos_token"):
        check_tokens(model, None, arguments(), prompts("x"))


def test_model_that_does_not_exist_is_left_to_its_loader(tmp_path: Path) -> None:
    check_tokens(str(tmp_path / "nothing"), None, arguments(), prompts("x"))


def engine(**settings: Any) -> rlvr.GRPOConfig:
    return arguments(use_vllm=True, **settings)


def test_prompt_is_too_long_by_one_token(tiny_model_dir: Path) -> None:
    fits = "x" * (512 - 12)  # a token per byte, of 512 positions
    check_tokens(str(tiny_model_dir), None, engine(), prompts(fits, "x"))
    too_long = prompts("x", fits + "x", fits, fits * 2)
    said = r"train_dataset: 2 prompts are too long, the first in row 2 with 501 tokens.*room for 500"
    with pytest.raises(ConfigError, match=said):
        check_tokens(str(tiny_model_dir), None, engine(), too_long)
    with pytest.warns(UserWarning, match=said):  # without an engine a model may go beyond its positions
        check_tokens(str(tiny_model_dir), None, arguments(), too_long)


def test_prompt_of_messages_is_counted_with_its_template(tiny_model_dir: Path) -> None:
    around = len("user: \nassistant: ")
    talk = lambda size: [{"role": "user", "content": "x" * size}]  # noqa: E731
    check_tokens(str(tiny_model_dir), None, engine(), prompts(talk(500 - around)))
    with pytest.raises(ConfigError, match=r"in row 1 with 501 tokens"):
        check_tokens(str(tiny_model_dir), None, engine(), prompts(talk(501 - around)))


def test_prompts_of_a_stream_or_of_several_sets_are_left_to_the_trainer(tiny_model_dir: Path) -> None:
    rows = prompts("x" * 600)["train_dataset"]
    assert rows is not None
    for heldout in ({"a": rows}, rows.to_iterable_dataset()):
        check_tokens(str(tiny_model_dir), None, engine(), {**prompts("x"), "eval_dataset": heldout})


def test_prompt_limit_is_the_engines_and_holds_for_held_out_rows(tiny_model_dir: Path) -> None:
    rows = {**prompts("x"), "eval_dataset": prompts("x" * 89)["train_dataset"]}
    check_tokens(str(tiny_model_dir), None, arguments(), rows)
    with pytest.raises(ConfigError, match=r"eval_dataset: 1 prompts are too long.*89 tokens.*room for 88"):
        check_tokens(str(tiny_model_dir), None, engine(vllm_max_model_length=100), rows)
