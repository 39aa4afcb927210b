"""PPO runs, one after the other in the same processes; what each measured and trained is saved in its folder.

Started by test_ranks_ppo.py, by a launcher in two processes.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from ppo_cases import flat, ppo_trainer

from rlvr.mole.model import MoleConfig


def whole(module: torch.nn.Module) -> torch.Tensor:
    """The weights, gathered from all ranks where they are partitioned."""
    parameters = list(module.parameters())
    sharded = hasattr(parameters[0], "ds_id")
    with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
        return flat(module)


def run(model_dir: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Weights of policy and critic, before and after, and the records of the steps."""
    mole = settings.pop("mole", None)
    adapter = None if mole is None else MoleConfig(**mole, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    one = ppo_trainer(model_dir, out, peft_config=adapter, **settings)
    start = {"policy": whole(one.accelerator.unwrap_model(one.model)), "critic": whole(one.critic.module)}
    one.train()
    one.save_model(str(out / "final"))
    history = [entry for entry in one.state.log_history if "loss" in entry]
    policy = one.accelerator.unwrap_model(one.model)
    return {"policy": whole(policy), "critic": whole(one.critic.module), "history": history, "start": start}


def main(model_dir: str, out: str, runs: str) -> None:
    for name, settings in json.loads(runs).items():
        trained = run(Path(model_dir), Path(out, name), settings)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(trained, Path(out, name, "result.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
