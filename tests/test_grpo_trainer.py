"""What the trainer promises beyond TRL: invariance to micro-batches, exact entropy, refusals."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlvr
from rlvr.errors import ConfigError

LENGTH = 8


class FixedRollouts(rlvr.GRPOTrainer):
    """The trainer with completions that depend on the prompt and the seed alone; everything after them is real."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        completions = []
        for i, ids in enumerate(prompt_ids):
            source = random.Random(f"{ids} {i % self.num_generations}")
            completions.append([source.randrange(3, 100) for _ in range(source.randint(1, LENGTH))])
        return completions, None


def parity_of_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def trainer(model_dir: Path, out: Path, **settings: Any) -> rlvr.GRPOTrainer:
    args = rlvr.GRPOConfig(
        output_dir=str(out),
        **{
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "learning_rate": 0.1,
            "optim": "sgd",  # Adam turns a rounding error of a zero gradient into a step
            "max_steps": 4,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 3,
            **settings,
        },
    )
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    return FixedRollouts(model, parity_of_sum, args, rows, processing_class=tokenizer)


def weights(trained: rlvr.GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


CONTROLS = [{"name": "clip_cov", "fraction": 0.1, "low": 0.1, "high": 50.0}, {"name": "kl_cov", "fraction": 0.1}]


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("size", [4, 8])
def test_loss_does_not_depend_on_the_micro_batch_size(
    loss_type: str, size: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shared = {"controls": CONTROLS, "num_iterations": 2, "loss_type": loss_type, "surrogate": "unclipped"}
    whole = trainer(tiny_model_dir, tmp_path / "whole", per_device_train_batch_size=16, **shared)
    cut = trainer(
        tiny_model_dir,
        tmp_path / "cut",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=16 // size,
        **shared,
    )
    start = weights(whole)
    histories = []
    for one in (whole, cut):
        one.train()
        histories.append([entry for entry in one.state.log_history if "loss" in entry])
    for a, b in zip(*histories, strict=True):
        assert a["clip_cov/masked"] == b["clip_cov/masked"] > 0
        assert a["kl_cov/selected"] == b["kl_cov/selected"] > 0
        for name in ("policy/loss", "entropy/mean", "policy/drift", "optim/grad_norm", "policy/kl_old"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-7), name
    moved = (weights(whole) - start).norm()
    assert moved > 0
    assert (weights(whole) - weights(cut)).norm() < 1e-5 * moved


def test_entropy_is_exact_tempered_and_over_trained_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    temperature = 0.7
    one = trainer(
        tiny_model_dir,
        tmp_path,
        temperature=temperature,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    seen: list[tuple[list[int], list[int]]] = []
    generate = one._generate_single_turn

    def remember(prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, logps = generate(prompt_ids, *args, **kwargs)
        seen.extend(zip(prompt_ids, completions, strict=True))
        return completions, logps

    one._generate_single_turn = remember
    one.train()
    total, count = 0.0, 0
    for prompt, completion in seen:
        logits = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
        count += len(completion)
    assert one.step_metrics["policy/tokens"] == count
    assert one.step_metrics["entropy/mean"] == pytest.approx(total / count, rel=1e-5)


def test_step_metrics_of_a_rollout_are_repeated_for_each_of_its_updates(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, per_device_train_batch_size=16, num_iterations=2)
    one.train()
    rewards = [entry["reward/mean"] for entry in one.state.log_history if "reward/mean" in entry]
    assert len(rewards) == 4 and rewards[0] == rewards[1] and rewards[2] == rewards[3]


def test_too_few_rows_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    args = rlvr.GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=4, bf16=False)
    with pytest.raises(ConfigError, match="3 rows, a rollout takes 4 prompts"):
        rlvr.GRPOTrainer("no/such-model", parity_of_sum, args, Dataset.from_list([{"prompt": "x"}] * 3))
    with pytest.raises(ConfigError, match="no column 'prompt'; it has question"):
        rlvr.GRPOTrainer("no/such-model", parity_of_sum, args, Dataset.from_list([{"question": "x"}] * 8))


def test_stop_ends_completions_and_counts_them_as_finished(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = rlvr.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=64,
        max_steps=1,
        stop="e",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": str(i)} for i in range(8)])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    seen: list[list[int]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    one = rlvr.GRPOTrainer(model, reward, args, rows, processing_class=tokenizer)
    one.train()
    stop, ends = tokenizer.encode("e")[0], {tokenizer.eos_token_id, tokenizer.encode("e")[0]}
    assert any(ids[-1] == stop for ids in seen)
    assert all(stop not in ids[:-1] for ids in seen)
    assert one.step_metrics["rollout/truncated"] == sum(ids[-1] not in ends for ids in seen) / len(seen)
    args.stop = "two tokens"
    with pytest.raises(ConfigError, match="stop='two tokens' is 10 tokens"):
        rlvr.GRPOTrainer(model, reward, args, rows, processing_class=tokenizer)
