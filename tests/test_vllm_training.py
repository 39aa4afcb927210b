"""Training on the real vLLM: engine and trainer agree at every step, and a stale engine stops the run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.mark.parametrize("method", ["full", "lora", "mole", "ppo"])
def test_vllm_rollouts_stay_in_step_with_the_trainer_and_stale_weights_stop_it(
    method: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("vllm_run.py")
    run = subprocess.run(
        [sys.executable, str(script), str(tiny_model_dir), str(tmp_path / "run"), method],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["steps"]) == 6
    for metrics in result["steps"]:
        assert metrics["mismatch/abs_logp_max"] < 1e-3
        assert metrics["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        if method == "mole":  # its experts act in the engine, exactly
            assert metrics["mismatch/abs_logp_max"] < 1e-5 and 0 < metrics["router/soft"] < 1
    rewards = [metrics["reward/mean"] for metrics in result["steps"]]
    assert rewards[-1] > rewards[0] + 0.02  # the weights that vLLM samples from do change
    assert "stale weights" in result["error"] and "\n" not in result["error"]
    assert result["stopped_at"] <= 3  # the first rollout is in step, the second is not
