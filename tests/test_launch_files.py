"""Every launch file is what accelerate and DeepSpeed read, and those that can train on a CPU do, in two processes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import docs_cases
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from test_ranks_training import trained_from
from test_recipes import eight_processes

from rlvr.errors import ConfigError
from rlvr.planning.memory import SEVERAL, SINGLE
from rlvr.trainers.config import GRPOConfig

ROOT = Path(__file__).parents[1]
YAMLS = {path.stem: path for path in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
JSONS = {path.stem: path for path in sorted((ROOT / "recipes" / "deepspeed").glob("*.json"))}
MACHINES = {name: 2 if name.endswith("_2x8") else 1 for name in YAMLS}


def launcher_arguments(name: str, *flags: str) -> Any:
    """What `accelerate launch` makes of the file."""
    given = ["--config_file", str(YAMLS[name]), "--main_process_port", "0", *flags, "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    arguments.deepspeed_fields_from_accelerate_config = ""
    return arguments


def plugin(name: str, monkeypatch: pytest.MonkeyPatch) -> DeepSpeedPlugin:
    """What the file makes of DeepSpeed in a launched process."""
    _, env = prepare_deepspeed_cmd_env(launcher_arguments(name, "--main_process_ip", "127.0.0.1"))
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    return DeepSpeedPlugin()


def test_there_is_a_file_for_each_launch_that_a_plan_names() -> None:
    assert {*SINGLE, *SEVERAL, "cpu2", "ddp_2x8", "zero3_2x8"} == YAMLS.keys()
    assert {name for name in YAMLS if name.startswith("zero") and MACHINES[name] == 1} == JSONS.keys()


@pytest.mark.parametrize("name", YAMLS)
def test_launch_file_starts_the_processes_it_says(name: str) -> None:
    arguments = launcher_arguments(name, "--main_process_ip", "127.0.0.1", "--machine_rank", "0")
    processes = {"one_gpu": 1, "cpu2": 2}.get(name, 8 * MACHINES[name])
    assert (arguments.num_machines, arguments.num_processes) == (MACHINES[name], processes)
    assert arguments.use_deepspeed is name.startswith("zero")
    assert arguments.use_fsdp is (name == "fsdp2")
    assert arguments.multi_gpu is (name.startswith("ddp") or name == "cpu2")
    assert arguments.mixed_precision == ("no" if name == "cpu2" else "bf16")
    if MACHINES[name] == 2 and arguments.use_deepspeed:
        assert arguments.deepspeed_multinode_launcher == "standard"


def test_fsdp2_is_version_2_and_leaves_checkpointing_to_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    env = prepare_multi_gpu_env(launcher_arguments("fsdp2"))
    for key in env:
        monkeypatch.setenv(key, env[key])
    made = FullyShardedDataParallelPlugin()
    assert made.fsdp_version == 2 and made.reshard_after_forward is True and not made.activation_checkpointing
    assert made.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", JSONS)
def test_accelerate_and_deepspeed_files_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = json.loads(JSONS[name].read_text()), plugin(name, monkeypatch).deepspeed_config
    stage = ours["zero_optimization"]["stage"]
    neutral = {"offload_optimizer": "none", "offload_param": "none"}
    for key, none in neutral.items():
        assert (
            ours["zero_optimization"].get(key, {"device": none})["device"]
            == theirs["zero_optimization"][key]["device"]
        )
    assert theirs["zero_optimization"]["stage"] == stage == int(name[4])
    for key in ("gradient_clipping", "train_batch_size", "gradient_accumulation_steps"):
        assert ours[key] == theirs[key] == "auto"
    if stage == 3:  # or checkpoints have no weights
        key = "stage3_gather_16bit_weights_on_model_save"
        assert ours["zero_optimization"][key] is theirs["zero_optimization"][key] is True


@pytest.mark.parametrize("name", JSONS)
def test_deepspeed_file_is_filled_in_by_transformers_and_read_by_deepspeed(name: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    args = GRPOConfig(output_dir=str(tmp_path), deepspeed=str(JSONS[name]), report_to="none", bf16=True)
    args.hf_deepspeed_config.trainer_config_finalize(args, torch.nn.Linear(1, 1), 10)
    filled = args.hf_deepspeed_config.config
    assert "auto" not in json.dumps(filled)
    read = DeepSpeedConfig(filled)
    assert read.zero_config.stage == int(name[4]) and read.bfloat16_config.enabled
    offload = read.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") is name.endswith("_offload")
    assert read.zero_config.gather_16bit_weights_on_model_save is (name[4] == "3")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def train(model_dir: Path, out: Path, size: int, *launches: list[str]) -> torch.Tensor:
    """Weights after a run of tests/ranks_run.py. launches: flags of accelerate, one list for each machine."""
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    settings["optim"] = "adamw_torch"  # offload makes Adam of others
    script = [str(ROOT / "tests" / "ranks_run.py"), str(model_dir), str(out), json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/tests"}
    port = free_port()
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", port]
    machines = [
        subprocess.Popen(
            [sys.executable, *([*launcher, *flags] if flags else []), *script],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=env,
        )
        for flags in launches
    ]
    try:
        told = [machine.communicate(timeout=280)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert all(machine.returncode == 0 for machine in machines), "\n".join(text[-3000:] for text in told)
    weights: torch.Tensor = torch.load(out / "result.pt")["weights"]
    return weights


TWO = ["--num_processes", "2", "--mixed_precision", "no"]
LAUNCHES = {
    **{name: [["--config_file", str(YAMLS[name]), *TWO]] for name in ("ddp", "zero2_offload", "zero3_offload")},
    **{
        name: [
            ["--config_file", str(YAMLS[name]), *TWO, "--main_process_ip", "127.0.0.1", "--machine_rank", rank]
            for rank in ("0", "1")
        ]
        for name in ("ddp_2x8", "zero3_2x8")
    },
    **{
        f"{name}.json": [["--use_deepspeed", "--deepspeed_config_file", str(path), "--num_processes", "2"]]
        for name, path in JSONS.items()
    },
}


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Weights of a run in one process."""
    return train(tiny_model_dir, tmp_path_factory.mktemp("alone"), 16, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_trains_what_one_process_does(
    name: str, alone: torch.Tensor, tiny_model_dir: Path, tmp_path: Path
) -> None:
    two = train(tiny_model_dir, tmp_path / "two", 8, *LAUNCHES[name])
    moved = (alone - trained_from(tiny_model_dir)).norm()
    assert moved > 0
    assert (alone - two).norm() < 1e-4 * moved


def launch_lines() -> list[str]:
    """`accelerate launch` lines of the documentation, pages that are made of data included, each in one piece."""
    lines = []
    paths = (ROOT / "docs" / "scaling.md", ROOT / "README.md", *YAMLS.values())
    for text in [*(path.read_text() for path in paths), *docs_cases.GENERATED.values()]:
        lines += re.findall(r"^\W*(accelerate launch .*)$", text.replace("\\\n", " "), re.MULTILINE)
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", launch_lines())
def test_documented_launch_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings are, too, by a process that computes in the launch file's precision."""
    monkeypatch.chdir(ROOT)
    if re.search(r"accelerate/(zero|ddp)", line) and "--num_processes" not in line and "RECIPE" not in line:
        eight_processes(monkeypatch)
    words = docs_cases.words_of(line)
    docs_cases.accelerate([*words[1:], *([] if "--config" in words else ["--config", "recipes/gsm8k_lora.yaml"])])


def test_launch_in_another_precision_than_the_recipe_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launched = "--config_file recipes/accelerate/one_gpu.yaml recipes/grpo.py --config recipes/mole_grpo.yaml"
    with pytest.raises(ConfigError, match="the launch computes in bf16"):
        docs_cases.check(f"accelerate launch {launched}")
