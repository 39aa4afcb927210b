"""Two ranks of DeepSpeed under a recipe's JSON: what stays between steps and the peak of a step, predicted and real.

Started by test_plan_memory.py.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from plan_cases import MODELS, alive, micro_batch, peak_of
from test_plan_memory import predicted_pass
from transformers import AutoModelForCausalLM

from rlvr.planning import ModelShape, Settings, memory
from rlvr.planning.memory import Weights, held
from rlvr.trainers import model_shape
from rlvr.trainers.head import add_token_stats

memory.BUCKET = 20_000_000  # more than the largest weight; the default, 1 GB, would hide everything else


def main(strategy: str, out: str) -> None:
    deepspeed.init_distributed("gloo")
    config = json.loads((Path("recipes/deepspeed") / f"{strategy}.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "train_batch_size": 8}
    config |= {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "zero_force_ds_cpu_optimizer": False}
    config["zero_optimization"]["reduce_bucket_size"] = memory.BUCKET
    settings = Settings(
        model_name_or_path="wide",
        gpus=2,
        dtype="bfloat16",
        per_device_train_batch_size=2,
        prompt_length=64,
        max_completion_length=64,
    )
    model_shape.read_config = lambda _: MODELS["wide"]
    shape = model_shape.read_shape(settings)
    with deepspeed.zero.Init(config_dict_or_path=config) if "zero3" in strategy else nullcontext():
        model = AutoModelForCausalLM.from_config(MODELS["wide"], dtype=torch.bfloat16, attn_implementation="sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    add_token_stats(model, temperature=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model.train(), optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(2):
            micro_batch(engine, settings, engine.backward)
            engine.step()

    step()
    stays = held(strategy, Weights(shape.total, shape.total), shape, settings)
    always = stays.always + stays.host / 2  # of two ranks on one machine
    of_pass = predicted_pass(settings, shape, in_half=True)
    before = alive()
    peak = before + peak_of(step)
    if torch.distributed.get_rank() == 0:
        told = {"stays": (between(strategy, always, shape), before)}
        told["peak"] = (always + max(stays.buffers + of_pass, stays.step), peak)
        Path(out).write_text(json.dumps(told))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def between(strategy: str, always: float, shape: ModelShape) -> float:
    """Of what a step needs all the time: ZeRO-2 lets gradients go after it, and the others keep a buffer."""
    if strategy == "zero2":
        return always - memory.HALF * shape.total / 2
    return always + memory.HALF * (max(shape.head, shape.layer) if strategy == "zero2_offload" else memory.BUCKET)


if __name__ == "__main__":
    main(*sys.argv[1:])
