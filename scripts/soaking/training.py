"""The run that is soaked: GRPO on Countdown, resumed from its newest checkpoint whenever it is started.

python -m soaking.training OUT SEED STEPS ENGINE
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lab.base import BaseSettings, base_model
from lab.countdown import COMPLETION_LENGTH, draw, split
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlvr
from rlvr.errors import ConfigError, RunError
from rlvr.rewards import VerifierReward
from rlvr.verifier_fence import Limits
from rlvr.verifier_pool import VerifierPool

POISONED = 97  # one optimizer step in about so many has a NaN in its gradient


def main(out: str, seed: str, steps: str, engine: str) -> None:
    torch.set_num_threads(1)
    one = trainer(Path(out), int(seed), int(steps), engine)
    poison(one, int(seed))
    try:
        one.train(resume_from_checkpoint="auto")
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    finally:
        one.close()


def trainer(out: Path, seed: int, steps: int, engine: str) -> rlvr.GRPOTrainer:
    """engine: transformers, or the address of a vLLM server."""
    base = base_model(BaseSettings())
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": engine}
    args = rlvr.GRPOConfig(
        output_dir=str(out),
        num_generations=8,
        per_device_train_batch_size=32,
        steps_per_generation=2,
        max_completion_length=COMPLETION_LENGTH,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        controls=[{"name": "kl_cov", "fraction": 0.02}],
        thermostat={"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0},
        save_steps=10,
        save_total_limit=2,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=50,
        **({} if engine == "transformers" else server),
    )
    prompts = draw(split(held_out=False), 512, np.random.default_rng(seed)).prompts()
    pool = VerifierPool("soaking.judge:judge", workers=2, timeout=5.0, limits=Limits(memory_gib=4, file_mib=1))
    return rlvr.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        VerifierReward(pool),
        args,
        Dataset.from_dict({"prompt": prompts, "answer": prompts}),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def poison(one: Any, seed: int) -> None:
    """NaN in a gradient, at steps that depend on the seed alone."""

    def hook(gradient: Tensor) -> Tensor:
        step = one.state.global_step + 1
        return gradient * math.nan if (step * 7919 + seed) % POISONED == 0 else gradient

    next(one.model.parameters()).register_hook(hook)


if __name__ == "__main__":
    main(*sys.argv[1:])
