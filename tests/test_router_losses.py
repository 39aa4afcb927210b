"""Router losses of a mixture-of-experts policy inside the trainer."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3MoeForCausalLM

import rlvr
from rlvr.errors import ConfigError
from rlvr.trainers.router import router_z_loss


def test_router_z_loss_equals_its_formula_over_valid_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    values = [
        float(torch.log(torch.exp(layer[i].double()).sum()) ** 2)
        for layer in logits
        for i in range(6)
        if mask.flatten()[i]
    ]
    assert router_z_loss(logits, mask).item() == pytest.approx(sum(values) / len(values), rel=1e-6)


def count_digits(completions: list[str], **_: object) -> list[float]:
    return [float(len(text) % 3) for text in completions]


def train(tiny_moe_dir: Path, out: Path, coef: float) -> rlvr.GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_dir, padding_side="left")
    args = rlvr.GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=1e6,
        router_z_loss_coef=coef,
        router_aux_loss_coef=1e-5,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"prompt": "1" * i} for i in range(1, 9)])  # padded
    model = Qwen3MoeForCausalLM.from_pretrained(tiny_moe_dir)
    one = rlvr.GRPOTrainer(model, count_digits, args, rows, processing_class=tokenizer)
    one.train()
    return one


def test_z_loss_reaches_the_routers_of_a_mixture_of_experts(tiny_moe_dir: Path, tmp_path: Path) -> None:
    plain, pulled = (train(tiny_moe_dir, tmp_path / str(coef), coef) for coef in (0.0, 0.5))
    assert "policy/router_z_loss" not in plain.step_metrics
    history = [entry["policy/router_z_loss"] for entry in pulled.state.log_history if "policy/router_z_loss" in entry]
    assert len(history) == 2 and history[1] < history[0]
    assert pulled.step_metrics["policy/router_aux_loss"] > 0
    assert not pulled.model.config.output_router_logits  # nothing of this is saved with the model


def test_z_loss_without_routers_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = rlvr.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        router_z_loss_coef=0.1,
        bf16=False,
        report_to="none",
    )
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    rows = Dataset.from_list([{"prompt": str(i)} for i in range(8)])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no expert routers"):
        rlvr.GRPOTrainer(model, count_digits, args, rows, processing_class=tokenizer)
