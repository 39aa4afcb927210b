"""Run in a process of its own by test_vllm_training.py: trains on real vLLM rollouts, then lets the engine go stale.

python vllm_run.py MODEL_DIR OUT_DIR full|lora|mole|ppo   ->  one JSON line
"""

import json
import sys
from contextlib import closing
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlvr
from rlvr.mole.model import MoleConfig
from rlvr.monitor.records import read_steps
from rlvr.rollout.parity import EngineMismatchError

ADAPTERS = {
    "lora": LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
    "mole": MoleConfig(r=8, lora_alpha=16, lora_dropout=0.1, num_experts=4, target_modules="all-linear"),
}


def share_of_low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]


def forget_experts(model: torch.nn.Module) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


def main(model_dir: str, out: str, method: str) -> None:
    kind, make = (rlvr.PPOConfig, rlvr.PPOTrainer) if method == "ppo" else (rlvr.GRPOConfig, rlvr.GRPOTrainer)
    args = kind(
        output_dir=out,
        use_vllm=True,
        temperature=0.8,
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=16,
        num_iterations=2,
        learning_rate=2e-2 if method in ADAPTERS else 5e-3,
        max_steps=6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        vllm_max_model_length=64,
        controls=["kl_cov"],
    )
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    adapter = ADAPTERS.get(method)
    with closing(
        make(model, share_of_low_ids, args, rows, processing_class=tokenizer, peft_config=adapter)
    ) as trainer:
        trainer.train()
        steps = [record["metrics"] for record in read_steps(out)]
        trainer.vllm_generation.sync_weights = lambda: None
        if method == "mole":  # its experts are shared, and never stale; but they can be lost
            trainer.vllm_generation.llm.apply_model(forget_experts)
        error = ""
        try:
            trainer.args.max_steps = 20
            trainer.train()
        except EngineMismatchError as caught:
            error = str(caught)
    print(json.dumps({"steps": steps, "error": error, "stopped_at": trainer.state.global_step}))


if __name__ == "__main__":
    main(*sys.argv[1:])
