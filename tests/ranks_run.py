"""One training run with completions that depend on their prompt alone; what it measured and its weights are saved.

Started by test_ranks_training.py, in one process or by a launcher in two.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
from test_grpo_trainer import trainer, weights


def main(model_dir: str, out: str, settings: str) -> None:
    one = trainer(Path(model_dir), Path(out), **json.loads(settings))
    one.train()
    parameters = list(one.model.parameters())
    sharded = hasattr(parameters[0], "ds_id")
    with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
        trained = weights(one)
    if one.is_world_process_zero():
        history = [entry for entry in one.state.log_history if "loss" in entry]
        torch.save({"weights": trained, "history": history}, f"{out}/result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # or gloo's threads of a rank that is still at work abort it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
