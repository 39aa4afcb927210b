"""One optimizer step of verl's own actor worker, FSDP2 on one CPU process, with the given overrides; prints metrics.

usage: python tests/verl_engine.py MODEL_DIR [OVERRIDE...]. verl has no CPU platform, but places to plug one in.
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import verl
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

ACTOR = "actor_rollout_ref.actor"
FULL = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
SETTINGS = (
    "actor_rollout_ref.model.use_remove_padding=false",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=eager",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
    f"{ACTOR}.strategy=fsdp2",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
    f"{ACTOR}.ppo_mini_batch_size=4",
    f"{ACTOR}.use_torch_compile=false",
    f"+{ACTOR}.fsdp_config.mixed_precision={FULL}",
)


class Cpu(PlatformCUDA):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        is_available=lambda: False,
        current_device=lambda: 0,
        get_device_name=lambda *_: "CPU",
        mem_get_info=lambda *_: (1, 1),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: 0),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: 0),
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"

    def nothing(self, *_: Any) -> None:
        """There is no accelerator to seed, empty or wait for."""

    manual_seed = manual_seed_all = set_device = empty_cache = synchronize = nothing


def worker(model_dir: str, overrides: list[str]) -> tuple[Any, Any]:
    """(verl's actor worker, its configuration)"""
    set_platform(Cpu())
    from verl.models.transformers import monkey_patch
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.engine_workers import ActorRolloutRefWorker

    monkey_patch.is_trl_available = lambda: False  # verl 0.9.1 looks for a class that trl 1.x no longer has
    register = EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"], vendor=["cpu"])
    register(FSDPEngineWithLMHead)
    folder = os.path.join(os.path.dirname(verl.__file__), "trainer/config")
    with initialize_config_dir(folder, version_base=None):
        model = f"actor_rollout_ref.model.path={model_dir}"
        config = compose("ppo_trainer", overrides=[model, *SETTINGS, *overrides]).actor_rollout_ref
    actor = ActorRolloutRefWorker(config, role="actor")
    actor.init_model()
    return actor, config


def batch(**fields: torch.Tensor) -> TensorDict:
    """Four responses of 8, 5, 3 and 6 random tokens, in verl's form without padding."""
    from verl.workers.utils.padding import left_right_2_no_padding

    ids = torch.randint(3, 100, (4, 13), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(13) < 5 + torch.tensor([[8], [5], [3], [6]])).long()
    mask = attention[:, 5:].clone()
    padded = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "prompts": ids[:, :5],
        "responses": ids[:, 5:],
        "response_mask": mask,
        **{name: x * mask for name, x in fields.items()},
    }
    return left_right_2_no_padding(TensorDict(padded, batch_size=4))


def main(model_dir: str, overrides: list[str]) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    actor, config = worker(model_dir, overrides)
    data = batch()
    tu.assign_non_tensor(data, temperature=1.0, calculate_entropy=False, compute_loss=False)
    logps = no_padding_2_padding(actor.compute_log_prob(data)["log_probs"], data)
    moved = 0.3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    data = batch(old_log_probs=logps + moved, advantages=torch.tensor([[1.0], [-1.0], [0.5], [-0.5]]).expand(4, 8))
    sizes = {"global_batch_size": 4, "mini_batch_size": 4, "epochs": 1, "seed": 42}
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=bool(config.actor.calculate_entropy),  # as verl's trainer passes it on
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
        **sizes,
    )
    metrics = tu.get(actor.update_actor(data), "metrics")
    print(json.dumps({name: float(values[0]) for name, values in metrics.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
