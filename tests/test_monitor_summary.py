"""What the summary makes of a run, on a synthetic run that looks like a real one."""

import math
from pathlib import Path

import numpy as np
import pytest

from rlvr.errors import ConfigError
from rlvr.monitor import Recorder, format_summary, summarize


def synthetic_run(run_dir: Path, num_steps: int = 160, seed: int = 0) -> Path:
    """A run that looks like Clip-Cov on a small model: two updates per rollout, entropy falls, reward rises."""
    rng = np.random.default_rng(seed)
    config = {"model": "tiny", "learning_rate": 1e-6, "controls": [{"name": "clip_cov", "fraction": 2e-4}]}
    recorder = Recorder(run_dir, config | {"hub_token": "hf_abc", "nested": {"beta": float("inf")}})
    recorder.record_eval(0, {"heldout/reward": 0.22, "heldout/reward_ci95": 0.036}, {"prompts": 500})
    for step in range(1, num_steps + 1):
        recorder.record_step(step, synthetic_step(rng, step, num_steps))
        if step % max(1, num_steps // 4) == 0:
            reward = 0.22 + 0.3 * (1 - math.exp(-3 * step / num_steps))
            recorder.record_eval(step, {"heldout/reward": reward, "heldout/reward_ci95": 0.04})
    recorder.finish()
    return run_dir


def synthetic_step(rng: np.random.Generator, step: int, num_steps: int) -> dict[str, float]:
    progress, rollout = step / num_steps, step % 2 == 1
    tokens = int(rng.integers(50_000, 70_000))
    gap = 0.012 * math.exp(0.2 * rng.normal())
    values = {
        "policy/loss": rng.normal(0, 0.01),
        "policy/ratio": rng.normal(1, 0.002),
        "policy/kl_old": 0.002 * math.exp(0.3 * rng.normal()),
        "policy/tokens": tokens,
        "entropy/mean": 0.25 + 0.75 * math.exp(-4 * progress) + rng.normal(0, 0.02),
        "clip/low": 0.001 * math.exp(0.4 * rng.normal()) * (not rollout),
        "clip/high": 0.002 * math.exp(0.4 * rng.normal()) * (not rollout),
        "clip_cov/masked": 2e-4,
        "clip_cov/candidates": 0.004 * math.exp(0.2 * rng.normal()),
        "clip_cov/cov": 0.01 * math.exp(-3 * progress),
        "kl_cov/selected": 2e-3,
        "optim/learning_rate": 1e-6,
        "optim/grad_norm": 0.2 * math.exp(0.2 * rng.normal()),
        "time/update": 21 + rng.normal(),
        "time/step": 22.5 + rng.normal() * 0.1 + 50 * rollout,
    }
    if rollout:
        values |= {
            "reward/mean": 0.2 + 0.35 * (1 - math.exp(-3 * progress)) + rng.normal(0, 0.03),
            "reward/std": 0.4,
            "reward/zero_variance_groups": 0.3 + 0.2 * progress,
            "reward/verifier_timeouts": 0.002 * (rng.random() < 0.3),
            "reward/verifier_errors": 0.0,
            "reward/unscored": 0.0,
            "rollout/tokens": 2 * tokens,
            "rollout/completion_length": 480 + 200 * progress,
            "rollout/truncated": 0.02,
            "mismatch/abs_logp_mean": gap,
            "mismatch/abs_logp_max": 40 * gap,
            "mismatch/kl": gap**2,
            "mismatch/ratio_mean": rng.normal(1, 0.001),
            "mismatch/ratio_min": math.exp(-40 * gap),
            "mismatch/ratio_max": math.exp(30 * gap),
            "time/rollout": 38 + rng.normal(),
            "time/sync_weights": 1.8,
            "time/old_logps": 7 + 0.2 * rng.normal(),
            "time/verify": 2.0 * math.exp(0.5 * rng.normal()),
        }
    return values


# summary


def test_summary_numbers_by_hand(tmp_path):
    recorder = Recorder(tmp_path)
    rows = [  # tokens, entropy, masked, rollout tokens, rollout s, update s, step s
        (100, 1.0, 0.1, 400, 4.0, 5.0, 10.0),
        (300, 0.4, 0.3, 0, 0.0, 5.0, 10.0),
        (100, 0.6, math.nan, 200, 2.0, 10.0, 20.0),
    ]
    for step, (tokens, entropy, masked, generated, rollout, update, whole) in enumerate(rows, start=1):
        values = {"policy/tokens": tokens, "entropy/mean": entropy, "clip_cov/masked": masked, "time/update": update}
        values |= {"rollout/tokens": generated, "time/rollout": rollout, "time/step": whole}
        recorder.record_step(step, values | {"mismatch/ratio_max": float(step), "mismatch/ratio_min": 1 / step})
    recorder.record_eval(0, {"heldout/reward": 0.25, "heldout/reward_ci95": 0.05})
    recorder.record_eval(3, {"heldout/reward": 0.5, "heldout/reward_ci95": math.nan})
    recorder.record_eval(3, {"heldout/reward": math.nan})
    summary = summarize(tmp_path)
    assert (summary.num_steps, summary.tokens, summary.step_seconds) == (3, 500, 40.0)
    assert summary.heldout_before.ci95 == 0.05 and summary.heldout_after.reward == 0.5
    assert summary.heldout_after.ci95 is None
    change = summary.entropy
    assert (change.first, change.last, change.low, change.low_step, change.window) == (1.0, 0.6, 0.4, 2, 1)
    assert summary.touched == {"clip_cov/masked": pytest.approx((100 * 0.1 + 300 * 0.3) / 400)}
    assert summary.mismatch == {"mismatch/ratio_min": 1 / 3, "mismatch/ratio_max": 3.0}
    assert summary.non_finite == {"clip_cov/masked": 1}
    phases = {phase.name: phase for phase in summary.phases}
    assert phases["rollout"].tokens_per_s == 600 / 6 and phases["rollout"].share == 6 / 40
    assert phases["update"].tokens_per_s == 500 / 20 and phases["other"].seconds == 14.0
    assert summary.reward is None and summary.verifier == {}


def test_summary_says_what_was_not_measured(tmp_path):
    Recorder(tmp_path)
    text = format_summary(summarize(tmp_path))
    assert text.count("not measured") >= 8 and "0 optimizer steps" in text
    with pytest.raises(ConfigError, match="holds no run"):
        summarize(tmp_path / "elsewhere")


def test_summary_fits_a_terminal(tmp_path):
    text = format_summary(summarize(synthetic_run(tmp_path)))
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))
    assert "not measured" not in text and "0.220 ± 0.036" in text
