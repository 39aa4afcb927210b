"""Checkpoints of PPO: policy and critic go on together, bit for bit, and the critic is an ordinary model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ppo_cases import by_step, flat, history, in_rows, policy_trainer, ppo_trainer, rollouts, told_values
from test_grpo_trainer import FixedRollouts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_steps
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.critic_model import load_critic

Settings = dict[str, Any]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "critic_learning_rate": 1e-3}
RUNS: dict[str, Callable[[], Settings]] = {
    "own": dict,
    "shared": lambda: {"critic": "shared"},
    "adam": lambda: {**ADAM, "kl_reward_coef": 0.1},
    "shared, adam": lambda: {**ADAM, "critic": "shared"},
    "adapters": lambda: {**ADAM, "peft_config": lora()},
    "adapters of the policy": lambda: {**ADAM, "peft_config": lora(), "critic_lora": False},
    "warm-up": lambda: {"critic_warmup_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
}


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def run(model_dir: Path, out: Path, **settings: Any) -> Any:
    """Three rollouts of two updates each, with a checkpoint after each rollout."""
    shared = {"max_steps": 6, "num_iterations": 2, "lam": 0.9, "save_strategy": "steps", "save_steps": 2}
    return ppo_trainer(model_dir, out, **{**shared, **settings})


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_one_that_was_not_stopped(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Weights of policy and critic after every step, and all that is recorded."""
    whole = run(tiny_model_dir, tmp_path / "whole", **RUNS[name]())
    expected = by_step(whole)
    whole.train()
    resumed = run(tiny_model_dir, tmp_path / "resumed", **RUNS[name]())
    found = by_step(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for part in ("policy", "critic"):
        assert len(found[part]) == 5 and not torch.equal(expected[part][0], expected[part][-1])
        for a, b in zip(found[part][1:], expected[part][3:], strict=True):
            assert torch.equal(a, b)
    for a, b in zip(history(resumed), history(whole), strict=True):
        assert timeless(a) == timeless(b)


def timeless(entry: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in entry.items() if not name.startswith("time/")}


def test_a_run_stopped_within_a_rollout_goes_on_with_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    """And where the checkpoint holds none for it, makes one anew of the same prompts, valued by the checkpoint's
    critic.
    """
    whole = run(tiny_model_dir, tmp_path / "whole", save_steps=3)
    prompts = rollouts(whole)
    whole.train()
    resumed = run(tiny_model_dir, tmp_path / "resumed", save_steps=3)
    seen, start = rollouts(resumed), tmp_path / "whole/checkpoint-3/critic"
    resumed.train(resume_from_checkpoint=str(start.parent))
    assert torch.equal(seen[0]["prompt_ids"], prompts[2]["prompt_ids"]) and len(seen) == 1
    for a, b in zip(history(resumed), history(whole), strict=True):
        assert timeless(a) == timeless(b)

    (start.parent / "rollout-0-of-1.safetensors").unlink()
    resumed = run(tiny_model_dir, tmp_path / "anew", save_steps=3)
    seen = rollouts(resumed)
    with pytest.warns(UserWarning, match="falls into a rollout that it does not hold"):
        resumed.train(resume_from_checkpoint=str(start.parent))
    assert [entry["step"] for entry in history(resumed)] == [1, 2, 3, 4, 5, 6]
    for again, before in zip(seen, prompts[1:], strict=True):
        assert torch.equal(again["prompt_ids"], before["prompt_ids"])
    values = torch.cat(told_values(load_critic(str(start)).double(), seen[0]))
    measured = torch.cat(in_rows(bridge.values_of(seen[0])[0], seen[0])).double()
    torch.testing.assert_close(measured, values, rtol=0, atol=1e-5)
    assert history(resumed)[3]["policy/ratio"] == 1


def padded_values(critic: Any, batch: dict[str, Any]) -> Tensor:
    """By a critic's own forward over the padded rollout, of trained tokens [N]."""
    ids, mask = (torch.cat([batch[f"{side}_{kind}"] for side in ("prompt", "completion")], 1) for kind in KINDS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = critic(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    trained = bridge.trained_mask(batch)
    return logits[:, -trained.size(1) - 1 : -1, 0][trained]


KINDS = ("ids", "mask")


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@torch.no_grad()
def test_a_saved_critic_is_an_ordinary_model(adapters: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(tiny_model_dir, tmp_path, peft_config=lora() if adapters else None)
    seen = rollouts(one)
    with torch.enable_grad():
        one.train()
    folder = tmp_path / "checkpoint-6/critic"
    if adapters:
        base = AutoModelForTokenClassification.from_pretrained(tiny_model_dir, num_labels=1)
        critic: Any = peft.PeftModel.from_pretrained(base, folder / "adapter")
    else:
        critic = AutoModelForTokenClassification.from_pretrained(folder)
    expected = one.critic.values(seen[-1], 16)[bridge.trained_mask(seen[-1])]
    assert expected.std() > 0.05
    torch.testing.assert_close(padded_values(critic.eval(), seen[-1]), expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == one.processing_class.get_vocab()


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_a_run_starts_from_the_critic_of_another(adapters: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Of one with adapters, too, which are merged."""
    first = run(tiny_model_dir, tmp_path / "first", peft_config=lora() if adapters else None)
    first.train()
    later = run(tiny_model_dir, tmp_path / "later", critic=str(tmp_path / "first/checkpoint-6/critic"))
    critic = first.critic.module.merge_and_unload() if adapters else first.critic.module
    torch.testing.assert_close(flat(later.critic.module), flat(critic), rtol=0, atol=1e-6 if adapters else 0)
    later.train()
    assert history(later)[0]["critic/value"] != 0 == history(first)[0]["critic/value"]


def test_weights_alone_are_enough_to_go_on_with(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = run(tiny_model_dir, tmp_path / "whole", save_only_model=True)
    whole.train()
    resumed = run(tiny_model_dir, tmp_path / "resumed")
    weights = by_step(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    saved = flat(load_critic(str(tmp_path / "whole/checkpoint-2/critic")))
    assert torch.equal(weights["critic"][0], flat(load_critic(str(tiny_model_dir))))
    assert (weights["critic"][1] - saved).norm() < 0.5 * (weights["critic"][1] - weights["critic"][0]).norm()


def test_the_best_policy_comes_with_its_critic(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run(tiny_model_dir, tmp_path, save_steps=1, num_iterations=1, max_steps=3)
    weights = by_step(one)
    one.train()
    one.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    one._load_best_model()
    for part, module in (("policy", one.model), ("critic", one.critic.module)):
        assert torch.equal(flat(module), weights[part][1])
        assert not torch.equal(weights[part][1], weights[part][3])


def test_a_critic_of_another_shape_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    config = AutoConfig.from_pretrained(tiny_model_dir, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(small)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(small)
    run(tiny_model_dir, tmp_path / "whole", critic=str(small)).train()
    one = run(tiny_model_dir, tmp_path / "resumed")
    with pytest.raises(ConfigError, match=r"holds another critic than that of critic=copy"):
        one.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


@pytest.mark.parametrize("name", ["own", "shared", "adapters"])
def test_a_finished_run_is_loaded_and_not_trained(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    first = run(tiny_model_dir, tmp_path, **RUNS[name]())
    first.train()
    again = run(tiny_model_dir, tmp_path, **RUNS[name]())
    assert not torch.equal(flat(again.critic.module), flat(first.critic.module))
    again.train(resume_from_checkpoint=True)
    assert len(read_steps(tmp_path)) == 6
    assert torch.equal(flat(again.model), flat(first.model))
    assert torch.equal(flat(again.critic.module), flat(first.critic.module))
    again.save_model(str(tmp_path / "model"))
    saved = tmp_path / "checkpoint-6/critic"
    paths = [path.relative_to(saved) for path in saved.rglob("*.safetensors")]
    assert len(paths) == 1
    assert (tmp_path / "model/critic" / paths[0]).read_bytes() == (saved / paths[0]).read_bytes()


def test_a_checkpoint_of_a_run_without_critic_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shared = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    policy_trainer(FixedRollouts, tiny_model_dir, tmp_path / "grpo", num_generations=4, **shared).train()
    one = run(tiny_model_dir, tmp_path / "ppo")
    with pytest.raises(ConfigError, match=r"checkpoint-2' holds no critic: it is of a run without one") as raised:
        one.train(resume_from_checkpoint=str(tmp_path / "grpo/checkpoint-2"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ppo/run.json").exists()
