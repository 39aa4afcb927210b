"""One process and two (gloo) train the same policy and critic: whole copies, and what ZeRO-2 and ZeRO-3 shard; a run
that was stopped goes on with both.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import flat
from test_ranks_training import TOLD, run_script
from transformers import AutoModelForTokenClassification

Results = dict[str, dict[str, Any]]
CONTROLS = [
    {"name": "clip_cov", "fraction": 0.1, "low": 0.1, "high": 50.0},
    {"name": "kl_cov", "fraction": 0.1},
    {"name": "entropy_advantage"},
    {"name": "entropy_bonus", "coef": 0.01},
    {"name": "token_budget", "tokens": 40},
]
MEASURED = {
    "policy/loss",
    "entropy/mean",
    "optim/grad_norm",
    "covariance/mean",
    "critic/loss",
    "critic/clipped",
    "critic/value",
    "critic/earned",
    "critic/explained_variance",
    "critic/grad_norm",
    "advantage/std",
    "advantage/p05",
    "router/entropy",
    "router/soft",
    "router/load_max",
}
COMMON = {"num_iterations": 2, "lam": 0.9, "cliprange_value": 0.05, "learning_rate": 0.05}
# The balance of experts is a product of means, a micro-batch's: two processes have other ones than one.
EXPERTS = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "num_experts": 4,
    "router": {"name": "dynmole", "entropy_coef": 0.0, "balance_coef": 0.0},
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}
RUNS: dict[str, dict[str, Any]] = {
    "own": {**COMMON, "controls": CONTROLS, "surrogate": "unclipped"},
    "shared": {**COMMON, "critic": "shared", "vf_coef": 1.0},
    "experts": {**COMMON, "mole": EXPERTS},
    "warm-up": {**COMMON, "critic_warmup_steps": 2, "kl_reward_coef": 0.1, "gradient_accumulation_steps": 2},
}
# What must not be 0 throughout, or nothing was compared.
ACTED = {
    "own": ("clip_cov/masked", "kl_cov/selected", "token_budget/kept"),
    "experts": ("router/entropy", "router/soft"),
}
LAUNCHES = ("ddp", "zero2", "zero3")


def run(launched: str | None, model_dir: Path, out: Path, runs: dict[str, dict[str, Any]]) -> Results:
    """What each run measured and trained, 16 completions per rollout; launched: None for one process."""
    sized = {}
    for name, settings in runs.items():
        processes, micro_batches = 2 if launched else 1, settings.get("gradient_accumulation_steps", 1)
        sized[name] = {"per_device_train_batch_size": 16 // processes // micro_batches, **settings}
    out.mkdir(exist_ok=True)
    run_script("ranks_ppo_run.py", launched, str(model_dir), str(out), json.dumps(sized))
    return {name: torch.load(out / name / "result.pt") for name in runs}


@pytest.fixture(scope="module")
def by_one(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(None, tiny_model_dir, tmp_path_factory.mktemp("one"), RUNS)


@pytest.mark.parametrize("launched", LAUNCHES)
def test_two_processes_train_the_policy_and_critic_of_one(
    launched: str, by_one: Results, tiny_model_dir: Path, tmp_path: Path
) -> None:
    by_two = run(launched, tiny_model_dir, tmp_path, RUNS)
    for name in RUNS:
        one, two = by_one[name], by_two[name]
        assert len(one["history"]) == len(two["history"]) == 4
        for a, b in zip(one["history"], two["history"], strict=True):
            assert a.keys() - {"grad_norm"} == b.keys() - {"grad_norm"}  # in a warm-up DeepSpeed has none
            for metric in a.keys() & TOLD:
                assert a[metric] == pytest.approx(b[metric], abs=1e-12), (name, metric)
            for metric in a.keys() & MEASURED:
                assert a[metric] == pytest.approx(b[metric], rel=2e-4, abs=1e-6), (name, metric)
        assert any(entry["critic/clipped"] > 0 for entry in one["history"])
        told = {metric for entry in one["history"] for metric, value in entry.items() if value}
        assert told >= {"critic/loss", "entropy/mean", "advantage/std", *ACTED.get(name, ())}
        for part in ("policy", "critic"):
            moved = (one[part] - one["start"][part]).norm()
            assert moved > 0
            assert (one[part] - two[part]).norm() < 1e-4 * moved, (name, part)


@pytest.mark.parametrize("launched", LAUNCHES)
def test_a_run_of_two_processes_goes_on_with_policy_and_critic(
    launched: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, of momentum, too; and what it saved is an ordinary model."""
    whole = {**COMMON, "optim": "adamw_torch", "learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    whole |= {"save_strategy": "steps", "save_steps": 2}
    runs = {
        "whole": whole,
        "resumed": {**whole, "resume_from_checkpoint": str(tmp_path / "whole/checkpoint-2")},
    }
    found = run(launched, tiny_model_dir, tmp_path, runs)
    whole_run, resumed = found["whole"], found["resumed"]
    for part in ("policy", "critic"):
        assert torch.equal(whole_run[part], resumed[part])
    assert [entry["step"] for entry in resumed["history"]] == [1, 2, 3, 4]
    for a, b in zip(whole_run["history"], resumed["history"], strict=True):
        assert {k: x for k, x in a.items() if "time" not in k} == {k: x for k, x in b.items() if "time" not in k}
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path / "resumed/final/critic")
    assert torch.equal(flat(saved), resumed["critic"])
