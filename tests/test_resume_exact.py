"""A run that is killed and resumed is, bit for bit, the run that was not: kill -9 at any moment, real processes, real
sampling.
"""

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import resume_run
import torch
from safetensors.torch import load_file

from rlvr.monitor.records import read_groups, read_prompts, read_run, read_steps, read_tokens, token_steps
from rlvr.trainers.checkpoints import ASIDE, complete_checkpoints

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["resume_run"])  # each run is a fork of a process that has only imported things

# Checkpoints fall within rollouts (of 4 steps, two passes of two), within epochs (of 20) and at their ends.
SETTINGS: dict[str, Any] = {
    "controls": [
        {"name": "clip_cov", "fraction": 0.1, "low": 0.01, "high": 50.0},
        {"name": "kl_cov", "fraction": 0.1},
    ],
    "thermostat": {"lever": "kl_cov.coef", "low": 1e-3, "high": 1e-2, "lowest": 0.0, "highest": 5.0},
    "surrogate": "unclipped",
    "num_iterations": 2,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 28,
    "save_steps": 5,
    "save_total_limit": 1,
}

MORE = [
    ("scoring", 3),
    ("accumulating", 27),
    ("weights written", 2),
    ("checkpoint written", 25),
    ("checkpoint named", 2),
    ("recording", 13),
]


def run(kind: str, model_dir: Path, out: Path, settings: dict[str, Any], *kill: Any) -> int:
    process = PROCESSES.Process(target=resume_run.train, args=(kind, str(model_dir), str(out), settings, *kill))
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("uninterrupted")
    for kind in ("grpo", "ppo"):
        assert run(kind, tiny_model_dir, out / kind, SETTINGS) == 0
    return {kind: out / kind for kind in ("grpo", "ppo")}


def recorded(out: Path) -> list[dict[str, Any]]:
    """All that was recorded of each step, but for times."""
    found = []
    for record in read_steps(out):
        metrics = {name: x for name, x in record["metrics"].items() if not name.startswith("time/")}
        found.append({**record, "time": None, "metrics": metrics})
    return found


def assert_same_run(out: Path, other: Path) -> None:
    for a, b in zip(recorded(out), recorded(other), strict=True):
        assert a == b
    assert read_groups(out) == read_groups(other) and read_prompts(out) == read_prompts(other)
    assert token_steps(out) == token_steps(other)
    for step in token_steps(out):
        assert read_tokens(out, step) == read_tokens(other, step)
    for path in Path(other, "model").rglob("*.safetensors"):
        mine, theirs = load_file(out / path.relative_to(other)), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, x in mine.items():
            assert torch.equal(x, theirs[name]), name


@pytest.mark.parametrize(
    ("moment", "at"),
    [
        ("generating", 23),
        ("scoring", 1),  # before there is a checkpoint
        ("accumulating", 45),  # a checkpoint at the end of an epoch
        ("before the optimizer steps", 27),  # one within a later epoch, and within a rollout
        ("optimizer written", 4),
        ("deleting an old one", 2),
        *(pytest.param(*kill, marks=pytest.mark.slow) for kill in MORE),
    ],
)
def test_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    moment: str, at: int, tiny_model_dir: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    assert run("grpo", tiny_model_dir, tmp_path, SETTINGS, moment, at) == -signal.SIGKILL
    stopped = len(read_steps(tmp_path))
    assert stopped < 28
    complete = complete_checkpoints(tmp_path)
    assert len(complete) >= min(1, stopped // 6)  # at most one that was being written is lost
    assert run("grpo", tiny_model_dir, tmp_path, SETTINGS) == 0
    assert [entry["step"] for entry in read_run(tmp_path)["resumed"]] == [
        int(complete[-1].name.partition("-")[2]) if complete else 0
    ]
    assert_same_run(tmp_path, uninterrupted["grpo"])


@pytest.mark.parametrize(
    ("moment", "at", "told"),
    [
        ("disk full for a checkpoint", 2, "'checkpoint-10' could not be written"),
        ("disk full for its optimizer", 3, "checkpoint-15"),
        ("disk full for records", 15, "steps.jsonl"),
    ],
)
def test_run_stops_on_a_full_disk_and_loses_nothing(
    moment: str, at: int, told: str, tiny_model_dir: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    assert run("grpo", tiny_model_dir, tmp_path, SETTINGS, moment, at) == 1
    steps = [record["step"] for record in read_steps(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 28
    assert not list(tmp_path.glob(f"{ASIDE}/*"))
    assert sorted(tmp_path.glob("checkpoint-*")) == sorted(complete_checkpoints(tmp_path))
    assert run("grpo", tiny_model_dir, tmp_path, SETTINGS) == 0
    assert_same_run(tmp_path, uninterrupted["grpo"])


def test_run_killed_again_and_again_is_the_same(
    tiny_model_dir: Path, tmp_path: Path, uninterrupted: dict[str, Path]
) -> None:
    kills = [("accumulating", 14), ("optimizer written", 1), ("generating", 9), ("deleting an old one", 1)]
    for kill in kills:
        assert run("ppo", tiny_model_dir, tmp_path, SETTINGS, *kill) == -signal.SIGKILL
    assert run("ppo", tiny_model_dir, tmp_path, SETTINGS) == 0
    assert len(read_run(tmp_path)["resumed"]) == len(kills)
    assert_same_run(tmp_path, uninterrupted["ppo"])


@pytest.mark.slow
def test_run_with_vllm_goes_on_as_if_it_had_not_been_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Up to rounding: what was cached when a completion was sampled is another's prompt."""
    pytest.importorskip("vllm")
    settings = {**SETTINGS, "use_vllm": True, "vllm_max_model_length": 64, "save_steps": 6}
    assert run("grpo", tiny_model_dir, tmp_path / "whole", settings) == 0
    assert run("grpo", tiny_model_dir, tmp_path / "killed", settings, "scoring", 5) == -signal.SIGKILL
    assert run("grpo", tiny_model_dir, tmp_path / "killed", settings) == 0
    for a, b in zip(recorded(tmp_path / "killed"), recorded(tmp_path / "whole"), strict=True):
        assert a["step"] == b["step"] and a["tokens"] == b["tokens"]
        for name in ("entropy/mean", "policy/loss", "reward/mean", "thermostat/value", "clip_cov/masked"):
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-4, abs=1e-6), name
