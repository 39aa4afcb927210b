"""Two real processes (gloo): one run, global selection, every record once."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlvr.monitor.records import read_evals, read_run, read_steps

ROOT = Path(__file__).parents[1]


def launch(settings: dict[str, Any], folder: Path) -> tuple[int, str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    command += ["--config_file", str(ROOT / "recipes/accelerate/cpu2.yaml"), str(ROOT / "recipes/grpo.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [*command, "--config", str(recipe)], capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("use_vllm", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["transformers", "vllm"])
def test_two_processes_make_one_run(use_vllm: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = {
        "model_name_or_path": str(tiny_model_dir),
        "dtype": "float32",
        "task": "chain_sum",
        "task_kwargs": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "reward": "toy_verifiers:share_of_ascii",
        "train_size": 40,
        "heldout_size": 6,
        "verifier_workers": 1,
        "output_dir": str(tmp_path / "run"),
        "use_vllm": use_vllm,
        "vllm_max_model_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "num_generations_eval": 2,
        "max_completion_length": 8,
        "num_iterations": 2,
        "max_steps": 4,
        "learning_rate": 1.0e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "controls": [{"name": "kl_cov", "fraction": 0.05}],
    }
    code, log = launch(settings, tmp_path)
    assert code == 0, log[-4000:]
    out = tmp_path / "run"
    assert "2 process(es) x 2 micro-batches x 4" in log
    steps = read_steps(out)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        metrics = step["metrics"]
        tokens = metrics["policy/tokens"]
        assert 16 <= tokens <= 16 * 8
        # One selection over both processes: int(fraction * all tokens), not one per process or micro-batch.
        assert round(metrics["kl_cov/selected"] * tokens) == max(1, int(0.05 * tokens))
    evals = read_evals(out)
    assert [record["step"] for record in evals] == [0, 4]
    assert all(record["prompts"] == 6 for record in evals)
    assert read_run(out)["status"] == "finished"
