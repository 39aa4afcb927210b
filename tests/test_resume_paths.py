"""Small parts of the trainers that need no trainer: checkpoints, held-out reward, the clock, one process."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rlvr.errors import ConfigError
from rlvr.trainers.clock import PhaseClock
from rlvr.trainers.distributed import AcceleratorReduce, reduce_means
from rlvr.trainers.heldout import heldout_reward
from rlvr.trainers.resume import checkpoint_step, resolve_checkpoint
from rlvr.types import Mean


def checkpoint(output_dir: Path, step: int) -> str:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return str(path)


@pytest.mark.parametrize("requested", (None, False, "false", "False"))
def test_resolve_checkpoint_starts_anew_when_not_asked(requested: str | bool | None, tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    assert resolve_checkpoint(str(tmp_path), requested) is None


@pytest.mark.parametrize("requested", (True, "true", "True", "latest", "last"))
def test_resolve_checkpoint_takes_the_newest_by_number(requested: str | bool, tmp_path: Path) -> None:
    for step in (100, 20, 9):
        checkpoint(tmp_path, step)
    newest = resolve_checkpoint(str(tmp_path), requested)
    assert newest == str(tmp_path / "checkpoint-100")
    assert checkpoint_step(newest) == 100


def test_resolve_checkpoint_takes_the_one_that_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "another run", 7)
    assert resolve_checkpoint(str(tmp_path), path) == path
    assert checkpoint_step(path) == 7


def test_resolve_checkpoint_refuses_what_is_not_there(tmp_path: Path) -> None:
    for output_dir in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"resume_from_checkpoint: output_dir='.*' holds no complete checkpoint"):
            resolve_checkpoint(str(output_dir), "latest")
    for requested in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ConfigError, match=r"is not a complete checkpoint: it has no trainer_state\.json"
        ) as raised:
            resolve_checkpoint(str(tmp_path), str(requested))
        assert str(requested) in str(raised.value) and "\n" not in str(raised.value)


def test_resolve_checkpoint_passes_over_one_that_a_kill_tore(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"weights, but no trainer state yet")
    assert resolve_checkpoint(str(tmp_path), "latest") == str(tmp_path / "checkpoint-4")


def test_resolve_checkpoint_never_mixes_two_runs(tmp_path: Path) -> None:
    early, _ = checkpoint(tmp_path / "a", 50), checkpoint(tmp_path / "a", 100)
    with pytest.raises(ConfigError, match=r"also holds checkpoint-100 of the run you would leave"):
        resolve_checkpoint(str(tmp_path / "a"), early)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is of another run than output_dir"):
        resolve_checkpoint(str(tmp_path / "b"), early)


def test_heldout_reward_is_a_mean_over_prompts() -> None:
    # Prompts 0.5, 1, 0, 0.5: mean 0.5; deviations 0, .5, -.5, 0 give std sqrt(0.5 / 3); 1.96 std / sqrt(4).
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    held = heldout_reward(rewards, 2)
    assert held["heldout/reward"] == 0.5
    assert held["heldout/reward_ci95"] == pytest.approx(1.96 * math.sqrt(0.5 / 3) / 2, abs=1e-12)
    one_sample = heldout_reward(rewards, 1)  # 4 of 8; variance 8 * 0.25 / 7
    assert one_sample["heldout/reward_ci95"] == pytest.approx(1.96 * math.sqrt(2 / 7 / 8), abs=1e-12)


def test_heldout_reward_leaves_out_what_could_not_be_scored() -> None:
    nan = math.nan
    # Prompts: 1 (one sample of two), none, 0.5: mean 0.75 over two prompts, std sqrt(0.125).
    held = heldout_reward(torch.tensor([1.0, nan, nan, nan, 1.0, 0.0]), 2)
    assert held["heldout/reward"] == 0.75
    assert held["heldout/reward_ci95"] == pytest.approx(1.96 * math.sqrt(0.125 / 2), abs=1e-12)


def test_heldout_reward_says_nan_when_it_does_not_know() -> None:
    nothing = heldout_reward(torch.tensor([math.nan, math.nan]), 1)
    assert all(math.isnan(x) for x in nothing.values())
    assert all(math.isnan(x) for x in heldout_reward(torch.zeros(0), 4).values())
    one_prompt = heldout_reward(torch.tensor([1.0, 0.0]), 2)
    assert one_prompt["heldout/reward"] == 0.5 and math.isnan(one_prompt["heldout/reward_ci95"])


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that moves only when told how many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    return passing


def test_phase_clock_gives_each_second_to_the_innermost_phase(passing: Callable[[float], None]) -> None:
    clock = PhaseClock()
    passing(64)  # of no phase
    with clock.phase("update"):
        passing(1)
        with clock.phase("rollout"):
            passing(2)
            with clock.phase("sync"):
                passing(4)
            passing(8)
        passing(16)
        with clock.phase("rollout"):
            passing(32)
    passing(64)
    assert clock.take() == {"update": 17, "rollout": 42, "sync": 4}
    assert clock.take() == {}


def test_phase_clock_may_be_read_inside_a_phase(passing: Callable[[float], None]) -> None:
    clock = PhaseClock()
    with clock.phase("update"):
        passing(1)
        assert clock.take() == {"update": 1}
        passing(2)
    assert clock.take() == {"update": 2}


def test_phase_clock_charges_a_phase_that_raises(passing: Callable[[float], None]) -> None:
    clock = PhaseClock()

    def fail(seconds: float) -> None:
        passing(seconds)
        raise KeyError("why")

    with clock.phase("update"):
        with pytest.raises(KeyError, match="why"):
            clock.timed("verify", fail)(3)
        passing(1)
    assert clock.take() == {"verify": 3, "update": 1}
    assert clock.timed("verify", lambda x, y=0: x - y)(7, y=2) == 5


def test_accelerator_reduce_of_one_process_is_the_identity() -> None:
    accelerator = Accelerator()
    reduce = AcceleratorReduce(accelerator)
    for x in (torch.tensor([[1.5, 2.0], [3.0, 4.0]]), torch.arange(3), torch.zeros(0, 2)):
        assert torch.equal(reduce.gather(x), x)
        assert torch.equal(reduce.sum(x), x)
    means = {"b/x": Mean.of(torch.tensor([1.0, 2.0])), "a/y": Mean.of(torch.tensor([True, False, False, True]))}
    assert {k: m.value() for k, m in reduce_means(means, accelerator).items()} == {"a/y": 0.5, "b/x": 1.5}
    assert reduce_means({}, accelerator) == {}
