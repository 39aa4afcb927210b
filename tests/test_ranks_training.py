"""One process and two (gloo) train the same model, with every control that acts on a whole rollout or step at once:
whole copies of the model, and weights that ZeRO-3 shards.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr.monitor.records import read_groups, read_prompts, read_steps

ROOT = Path(__file__).parents[1]
CONTROLS = [
    {"name": "clip_cov", "fraction": 0.1, "low": 0.1, "high": 50.0},
    {"name": "kl_cov", "fraction": 0.1},
    {"name": "steer", "form": "full", "min_weight": 0.5},
    {"name": "clip_b", "mu": 0.2},
    {"name": "clip_v", "mu": 0.2, "max_fraction": 0.05},
    {"name": "high_entropy", "fraction": 0.8},
    {"name": "entropy_advantage"},
    {"name": "entropy_bonus", "coef": 0.01},
    {"name": "token_budget", "tokens": 40},
]
TOLD = (
    "clip_cov/masked",
    "kl_cov/selected",
    "clip_b/masked",
    "clip_v/masked",
    "steer/changed",
    "high_entropy/masked",
    "token_budget/kept",
    "policy/tokens",
)
MEASURED = (
    "policy/loss",
    "entropy/mean",
    "optim/grad_norm",
    "policy/weight",
    "covariance/mean",
    "thermostat/value",
)


# Two processes on a CPU, from recipes that are made for more.
LAUNCHES = {
    "ddp": ["--config_file", "recipes/accelerate/cpu2.yaml"],
    "zero2": ["--config_file", "recipes/accelerate/zero2.yaml", "--num_processes", "2", "--mixed_precision", "no"],
    "zero3": ["--config_file", "recipes/accelerate/zero3.yaml", "--num_processes", "2", "--mixed_precision", "no"],
}


def start_script(name: str, launched: str | None, *arguments: str) -> "subprocess.Popen[str]":
    """A script of this folder. launched: of LAUNCHES, None for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", str(port), *LAUNCHES.get(launched or "", [])]
    return subprocess.Popen(
        [sys.executable, *(launch if launched else []), str(ROOT / "tests" / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/tests"},
    )


def run_script(name: str, launched: str | None, *arguments: str) -> None:
    """The same, to its end."""
    process = start_script(name, launched, *arguments)
    try:
        _, errors = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]


def run(launched: str | None, model_dir: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """What the run measured and trained."""
    run_script("ranks_run.py", launched, str(model_dir), str(out), json.dumps(settings))
    return torch.load(out / "result.pt")


@pytest.mark.parametrize("launched", LAUNCHES)
def test_two_processes_train_what_one_does(launched: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {
        "controls": CONTROLS,
        "surrogate": "unclipped",
        "thermostat": {"lever": "kl_cov.coef", "low": 1e-3, "high": 1e-2, "lowest": 0.0, "highest": 5.0},
        "num_iterations": 2,
        "learning_rate": 0.05,
        "gradient_accumulation_steps": 1,
    }
    one = run(None, tiny_model_dir, tmp_path / "one", per_device_train_batch_size=16, probe_sequences=16, **settings)
    two = run(launched, tiny_model_dir, tmp_path / "two", per_device_train_batch_size=8, probe_sequences=8, **settings)
    assert len(one["history"]) == len(two["history"]) == 4
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in TOLD:
            assert a[name] == pytest.approx(b[name], abs=1e-12), name
        assert a["policy/tokens"] <= 40
        for name in MEASURED:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-7), name
        for name in ("dynamics/measured", "dynamics/predicted"):  # differences of entropies of 5, in float32
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    for name in TOLD:
        assert any(entry[name] > 0 for entry in one["history"]), name
    a, b = (read_steps(tmp_path / name) for name in ("one", "two"))
    assert [step["histograms"] for step in a] == [step["histograms"] for step in b]
    assert a[0]["histograms"].keys() == {"entropy", "covariance", "advantage", "weight"}
    for step in a:
        trained = [sum(step["histograms"][name]) for name in ("covariance", "advantage")]
        assert trained == [step["metrics"]["policy/tokens"]] * 2
        all_tokens = [sum(step["histograms"][name]) for name in ("entropy", "weight")]
        assert all_tokens == [step["metrics"]["rollout/tokens"]] * 2
    for read in (read_groups, read_prompts):
        assert read(tmp_path / "one") == read(tmp_path / "two") != []
    start = trained_from(tiny_model_dir)
    moved = (one["weights"] - start).norm()
    assert moved > 0
    assert (one["weights"] - two["weights"]).norm() < 1e-4 * moved


def trained_from(model_dir: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])
