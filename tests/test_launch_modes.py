"""Launches of several processes that would be one are refused in one line; all others are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlvr import GRPOConfig
from rlvr.errors import ConfigError
from rlvr.trainers.launch_modes import check_launch, check_offload

ROOT = Path(__file__).parents[1]
ASK = """
import os
from rlvr import GRPOConfig
from rlvr.errors import ConfigError
from rlvr.trainers.launch_modes import check_launch
try:
    check_launch(os.environ, has_accelerator=False)
    print("accepted", os.environ.get("WORLD_SIZE", "1"), flush=True)
except ConfigError as error:
    print("refused", error, flush=True)
"""
MULTI_CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: 2
mixed_precision: "no"
"""
PORT = ["--main_process_port", "0"]


def asked_by(tmp_path: Path, *flags: str) -> list[str]:
    """What each process of `accelerate launch` with these flags says."""
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("accepted", "refused"))]


@pytest.mark.parametrize(
    "flags",
    [
        ["--cpu", "--num_processes", "2"],
        ["MULTI_CPU"],
        pytest.param(["--num_processes", "2"], marks=pytest.mark.slow),
        pytest.param(["--config_file", "recipes/accelerate/zero2.yaml", "--cpu"], marks=pytest.mark.slow),
    ],
)
def test_a_launch_of_several_that_starts_one_is_refused(flags: list[str], tmp_path: Path) -> None:
    if flags == ["MULTI_CPU"]:
        (tmp_path / "multi_cpu.yaml").write_text(MULTI_CPU)
        flags = ["--config_file", str(tmp_path / "multi_cpu.yaml")]
    (told,) = asked_by(tmp_path, *flags)
    assert told.startswith("refused num_processes") and "recipes/accelerate/cpu2.yaml" in told


def test_fsdp_without_an_accelerator_is_refused_in_each_process(tmp_path: Path) -> None:
    told = asked_by(tmp_path, "--config_file", "recipes/accelerate/fsdp2.yaml", "--num_processes", "2", *PORT)
    assert len(told) == 2 and all("FSDP needs an accelerator" in line for line in told)


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        (["--cpu"], 1),
        (["--config_file", "recipes/accelerate/cpu2.yaml", *PORT], 2),
        *(
            pytest.param(["--config_file", f"recipes/accelerate/{name}.yaml", *flags], n, marks=pytest.mark.slow)
            for name, flags, n in (
                ("one_gpu", [], 1),
                ("ddp", ["--num_processes", "2", *PORT], 2),
                ("zero3", ["--num_processes", "2", *PORT], 2),
            )
        ),
    ],
)
def test_a_launch_that_starts_what_it_says_is_accepted(flags: list[str], processes: int, tmp_path: Path) -> None:
    assert asked_by(tmp_path, *flags) == [f"accepted {processes}"] * processes


def test_on_an_accelerator_fsdp_is_accepted_and_the_fix_is_another() -> None:
    check_launch({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, has_accelerator=True)
    with pytest.raises(ConfigError, match=r"ddp\.yaml"):
        check_launch({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}, has_accelerator=True)


@pytest.mark.parametrize("size", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpi_and_torchrun_are_accepted(size: str) -> None:
    check_launch({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", size: "2"}, has_accelerator=False)


def test_a_process_without_a_launcher_is_accepted() -> None:
    check_launch({"MASTER_ADDR": "127.0.0.1"}, has_accelerator=False)
    check_launch({}, has_accelerator=False)


def test_optimizers_that_offload_would_replace_are_refused() -> None:
    on_cpu = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for optim in ("sgd", "adamw_8bit"):
        with pytest.raises(ConfigError, match=f"optim='{optim}' becomes Adam"):
            check_offload(optim, on_cpu)
        check_offload(optim, {"stage": 2, "offload_optimizer": {"device": "none"}})
        check_offload(optim, {"stage": 3})
    check_offload("adamw_torch_fused", on_cpu)


@pytest.mark.slow
def test_accelerate_makes_adam_of_sgd() -> None:
    """When it no longer does, `check_offload` can go."""
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    given = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    assert isinstance(map_pytorch_optim_to_deepspeed(given), DeepSpeedCPUAdam)


def test_processes_of_srun_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"srun started 8 processes that do not know of each other"):
        check_launch({"SLURM_STEP_NUM_TASKS": "8"}, has_accelerator=True)
    check_launch({"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "8"}, has_accelerator=True)
    check_launch({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, has_accelerator=True)


def test_a_launch_of_another_precision_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"bf16=False, but the launch computes in bf16: add --mixed_precision no"):
        GRPOConfig(output_dir=str(tmp_path), bf16=False)
    GRPOConfig(output_dir=str(tmp_path), bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    GRPOConfig(output_dir=str(tmp_path), bf16=True)
