"""What PPO promises of the policy: where its advantages come from, and that all else is GRPO's."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from ppo_cases import (
    FixedPPO,
    by_step,
    flat,
    history,
    in_rows,
    policy_trainer,
    ppo_trainer,
    rollouts,
    told_logps,
    told_values,
)
from test_grpo_trainer import FixedRollouts
from test_ranks_training import CONTROLS, TOLD
from test_steering_training import THERMOSTAT
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_tokens
from rlvr.trainers import trl_bridge as bridge
from rlvr.types import token_keys


def test_a_critic_that_knows_nothing_leaves_reinforce(tiny_model_dir: Path, tmp_path: Path) -> None:
    """lambda = gamma = 1 and V = 0: the gradient is that of -sum R log pi / tokens."""
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=1, max_grad_norm=0.0, whiten_advantages=False)
    seen, start = rollouts(one), flat(one.model).double()
    one.train()
    (batch,) = seen
    logps = told_logps(batch["policy"], batch)
    earned = sum(reward * row.sum() for reward, row in zip(batch[bridge.REWARD], logps, strict=True))
    gradients = torch.autograd.grad(-earned / sum(map(len, logps)), list(batch["policy"].parameters()))
    want = -0.1 * torch.cat([g.flatten() for g in gradients])
    assert want.norm() > 0
    assert (flat(one.model).double() - start - want).norm() < 1e-5 * want.norm()


def backwards(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """GAE of one completion, as it is written in the paper: (advantages, returns) [T]."""
    advantages, later, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        advantages[t] = later = rewards[t] + gamma * after - values[t] + gamma * lam * later
        after = values[t]
    return advantages, advantages + values


ESTIMATES: dict[str, dict[str, Any]] = {
    "earned": {},
    "discounted": {"gamma": 0.9, "lam": 0.8},
    "decoupled": {"lam": 0.8, "critic_lam": 0.95},
    "by length": {"length_adaptive_alpha": 0.3},
    "penalized": {"kl_reward_coef": 0.1, "lam": 0.9},
    "whitened": {"lam": 0.9, "whiten_advantages": True},
    "with a tool": {"lam": 0.9},
}


@pytest.mark.parametrize("name", ESTIMATES)
@torch.no_grad()
def test_advantages_are_gae_of_what_the_critic_says_of_each_text_alone(
    name: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "with a tool":
        let_a_tool_speak(monkeypatch)
    settings = {"whiten_advantages": False, **ESTIMATES[name]}
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=3, **settings)
    seen = rollouts(one)
    with torch.enable_grad():
        one.train()
    batch, args, first = seen[-1], one.args, seen[0]["policy"]
    values, advantages, returns = told_values(batch["critic"], batch), [], []
    apart = [a - b for a, b in zip(told_logps(batch["policy"], batch), told_logps(first, batch), strict=True)]
    for reward, value, kl in zip(batch[bridge.REWARD], values, apart, strict=True):
        rewards = -args.kl_reward_coef * kl
        rewards[-1:] += reward
        alpha = args.length_adaptive_alpha
        lam = args.lam if alpha is None else max(0.0, 1 - 1 / (alpha * len(value)))
        advantages.append(backwards(rewards, value, args.gamma, lam)[0])
        critic_lam = args.lam if args.critic_lam is None else args.critic_lam
        returns.append(backwards(rewards, value, args.gamma, critic_lam)[1])
    want = torch.cat(advantages)
    if args.whiten_advantages:
        want = (want - want.mean()) / want.std()
    old, targets = bridge.values_of(batch)
    assert (batch["prompt_mask"] == 0).any() and torch.cat(values).std() > 0.05 and torch.cat(apart).std() > 0.05
    for found, expected in ((batch["advantages"], want), (old, torch.cat(values)), (targets, torch.cat(returns))):
        torch.testing.assert_close(torch.cat(in_rows(found, batch)).double(), expected, rtol=0, atol=2e-5)
        assert (found[~bridge.trained_mask(batch)] == 0).all()


def let_a_tool_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third token of a completion, from its second, is a tool's."""
    generate = trl.GRPOTrainer._generate

    def with_a_tool(self: Any, prompts: list[Any]) -> Any:
        ids, completions, _, *rest = generate(self, prompts)
        mask = [[int(i % 3 != 1) for i in range(len(tokens))] for tokens in completions]
        return (ids, completions, mask, *rest)

    monkeypatch.setattr(trl.GRPOTrainer, "_generate", with_a_tool)


TOLD_OF_BOTH = (
    "policy/loss",
    "policy/kl_old",
    "entropy/mean",
    "optim/grad_norm",
    "critic/loss",
    "critic/clipped",
    "critic/value",
    "critic/earned",
    "critic/explained_variance",
    "critic/grad_norm",
    "advantage/mean",
    "advantage/std",
    "advantage/p05",
    "advantage/p50",
    "advantage/p95",
)


@pytest.mark.parametrize("critic", ["copy", "shared"])
@pytest.mark.parametrize("size", [4, 8])
def test_training_does_not_depend_on_the_micro_batch_size(
    size: int, critic: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shared = {"critic": critic, "num_iterations": 2, "lam": 0.9, "cliprange_value": 0.01}
    if critic == "shared":
        shared["vf_coef"] = 1.0
    whole = ppo_trainer(tiny_model_dir, tmp_path / "whole", **shared)
    cut = ppo_trainer(
        tiny_model_dir,
        tmp_path / "cut",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        **shared,
    )
    weights = by_step(whole), by_step(cut)
    whole.train()
    cut.train()
    for a, b in zip(history(whole), history(cut), strict=True):
        for name in TOLD_OF_BOTH:
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-4, abs=1e-6), name
    assert any(entry["critic/clipped"] > 0 for entry in history(whole))
    for name in ("policy", "critic"):
        a, b = (one[name] for one in weights)
        moved = (a[-1] - a[0]).norm()
        assert moved > 0
        assert (a[-1] - b[-1]).norm() < 1e-5 * moved


class OfGroups(FixedPPO):
    """PPO with GRPO's advantages, whatever its critic says."""

    def _set_advantages(self, batch: dict[str, Any]) -> None:
        of_group = batch["advantages"].unsqueeze(1)
        super()._set_advantages(batch)
        batch["advantages"] = of_group.expand_as(batch["completion_ids"]).clone()


def test_with_grpo_s_advantages_the_policy_s_steps_are_grpo_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    shared = {"num_generations": 4, "num_iterations": 2, "controls": CONTROLS[:2], "surrogate": "unclipped"}
    ppo = policy_trainer(OfGroups, tiny_model_dir, tmp_path / "ppo", critic_learning_rate=0.1, **shared)
    grpo = policy_trainer(FixedRollouts, tiny_model_dir, tmp_path / "grpo", **shared)
    start, critic = flat(grpo.model), flat(ppo.critic.module)
    for one in (ppo, grpo):
        torch.manual_seed(0)  # of TRL's shuffle; a new head of a critic has drawn numbers
        one.train()
    assert not torch.equal(flat(grpo.model), start) and not torch.equal(flat(ppo.critic.module), critic)
    assert torch.equal(flat(ppo.model), flat(grpo.model))
    for a, b in zip(history(ppo), history(grpo), strict=True):
        timeless = [name for name in b if not name.startswith("time/")]
        assert {name: a.get(name) for name in timeless} == {name: b[name] for name in timeless}


def test_the_policy_waits_for_the_critic(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Bit for bit; its learning rate falls from when it starts, the critic's from the first step."""
    one = ppo_trainer(tiny_model_dir, tmp_path, critic_warmup_steps=2)
    weights = by_step(one)
    one.train()
    assert [torch.equal(a, b) for a, b in pairwise(weights["policy"])] == [True, True, False, False]
    assert not any(torch.equal(a, b) for a, b in pairwise(weights["critic"]))
    records = history(one)
    assert [entry["critic/learning_rate"] for entry in records] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [entry["optim/learning_rate"] for entry in records[2:]] == pytest.approx([0.1, 0.05])
    for entry in records[:2]:
        of_policy = (
            "policy/",
            "optim/grad_norm",
            "optim/learning_rate",
            "entropy/",
            "clip/",
            "covariance/",
            "thermostat/",
        )
        assert not [name for name in entry if name.startswith(of_policy)]
        assert entry["critic/loss"] > 0 and "reward/mean" in entry
    assert all(entry["policy/tokens"] > 0 and entry["optim/grad_norm"] > 0 for entry in records[2:])


def test_the_critic_learns_the_same_while_the_policy_waits(tiny_model_dir: Path, tmp_path: Path) -> None:
    ends = []
    for waits in (0, 2):
        one = ppo_trainer(tiny_model_dir, tmp_path / str(waits), critic_warmup_steps=waits)
        one.train()
        ends.append(flat(one.critic.module))
    assert torch.equal(*ends)


@torch.no_grad()
def test_controls_select_by_the_advantage_of_each_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    """KL-Cov the largest tenth of (A - mean A)(log pi - mean log pi), Clip-Cov a random tenth of those in its band."""
    settings = {"controls": CONTROLS[:2], "surrogate": "unclipped", "num_iterations": 2, "lam": 0.9}
    one = ppo_trainer(tiny_model_dir, tmp_path, **settings)
    seen = rollouts(one)
    with torch.enable_grad():
        one.train()
    for number, batch in enumerate(seen):
        logps = torch.cat(told_logps(batch["policy"], batch))
        advantages = torch.cat(in_rows(batch["advantages"], batch)).double()
        cov = (advantages - advantages.mean()) * (logps - logps.mean())
        tenth = len(cov) // 10
        found = bridge.attached(batch)
        selected = found["kl_cov"].drift > 0
        assert set(selected.nonzero()[:, 0].tolist()) == set(cov.topk(tenth).indices.tolist())
        row, column = bridge.trained_mask(batch).nonzero(as_tuple=True)
        keys = token_keys(one.args.seed, number, batch[bridge.SEQUENCE][row], column)
        drawn = keys.masked_fill((cov <= 0.1) | (cov >= 50), -1).topk(tenth).indices
        masked = found["clip_cov"].weight == 0
        assert set(masked.nonzero()[:, 0].tolist()) == set(drawn.tolist())
    assert advantages.unique().numel() > len(advantages) / 2  # they differ within a completion


def test_all_controls_and_a_thermostat_steer_ppo(tiny_model_dir: Path, tmp_path: Path) -> None:
    ends, records = [], []
    for size in (16, 4):
        one = ppo_trainer(
            tiny_model_dir,
            tmp_path / str(size),
            controls=CONTROLS,
            surrogate="unclipped",
            thermostat=THERMOSTAT,
            num_iterations=2,
            lam=0.9,
            learning_rate=0.05,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
        )
        start = flat(one.model)
        one.train()
        ends.append(flat(one.model))
        records.append(history(one))
    for name in TOLD:
        assert any(entry[name] > 0 for entry in records[0]), name
    for a, b in zip(*records, strict=True):
        for name in (*TOLD, *TOLD_OF_BOTH, "thermostat/value"):
            assert a.get(name) == pytest.approx(b.get(name), rel=2e-4, abs=1e-6), name
    levers = [entry["thermostat/value"] for entry in records[0]]
    assert len(set(levers)) == len(levers)
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start).norm()


def test_token_records_have_what_the_critic_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=2, lam=0.9)
    seen = rollouts(one)
    one.train()
    for step, batch in enumerate(seen, start=1):
        told = {"advantages": batch["advantages"], "values": bridge.values_of(batch)[0]}
        rows = read_tokens(tmp_path, step)
        assert len(rows) == 16
        for row in rows:
            for name, padded in told.items():
                assert len(row[name]) == len(row["token_ids"])
                assert row[name] == in_rows(padded, batch)[row["sequence"]].tolist()


def test_a_warm_up_longer_than_the_run_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=-1, num_train_epochs=1, critic_warmup_steps=4)
    with pytest.raises(ConfigError, match=r"critic_warmup_steps=4 leaves none of 4 steps to the policy"):
        one.train()


def test_the_table_of_completions_has_the_critics_advantages(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = ppo_trainer(tiny_model_dir, tmp_path, max_steps=2, lam=0.9, whiten_advantages=False)
    seen = rollouts(one)
    one.train()
    told = list(one._logs["advantages"])
    means = [float(row.mean()) for batch in seen for row in in_rows(batch["advantages"], batch)]
    assert told == pytest.approx(means[-len(told) :], abs=1e-6) and len(told) >= 16
