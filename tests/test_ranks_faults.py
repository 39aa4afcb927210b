"""Two processes (gloo): one of them is killed, or meets a NaN. The others do not go on alone."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ranks_training import LAUNCHES, start_script
from test_resume_exact import SETTINGS, assert_same_run

from rlvr.monitor.records import read_run, read_steps

WHERE = [pytest.param(name, marks=[] if name == "ddp" else pytest.mark.slow) for name in LAUNCHES]


def run(launched: str, model_dir: Path, out: Path, settings: dict[str, Any], *moment: Any) -> int:
    """Exit status of the launcher, which has to come to an end by itself."""
    arguments = ("grpo", str(model_dir), str(out), json.dumps(settings), "1", *map(str, moment or ("", 0)))
    process = start_script("resume_run.py", launched, *arguments)
    try:
        _, errors = process.communicate(timeout=240)
        sys.stderr.write(errors[-4000:])  # shown where a test fails
    finally:
        process.kill()
    return process.returncode


@pytest.mark.parametrize("launched", WHERE)
def test_ranks_of_which_one_is_killed_stop_and_go_on_as_if_they_had_not(
    launched: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "max_steps": 24, "save_steps": 5, "per_device_train_batch_size": 2}
    assert run(launched, tiny_model_dir, tmp_path / "whole", settings) == 0
    began = time.monotonic()
    assert run(launched, tiny_model_dir, tmp_path / "killed", settings, "accumulating", 45) != 0
    assert time.monotonic() - began < 240
    assert len(read_steps(tmp_path / "killed")) < 24 and not alive(tmp_path / "killed")
    assert run(launched, tiny_model_dir, tmp_path / "killed", settings) == 0
    assert len(read_run(tmp_path / "killed")["resumed"]) == 1
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def alive(out: Path) -> list[int]:
    """Processes that were started for a run and are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(out).encode() in command:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("launched", WHERE)
def test_ranks_skip_a_step_that_is_not_finite_on_one_of_them(
    launched: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 3, "save_steps": 1, "weight_decay": 0.1}
    assert run(launched, tiny_model_dir, tmp_path, settings, "poison", 2) == 0
    assert [record["metrics"]["optim/skipped"] for record in read_steps(tmp_path)] == [0, 1, 0]
    weights = [load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (1, 2, 3)]
    for name, x in weights[0].items():
        assert torch.equal(x, weights[1][name]) and weights[2][name].isfinite().all(), name
    assert any(not torch.equal(x, weights[2][name]) for name, x in weights[0].items())
    assert len(list((tmp_path / "skipped").glob("step-000002-rank-[01].safetensors"))) == 2


@pytest.mark.parametrize("launched", WHERE)
def test_ranks_whose_run_is_over_load_it_and_save_it_again(
    launched: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "save_steps": 2}
    assert run(launched, tiny_model_dir, tmp_path, settings) == 0
    saved = tmp_path / "model/model.safetensors"
    before = load_file(saved)
    saved.unlink()
    assert run(launched, tiny_model_dir, tmp_path, settings) == 0
    assert len(read_steps(tmp_path)) == 2 and read_run(tmp_path)["status"] == "finished"
    for name, x in load_file(saved).items():
        assert torch.equal(x, before[name]), name


def test_ranks_that_load_the_best_checkpoint_hold_one_policy(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Which is not the newest."""
    settings = {"max_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
    settings |= {"load_best_model_at_end": True, "per_device_eval_batch_size": 2}
    assert run("ddp", tiny_model_dir, tmp_path, settings) == 0
    best, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-1", "model"))
    for name, x in best.items():
        assert torch.equal(x, exported[name]), name
    sums = [torch.load(tmp_path / f"sum-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*sums)
