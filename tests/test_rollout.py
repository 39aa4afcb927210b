"""Rollout: weights as the engine names them, its settings, and the real vLLM on a CPU.

The engine runs in a child process (engine_probe.py), because vLLM changes the process that imports it; the child
measures and prints numbers, the tests here judge them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_probe import load, with_lora
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlvr.errors import ConfigError
from rlvr.rollout import cpu_engine
from rlvr.rollout.cpu_engine import CpuEngine, EngineOptions, Sampling, require_vllm
from rlvr.rollout.weights import merged_parameters

CHILD = Path(__file__).with_name("engine_probe.py")
ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.7
PROMPTS = [[5, 9, 20, 33, 7], [40, 41, 42], list(range(10, 80)), [5, 9, 20, 33, 7]]

# ------------------------------------------------------------------------------------------------ weights


def logits_with(state: dict[str, Tensor], path: Path, ids: Tensor) -> Tensor:
    model = load(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model(ids).logits.detach()


def test_merged_parameters_of_a_plain_model_are_its_parameters(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    assert [(n, id(p)) for n, p in merged_parameters(model)] == [(n, id(p)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_merged_lora_is_the_lora_model_and_leaves_it_alone(tiny_model_dir: Path, settings: dict) -> None:
    torch.manual_seed(0)
    model = with_lora(load(tiny_model_dir), **settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = dict(merged_parameters(model))
    assert set(merged) == set(dict(load(tiny_model_dir).named_parameters()))
    assert [name for name, _ in merged_parameters(model)] == list(merged)  # also when each tensor is dropped at once
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model(ids).logits
    assert (logits_with(merged, tiny_model_dir, ids) - expected).abs().max() < 1e-4
    assert (load(tiny_model_dir)(ids).logits - expected).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_parameters_may_be_left_early(tiny_model_dir: Path) -> None:
    model = with_lora(load(tiny_model_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    iterator = merged_parameters(model)
    for _ in range(4):
        next(iterator)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    del iterator
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_adapting_one_of_two_tied_embeddings_is_refused(tiny_model_dir: Path, settings: dict) -> None:
    with pytest.raises(ConfigError, match="tied embeddings"):
        list(merged_parameters(with_lora(load(tiny_model_dir), **settings)))


@pytest.mark.parametrize("lora", [False, True])
def test_merged_parameters_of_fsdp2_are_whole(lora: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_lora(load(tiny_model_dir)) if lora else load(tiny_model_dir)
    expected = {name: tensor.detach().clone() for name, tensor in merged_parameters(model)}
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        found = dict(merged_parameters(model))
    finally:
        distributed.destroy_process_group()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert not isinstance(tensor, DTensor) and torch.equal(tensor, expected[name])


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sampling(max_tokens=0), "max_tokens=0"),
        (lambda: Sampling(max_tokens=8, temperature=0.0), "temperature=0.0"),
        (lambda: Sampling(max_tokens=8, extra={"n": 8, "seed": 1}), r"\['n', 'seed'\]"),
        (lambda: EngineOptions(dtype="float16"), "dtype='float16'"),
        (lambda: EngineOptions(block_size=16), "block_size=16"),
        (lambda: CpuEngine("x", list, Sampling(max_tokens=64), EngineOptions(max_model_len=64)), "max_model_len=64"),
    ],
)
def test_bad_settings_say_their_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_missing_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed") as caught:
        require_vllm()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the real engine


@pytest.fixture(scope="module")
def measured(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the child process measured, per checkpoint."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    untied = _save_untied(tiny_model_dir, tmp_path_factory.mktemp("tiny-qwen2"))
    out = tmp_path_factory.mktemp("measured") / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(CHILD), str(out), str(tiny_model_dir), str(untied)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(out.read_text())


BOTH = pytest.mark.parametrize("kind", ["tied", "untied"])


@BOTH
def test_engine_agrees_with_the_model_after_each_sync(measured: dict, kind: str) -> None:
    assert measured[kind]["synced"] <= 1e-4
    assert measured[kind]["synced_again"] <= 1e-4


@BOTH
def test_engine_without_sync_is_found_out(measured: dict, kind: str) -> None:
    assert measured[kind]["stale"] > 0.5
    assert measured[kind]["other_temperature"] > 0.1


@BOTH
def test_engine_samples_from_a_merged_lora_model(measured: dict, kind: str) -> None:
    assert measured[kind]["lora_unmerged"] > 0.1
    assert measured[kind]["lora"] <= 1e-4


def test_engine_refuses_an_incomplete_sync(measured: dict) -> None:
    assert "left 1 engine weights as they were, first ['model.norm.weight']" in measured["untied"]["incomplete"]


def test_engine_refuses_prompts_that_vllm_would_cut_short(measured: dict) -> None:
    assert "raise vllm_max_model_length" in measured["untied"]["too_long"]


def test_seeded_calls_repeat_and_siblings_differ(measured: dict) -> None:
    assert measured["untied"]["repeated"]
    assert measured["untied"]["next_call_differs"]
    assert measured["untied"]["siblings"] == 8


def test_stop_token_ends_the_completion_and_stays_in_it(measured: dict) -> None:
    assert measured["untied"]["stopped"]


def test_engine_leaves_the_training_process_as_it_was(measured: dict) -> None:
    for kind in ("tied", "untied"):
        assert measured[kind]["environment"] == []
        assert measured[kind]["threads"] == [1, 2, 1]
        assert measured[kind]["generators_kept"]
        assert measured[kind]["process_group_after_close"] is False


@pytest.mark.slow
def test_engine_of_each_rank_keeps_the_process_group(tiny_model_dir: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(CHILD), str(tmp_path), "ranks", str(tiny_model_dir)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["sum"] for rank in ranks] == [2.0, 2.0]  # of ones, after the engines are closed
    assert [rank["local_world_size"] for rank in ranks] == ["2", "2"]
    assert max(rank["synced"] for rank in ranks) <= 1e-4


def _save_untied(tied: Path, path: Path) -> Path:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tied)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
