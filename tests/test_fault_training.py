"""Real trainings in which verifiers fail, and completions are cut or empty: every step is made and recorded, weights
stay finite, and what cannot be judged teaches nothing.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import FixedPPO, flat, policy_trainer
from test_grpo_trainer import FixedRollouts
from transformers import AutoTokenizer

import rlvr
from rlvr.monitor.records import read_steps
from rlvr.rewards import VerifierReward
from rlvr.verifier_fence import Limits
from rlvr.verifier_pool import VerifierPool

GRPO = {"num_generations": 4}
PPO = {"critic_learning_rate": 0.1}
KINDS = [(rlvr.GRPOTrainer, FixedRollouts, GRPO), (rlvr.PPOTrainer, FixedPPO, PPO)]
FAULTY = """
import os, signal, time

def verify(completion, answer):
    kind = sum(completion.encode()) % 8
    if kind == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if kind == 1:
        os._exit(1)
    if kind == 2:
        b"x" * (1 << 30)
    if kind == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [None, None, None, None, float("nan"), "1", 1.0, 0.0][kind]

def never(completion, answer):
    raise ValueError("no")
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The reward of one of these verifiers."""
    (tmp_path / "faulty_in_training.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    pools = []

    def reward(name: str) -> VerifierReward:
        limits = Limits(memory_gib=0.5)
        pools.append(VerifierPool(f"faulty_in_training:{name}", workers=2, timeout=1.0, limits=limits))
        return VerifierReward(pools[-1])

    yield reward
    for pool in pools:
        pool.close()


def train(kind: Any, model: Path, out: Path, reward: Any = None, **settings: Any) -> Any:
    one = policy_trainer(kind, model, out, **{"max_steps": 2, **settings})
    if reward is not None:
        one.reward_funcs = [reward]
        one.train_dataset = one.train_dataset.add_column("answer", ["1"] * len(one.train_dataset))
    one.train()
    return one


def recorded(one: Any) -> list[dict[str, float]]:
    """Metrics of the steps, whose entropies are finite where there are any; weights are finite, too."""
    assert torch.isfinite(flat(one.model)).all()
    if hasattr(one, "critic"):
        assert torch.isfinite(flat(one.critic.module)).all()
    steps = read_steps(one.args.output_dir)
    assert [step["step"] for step in steps] == list(range(1, one.args.max_steps + 1))
    for step in steps:
        for name, value in step["metrics"].items():
            assert not name.startswith("entropy/") or value is None or math.isfinite(value), name
    return [step["metrics"] for step in steps]


@pytest.mark.parametrize(("_", "fixed", "settings"), KINDS)
def test_training_goes_on_under_a_verifier_with_every_fault(
    _: Any, fixed: Any, settings: dict[str, Any], faulty: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    one = train(fixed, tiny_model_dir, tmp_path / "run", faulty("verify"), **settings)
    steps = recorded(one)
    timeouts, errors = (sum(step[f"reward/verifier_{kind}"] for step in steps) for kind in ("timeouts", "errors"))
    assert timeouts > 0 and errors > 0.5 and timeouts + errors < 2  # of 2 steps, whose completions are of 8 kinds
    assert all(0 <= step["reward/mean"] <= 1 for step in steps)


@pytest.mark.parametrize(("_", "fixed", "settings"), KINDS)
def test_training_learns_nothing_from_a_verifier_that_never_judges(
    _: Any, fixed: Any, settings: dict[str, Any], faulty: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    one = policy_trainer(fixed, tiny_model_dir, tmp_path / "untrained", **settings)
    start = flat(one.model)
    one = train(fixed, tiny_model_dir, tmp_path / "run", faulty("never"), **settings)
    assert [metrics["reward/verifier_errors"] for metrics in recorded(one)] == [1.0, 1.0]
    assert torch.equal(flat(one.model), start)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("kind", "_", "settings"), KINDS)
def test_training_on_completions_that_are_all_cut(
    kind: Any, _: Any, settings: dict[str, Any], mask: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Cut(kind):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
            return [[5 + i % 3, 6, 7] for i in range(len(prompt_ids))], None

    one = train(Cut, tiny_model_dir, tmp_path / "run", mask_truncated_completions=mask, **settings)
    for metrics in recorded(one):
        assert metrics["rollout/truncated"] == 1.0
        assert metrics["policy/tokens"] == (0 if mask else 48)
        assert ("entropy/mean" in metrics) is not mask
    if mask:
        untrained = policy_trainer(kind, tiny_model_dir, tmp_path / "untrained", **settings)
        assert torch.equal(flat(one.model), flat(untrained.model))


@pytest.mark.parametrize(("kind", "_", "settings"), KINDS)
def test_training_on_completions_that_end_at_once(
    kind: Any, _: Any, settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    class Silent(kind):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
            return [[self.processing_class.eos_token_id] for _ in prompt_ids], None

    seen: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    one = train(Silent, tiny_model_dir, tmp_path / "run", reward, **settings)
    assert set(seen) == {""}
    for metrics in recorded(one):
        assert metrics["rollout/truncated"] == 0.0 and metrics["policy/tokens"] == 16 and metrics["entropy/mean"] > 0


@pytest.mark.parametrize(("kind", "_", "settings"), KINDS)
def test_training_without_a_pad_token_pads_with_the_end_token_and_learns_the_same(
    kind: Any, _: Any, settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    assert AutoTokenizer.from_pretrained(bare).pad_token is None
    fixed = FixedRollouts if kind is rlvr.GRPOTrainer else FixedPPO
    trained = [train(fixed, model, tmp_path / model.name, **settings) for model in (bare, tiny_model_dir)]
    assert trained[0].processing_class.pad_token == trained[0].processing_class.eos_token
    ours, theirs = (recorded(one) for one in trained)
    assert ours[-1]["entropy/mean"] == pytest.approx(theirs[-1]["entropy/mean"], rel=1e-6)
    assert torch.allclose(flat(trained[0].model), flat(trained[1].model), rtol=1e-5, atol=1e-7)
