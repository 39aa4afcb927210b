"""What PPO promises of the critic: what it learns and from which tokens, alone or on the policy's backbone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from ppo_cases import by_step, flat, history, in_rows, ppo_trainer, rollouts, told_logps, told_values
from test_grpo_trainer import parity_of_sum
from torch import Tensor

from rlvr.trainers import trl_bridge as bridge

PLAIN = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def held_squares(values: Tensor, old: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """The mean value loss, as verl writes it."""
    held = torch.max(torch.min(values, old + cliprange), old - cliprange)
    return 0.5 * torch.max((values - returns) ** 2, (held - returns) ** 2).mean()


def test_a_critic_takes_the_steps_of_plain_sgd(tiny_model_dir: Path, tmp_path: Path) -> None:
    """On 0.5 mean (V - R)^2 in the first of four passes, with values held back in the later ones."""
    rate, settings = 0.3, {"num_iterations": 4, "cliprange_value": 0.05, **PLAIN}
    one = ppo_trainer(tiny_model_dir, tmp_path, critic_learning_rate=rate, **settings)
    seen, found = rollouts(one), by_step(one)["critic"]
    one.train()
    (batch,) = seen
    critic, returns = batch["critic"], torch.cat(in_rows(bridge.values_of(batch)[1], batch)).double()
    old, start = torch.cat(told_values(critic, batch)).detach(), flat(critic)
    for weights, entry in zip(found[1:], history(one), strict=True):
        values = torch.cat(told_values(critic, batch))
        loss = held_squares(values, old, returns, 0.05)
        assert entry["critic/loss"] == pytest.approx(loss.item(), rel=1e-5)
        critic.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in critic.parameters()]).norm()
        assert entry["critic/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter -= rate * parameter.grad
        moved = flat(critic) - start
        assert moved.norm() > 0
        assert (weights.double() - start - moved).norm() < 1e-5 * moved.norm()
    clipped = [entry["critic/clipped"] for entry in history(one)]
    assert clipped[0] == 0 and all(0 < x < 1 for x in clipped[1:])


def test_a_shared_backbone_is_trained_by_both_losses(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The policy's plus vf_coef times the critic's; the head is trained by the same sum."""
    one = ppo_trainer(tiny_model_dir, tmp_path, critic="shared", vf_coef=0.3, lam=0.9, max_steps=1, **PLAIN)
    torch.nn.init.normal_(one.critic.module.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    seen, found = rollouts(one), by_step(one)
    one.train()
    (batch,) = seen
    policy, head = batch["policy"], batch["critic"]
    advantages = torch.cat(in_rows(batch["advantages"], batch)).double()
    old, returns = (torch.cat(in_rows(x, batch)).double() for x in bridge.values_of(batch))
    values = torch.cat(told_values(SimpleNamespace(base_model=policy.base_model, score=head), batch))
    torch.testing.assert_close(values, old, rtol=0, atol=1e-5)
    of_policy = -(advantages * torch.cat(told_logps(policy, batch))).mean()
    of_critic = held_squares(values, old, returns, 0.5)
    backbone = list(policy.parameters())
    apart = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, backbone, retain_graph=True)])
        for loss in (of_policy, of_critic)
    ]
    assert 0.3 * apart[1].norm() > 0.05 * apart[0].norm()
    of_head = torch.cat([g.flatten() for g in torch.autograd.grad(0.3 * of_critic, list(head.parameters()))])
    for name, gradient in (("policy", apart[0] + 0.3 * apart[1]), ("critic", of_head)):
        moved = (found[name][1] - found[name][0]).double()
        assert (moved + 0.1 * gradient).norm() < 1e-5 * (0.1 * gradient).norm()


def test_a_shared_critic_without_weight_leaves_the_policy_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Bit for bit, over the passes of a rollout that both critics value at 0."""
    ends = []
    for settings in ({"critic": "shared", "vf_coef": 0.0}, {"critic": "copy", "skip_idle_sequences": False}):
        one = ppo_trainer(tiny_model_dir, tmp_path / settings["critic"], num_iterations=4, **settings)
        torch.manual_seed(0)  # of TRL's shuffle; a new head of a critic has drawn numbers
        weights = by_step(one)
        one.train()
        assert not torch.equal(weights["policy"][0], weights["policy"][-1])
        ends.append(weights)
    assert torch.equal(ends[0]["policy"][-1], ends[1]["policy"][-1])
    assert (ends[0]["critic"][-1] == 0).all()


def scoring_some(one: Any, said: Any) -> Any:
    """Let prompts whose second number ends with 2, 5 or 8 have no reward, and `said(length)` as completion."""

    def unscored(prompt: str) -> bool:
        return prompt[-2] in "258"

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        rewards = parity_of_sum(completion_ids)
        return [None if unscored(prompt) else x for prompt, x in zip(prompts, rewards, strict=True)]

    generate = one._generate_single_turn

    def changed(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, logps = generate(prompt_ids, *args, **kwargs)
        texts = map(one.processing_class.decode, prompt_ids)
        changed = [said(len(c)) if unscored(text) else c for text, c in zip(texts, completions, strict=True)]
        return changed, logps

    one.reward_funcs, one._generate_single_turn = [reward], changed
    return one


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_what_an_unscored_completion_says_is_never_learned(critic: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Bit for bit, as long as it has as many tokens."""
    ends = []
    for token in (7, 70):
        one = ppo_trainer(tiny_model_dir, tmp_path / str(token), critic=critic, num_iterations=2, lam=0.9)
        scoring_some(one, lambda length, token=token: [token] * length)
        weights = by_step(one)
        one.train()
        assert 0 < history(one)[0]["reward/unscored"] < 1
        assert not any(torch.equal(x[0], x[-1]) for x in weights.values())
        of_critic = [{k: x for k, x in entry.items() if k.startswith(("critic/", "adv"))} for entry in history(one)]
        ends.append((weights, of_critic))
    (a, told_a), (b, told_b) = ends
    assert told_a == told_b
    assert torch.equal(a["policy"][-1], b["policy"][-1]) and torch.equal(a["critic"][-1], b["critic"][-1])


def test_the_tokens_of_unscored_completions_count_for_the_policy_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its loss is a mean over what it said, as in GRPO; the critic's is over what has a return."""
    pushes, moved = [], []
    for length in (1, 8):
        one = ppo_trainer(tiny_model_dir, tmp_path / str(length), max_steps=1, **PLAIN)
        scoring_some(one, lambda _, length=length: [7] * length)
        weights = by_step(one)
        one.train()
        pushes.append((weights["policy"][1] - weights["policy"][0]) * one.step_metrics["policy/tokens"])
        moved.append(weights["critic"][1] - weights["critic"][0])
    for a, b in (pushes, moved):
        assert a.norm() > 0
        assert (a - b).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_where_nothing_was_scored_nothing_is_learned(critic: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    one = ppo_trainer(tiny_model_dir, tmp_path, critic=critic, num_iterations=2, kl_reward_coef=0.1)
    one.reward_funcs = [lambda completions, **_: [None] * len(completions)]
    weights = by_step(one)
    one.train()
    assert all(torch.equal(x[0], x[-1]) for x in weights.values())
    assert one.step_metrics["reward/unscored"] == 1 and one.step_metrics["critic/grad_norm"] == 0


WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "shared prompts": ({"share_prompts": True}, 1e-5),
    "checkpointed": ({"gradient_checkpointing": True}, 0.0),  # the same operations again
}


@pytest.mark.parametrize("critic", ["copy", "shared"])
@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_however_it_is_computed(
    way: str, critic: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    ends, (changed, apart) = [], WAYS[way]
    for name, settings in (("plain", {}), (way, changed)):
        one = ppo_trainer(
            tiny_model_dir, tmp_path / name, critic=critic, num_generations=4, num_iterations=2, lam=0.9, **settings
        )
        weights = by_step(one)
        one.train()
        ends.append(weights)
    for name in ("policy", "critic"):
        a, b = (end[name] for end in ends)
        moved = (a[-1] - a[0]).norm()
        assert moved > 0
        assert (a[-1] - b[-1]).norm() <= apart * moved


@pytest.mark.parametrize("critic_lora", [None, False], ids=["adapters", "whole"])
def test_adapters_are_trained_and_what_they_adapt_is_not(
    critic_lora: bool | None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    one = ppo_trainer(tiny_model_dir, tmp_path, peft_config=lora, critic_lora=critic_lora, num_iterations=2)
    modules = {"policy": one.model, "critic": one.critic.module}
    before = {name: {k: p.clone() for k, p in m.named_parameters()} for name, m in modules.items()}
    one.train()
    for name, module in modules.items():
        changed = {k for k, p in module.named_parameters() if not torch.equal(p, before[name][k])}
        adapters = {k for k in before[name] if "lora_" in k or "score.modules_to_save" in k}
        whole = name == "critic" and critic_lora is False
        assert bool(adapters) != whole
        assert changed == (set(before[name]) if whole else adapters)


def test_a_critic_learns_what_completions_will_earn(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The reward is known from the prompt: what is explained rises from nothing to more than half."""
    settings = {"optim": "adamw_torch", "critic_learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    one = ppo_trainer(
        tiny_model_dir,
        tmp_path,
        critic_warmup_steps=60,
        max_steps=61,
        num_train_epochs=20,
        cliprange_value=None,
        **settings,
    )
    one.reward_funcs = [lambda prompts, **_: [float(prompt[-2] in "258") for prompt in prompts]]
    one.train()
    told = [entry["critic/explained_variance"] for entry in history(one)]
    assert told[0] == 0 and sum(told[-4:]) / 4 > 0.5
