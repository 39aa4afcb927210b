"""Refuses launches that silently are something else: one process for several, several that do not know of each other,
another optimizer.
"""

from collections.abc import Mapping
from typing import Any

from rlvr.errors import ConfigError

# Where accelerate and transformers read how many processes there are: torchrun's, and three of MPI.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_launch(environ: Mapping[str, str], has_accelerator: bool) -> None:
    """Refuse what accelerate would run otherwise than it was asked to. Raises: ConfigError.

    Its launcher of one process names a MASTER_ADDR where it was asked for several (`--num_processes 2` with `--cpu`,
    MULTI_CPU, or without `--multi_gpu`), but starts one. FSDP is not for CPUs: copies would train side by side.
    environ: of a launched process, before a library adds to it.
    """
    if environ.get("ACCELERATE_USE_FSDP") == "true" and not has_accelerator:
        raise ConfigError(
            "FSDP needs an accelerator: on a CPU accelerate trains unsharded copies; launch with "
            "--config_file recipes/accelerate/cpu2.yaml"
        )
    one = "ACCELERATE_USE_CPU" in environ and not any(name in environ for name in WORLD_SIZES)
    if one and "MASTER_ADDR" in environ:
        several = "ddp.yaml" if has_accelerator else "cpu2.yaml"
        raise ConfigError(
            "num_processes: accelerate was asked for several and started one, or MASTER_ADDR is exported; launch with "
            f"--config_file recipes/accelerate/{several} --num_processes N (one process: 1, and MASTER_ADDR unset)"
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1 and not any(name in environ for name in WORLD_SIZES):
        raise ConfigError(
            f"srun started {tasks} processes that do not know of each other: start one launcher per machine, "
            "srun --ntasks-per-node=1 bash -c 'accelerate launch ... --machine_rank $SLURM_NODEID ...'"
        )


def check_precision(args: Any) -> None:
    """Refuse a launch file that computes in another precision than the settings say. Raises: ConfigError.

    args: TrainingArguments, which silently take the file's where it is the coarser one.
    """
    wanted = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    if args.mixed_precision != wanted:
        raise ConfigError(
            f"bf16={args.bf16}, but the launch computes in {args.mixed_precision}: add --mixed_precision {wanted} to "
            "accelerate launch, or set bf16: true"
        )


def check_deepspeed(args: Any) -> None:
    """`check_offload` of TrainingArguments. Raises: ConfigError."""
    if plugin := getattr(args, "deepspeed_plugin", None):
        optim = getattr(args.optim, "value", args.optim)
        settings = plugin.deepspeed_config
        if settings.get("zero_force_ds_cpu_optimizer", True):
            check_offload(str(optim), settings.get("zero_optimization", {}))


def check_offload(optim: str, zero_optimization: Mapping[str, Any]) -> None:
    """Refuse optimizers of which accelerate makes Adam, SGD included, where DeepSpeed keeps their states on the CPU.

    zero_optimization: of DeepSpeed's configuration.   Raises: ConfigError.
    """
    device = (zero_optimization.get("offload_optimizer") or {}).get("device", "none")
    if device not in (None, "none") and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError(
            f"optim={optim!r} becomes Adam where DeepSpeed offloads its states: set optim: adamw_torch, or launch "
            "without offload"
        )
