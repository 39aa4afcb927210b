"""One training run on a vLLM engine, in one process or by a launcher in several; started by test_server_training.py.

python server_run.py MODEL_DIR OUT_DIR full|lora|mole|ppo [SERVER_URL]   ->  OUT_DIR/result.json
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_run import ADAPTERS, share_of_low_ids

import rlvr
from rlvr.monitor.records import read_steps


def trainer(model_dir: str, out: str, method: str, url: str | None = None, **settings: object) -> Any:
    kind, make = (rlvr.PPOConfig, rlvr.PPOTrainer) if method == "ppo" else (rlvr.GRPOConfig, rlvr.GRPOTrainer)
    server = {} if url is None else {"vllm_mode": "server", "vllm_server_base_url": url}
    args = kind(
        output_dir=out,
        use_vllm=True,
        **{
            "temperature": 0.8,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 16,
            "learning_rate": 2e-2 if method == "lora" else 5e-3,
            "max_steps": 5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "vllm_max_model_length": 64,
            **server,
            **settings,
        },
    )
    if getattr(args, "deepspeed_plugin", None) is not None:  # else so small a model is not sharded
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    rows = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    return make(model, share_of_low_ids, args, rows, processing_class=tokenizer, peft_config=ADAPTERS.get(method))


def main(model_dir: str, out: str, method: str, url: str | None = None) -> None:
    with closing(trainer(model_dir, out, method, url)) as one:
        one.train()
        sharded = all(getattr(p, "ds_shape", p.shape) != p.shape for p in one.model.parameters())
        result = {
            "sharded": sharded,
            "processes": one.accelerator.num_processes,
            "steps": [record["metrics"] for record in read_steps(out)],
        }
        if one.is_world_process_zero():
            Path(out, "result.json").write_text(json.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
