"""Every recipe parses, has its paper's batches, and trains; recipes, README and PAPERS name the same methods."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_run import PPO, parse, small_config, train
from transformers import TrainingArguments

import rlvr
from rlvr.controls import CONTROLS, KlCov
from rlvr.monitor.metrics import METRICS
from rlvr.surrogates import SURROGATES
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.staged import total_steps

ROOT = Path(__file__).parents[1]
SUPERVISED = {"mole_sft"}  # test_sft.py
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem not in SUPERVISED}
# Prompts and completions per prompt of a rollout, and optimizer steps on it, on eight processes.
BATCHES = {
    "adaptive_entropy": (256, 16, 1),
    "c3po": (512, 16, 256),
    "cispo": (512, 16, 16),
    "clip_b": (64, 16, 1),
    "clip_cov": (256, 8, 8),
    "clip_higher": (256, 8, 8),
    "clip_v": (64, 8, 1),
    "dapo": (512, 16, 16),
    "dppo": (256, 16, 8),
    "dr_grpo": (128, 8, 8),
    "entropy_advantage": (256, 8, 8),
    "entropy_bonus": (256, 8, 8),
    "gmpo": (128, 8, 8),
    "gpg": (1024, 5, 4),
    "grpo": (16, 64, 1),
    "gspo": (256, 16, 4),
    "high_entropy": (512, 16, 16),
    "icepop": (256, 16, 8),
    "kl_cov": (256, 8, 8),
    "off_policy_mask": (256, 8, 8),
    "ppo": (128, 64, 1),
    "ppo_entropy_advantage": (256, 8, 8),
    "ppo_kl_cov": (256, 8, 8),
    "sapo": (256, 16, 4),
    "steer": (512, 8, 16),
    "thermostat": (256, 8, 8),
    "tis": (256, 8, 8),
}
STARTS = {"quickstart", "gsm8k_lora", "mole_grpo"}  # no paper's setting
ENGINE = ["tis", "dppo", "icepop", "off_policy_mask"]  # read the engine's log-probs


def eight_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher announces and transformers finds, without starting any."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))


def test_every_recipe_of_a_paper_has_its_batches_in_the_table() -> None:
    assert BATCHES.keys() | STARTS == RECIPES.keys()


@pytest.mark.parametrize("name", sorted(STARTS))
def test_first_recipes_parse_on_one_process(name: str) -> None:
    _, args, model = parse(RECIPES[name])
    assert model.model_name_or_path
    assert args.updates_per_rollout > 1


@pytest.mark.parametrize("name", BATCHES)
def test_paper_recipes_have_the_papers_batches_on_eight_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eight_processes(monkeypatch)
    task, args, model = parse(RECIPES[name])
    prompts, completions, updates = BATCHES[name]
    assert (args.generation_batch_size, args.num_generations) == (prompts * completions, completions)
    per_update = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert args.updates_per_rollout == updates and per_update * updates == prompts * completions
    assert args.save_steps % updates == 0  # a resumed run starts with a new rollout
    assert f" = {per_update} completions per update" in RECIPES[name].read_text()
    assert args.output_dir == f"runs/{name}" and model.model_name_or_path
    assert (name in PPO) == ("recipes/ppo.py" in RECIPES[name].read_text())
    if task.schedule:
        assert total_steps(task.schedule, args.max_steps, updates) > 0


def test_any_field_is_a_flag() -> None:
    flags = ("--learning_rate", "3e-6", "--controls", '{"name": "kl_cov", "fraction": 0.01}')
    _, args, _ = parse(RECIPES["kl_cov"], *flags)
    assert args.learning_rate == 3e-6
    assert args.control_list == (KlCov(fraction=0.01),)


def check_trained(args: PolicyConfig, result: dict[str, Any]) -> None:
    """Two steps were taken, and whatever the run has tells of itself."""
    assert len(result["steps"]) == 2 and result["moved"] and result["finite"]
    areas = {control.name for control in args.control_list} | ({"thermostat"} if args.thermostat_config else set())
    areas |= {"critic", "advantage"} if isinstance(args, rlvr.PPOConfig) else set()
    for step in result["steps"]:
        told = {name for name in METRICS if name.partition("/")[0] in areas} - {
            "critic/kl_penalty"
        }  # of kl_reward_coef
        assert told <= step.keys()
        assert {f"{control.name}/effect" for control in args.control_list} <= step.keys()
        assert all(value == value for value in step.values())
    for name in ("optim/grad_norm", "critic/grad_norm") if isinstance(args, rlvr.PPOConfig) else ("optim/grad_norm",):
        assert any(step[name] > 0 for step in result["steps"])


@pytest.mark.parametrize("name", [name for name in BATCHES if name not in ENGINE])
def test_recipe_trains(name: str, tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path: Path) -> None:
    args = small_config(RECIPES[name], tmp_path, updates=BATCHES[name][2], vllm=False)
    assert args.updates_per_rollout == BATCHES[name][2]
    result = train(args, tiny_moe_dir if args.router_z_loss_coef else tiny_model_dir)
    check_trained(args, result)
    if args.router_z_loss_coef:
        assert result["steps"][-1]["policy/router_z_loss"] > 0


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("name", [ENGINE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINE[1:])])
def test_recipe_that_reads_the_engine_trains_on_it(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("recipe_run.py")
    run = subprocess.run(
        [sys.executable, str(script), str(RECIPES[name]), str(tiny_model_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    args = small_config(RECIPES[name], tmp_path, updates=BATCHES[name][2], vllm=True)
    check_trained(args, json.loads(run.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------ documents


def table(document: str, header: str) -> dict[str, str]:
    """The rows of a document's table of methods: the rest of each row by its first cell, without the groups' names."""
    lines = (ROOT / document).read_text().partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    rows = {line.split("|")[1].strip(): line.partition("|")[2].partition("|")[2] for line in lines}
    return {method: rest for method, rest in rows.items() if not method.startswith("**")}


def linked(rows: dict[str, str]) -> dict[str, str]:
    """The recipe of each method that has one."""
    found = {method: re.findall(r"recipes/(\w+)\.yaml", rest) for method, rest in rows.items()}
    assert all(len(names) <= 1 for names in found.values())
    return {method: names[0] for method, names in found.items() if names}


def test_readme_papers_and_recipes_name_the_same_methods() -> None:
    readme, papers = table("README.md", "| method | what it does"), table("PAPERS.md", "| method | paper")
    assert readme.keys() == papers.keys()
    assert linked(readme) == linked(papers)
    assert sorted(linked(readme).values()) == sorted(BATCHES.keys() | SUPERVISED)
    named = {name for rest in readme.values() for name in re.findall(r"`(\w+)`", rest)}
    assert CONTROLS.keys() | SURROGATES.keys() <= named
