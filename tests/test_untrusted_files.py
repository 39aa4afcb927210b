"""Files that somebody else may have written: a pickle in a checkpoint or code in a model's folder is never run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ppo_cases import FixedPPO, policy_trainer
from safetensors.torch import load_file
from test_grpo_trainer import FixedRollouts, parity_of_sum
from transformers import AutoTokenizer
from trl import ModelConfig

import rlvr
from rlvr.trainers.checkpoint_sampling import load_model
from rlvr.trainers.critic_model import check_critic, load_critic
from rlvr.trainers.launch import check_model

GRPO = {"num_generations": 4}
PPO = {"critic_learning_rate": 0.1}
EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
Config.model_type = {model_type!r}
"""


class Payload:
    """What leaves a file behind when a pickle of it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def checkpoints(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """By trainer, the run directory of two steps with a checkpoint of each."""
    made = {}
    for kind, settings in ((FixedRollouts, GRPO), (FixedPPO, PPO)):
        made[kind] = tmp_path_factory.mktemp("runs") / kind.__name__
        saved = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        policy_trainer(kind, tiny_model_dir, made[kind], **saved, **settings).train()
    return made


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        *((FixedRollouts, GRPO, name) for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt")),
        *((FixedPPO, PPO, name) for name in ("rng_state.pth", "optimizer.pt", "critic/optimizer.pt")),
        (FixedRollouts, GRPO, "training_args.bin"),
        (FixedRollouts, GRPO, "pytorch_model.bin"),
    ],
)
def test_resume_never_runs_a_pickle(
    kind: Any,
    settings: dict[str, Any],
    name: str,
    plain: bool,
    checkpoints: dict[Any, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoints[kind], run)
    file, marker = run / "checkpoint-1" / name, tmp_path / "ran"
    assert file.exists() or name == "pytorch_model.bin"
    evil = {"state": Payload(marker)}
    if name == "pytorch_model.bin":  # where there are no safetensors
        (run / "checkpoint-1" / "model.safetensors").unlink()
    if plain:
        file.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, file)
    resumed = policy_trainer(kind, tiny_model_dir, run, max_steps=2, optim="adamw_torch", **settings)
    if name == "training_args.bin":  # nobody reads it
        resumed.train(resume_from_checkpoint="latest")
    else:
        with pytest.raises(Exception, match=r"[Ww]eights.only|WeightsUnpickler|Unsupported|invalid|Can't find|pickle"):
            resumed.train(resume_from_checkpoint="latest")
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # the payload works
        marker.mkdir()
        pickle.loads(pickle.dumps(evil))


def code_folder(model: Path, folder: Path, model_type: str, marker: Path) -> Path:
    """A copy of a model that asks to be loaded by code of its own."""
    shutil.copytree(model, folder)
    for name, roles in {
        "config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    }.items():
        settings = json.loads((folder / name).read_text())
        kind = {"model_type": model_type} if name == "config.json" else {}
        (folder / name).write_text(json.dumps({**settings, **kind, "auto_map": roles}))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker), model_type=model_type))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_of_a_model_or_critic_is_not_run_unless_asked(
    model_type: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    marker = tmp_path / "ran"
    folder = code_folder(tiny_model_dir, tmp_path / "theirs", model_type, marker)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    check_model(ModelConfig(model_name_or_path=str(folder)))
    args = rlvr.GRPOConfig(output_dir=str(tmp_path / "grpo"), per_device_train_batch_size=8, bf16=False)
    rows = Dataset.from_list([{"prompt": "x"}] * 8)
    jobs: list[Callable[[], Any]] = [
        lambda: check_critic(str(folder), tokenizer),
        lambda: load_critic(str(folder)),
        lambda: load_model(folder),
        lambda: rlvr.GRPOTrainer(str(folder), parity_of_sum, args, rows),
        lambda: policy_trainer(rlvr.PPOTrainer, tiny_model_dir, tmp_path / "ppo", critic=str(folder), **PPO),
    ]
    for job in jobs:
        if model_type == "llama":  # transformers has that class itself
            job()
            continue
        with pytest.raises(ValueError, match=r"trust_remote_code|contains custom code|unheard_of"):
            job()
    assert not marker.exists()
    ask = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    if model_type == "unheard_of":  # it would have run
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
        subprocess.run([sys.executable, "-c", ask, str(folder)], env=environment, check=True)
        assert marker.exists()


def test_trust_remote_code_is_off_by_default() -> None:
    assert rlvr.GRPOConfig(output_dir="x", bf16=False).trust_remote_code is False
    assert rlvr.PPOConfig(output_dir="x", bf16=False).trust_remote_code is False


def test_weights_of_a_checkpoint_are_safetensors(checkpoints: dict[Any, Path]) -> None:
    for run in checkpoints.values():
        assert load_file(run / "checkpoint-1" / "model.safetensors")
        assert not list(run.rglob("*.bin")) or {path.name for path in run.rglob("*.bin")} == {"training_args.bin"}
