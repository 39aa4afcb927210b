"""Gives TRL's trainer the in-process CPU engine; on CUDA, TRL's own colocate and server modes are used unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from rlvr.errors import ConfigError
from rlvr.mole.model import expert_layers
from rlvr.rollout.cpu_engine import CpuEngine, EngineOptions, Sampling
from rlvr.rollout.parity import default_tolerance
from rlvr.rollout.weights import merged_parameters

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig
    from rlvr.trainers.policy import PolicyTrainer

DEFAULT_MODEL_LENGTH = 4096


def needs_cpu_engine(args: "PolicyConfig") -> bool:
    """Whether vLLM has to run in this process on the CPU. TRL's server mode needs NCCL, so there it is refused."""
    if not args.use_vllm or args.device.type == "cuda":
        return False
    if args.vllm_mode != "colocate":
        raise ConfigError(
            f"vllm_mode={args.vllm_mode!r} needs CUDA (its weight sync is NCCL): use vllm_mode: colocate"
        )
    unknown_here = {"vllm_structured_outputs_regex": None, "vllm_enable_sleep_mode": False, "trust_remote_code": False}
    for name, neutral in {**unknown_here, "vllm_tensor_parallel_size": 1}.items():
        if getattr(args, name) != neutral:
            raise ConfigError(f"{name}={getattr(args, name)!r} has no effect on the CPU engine: set {name}: {neutral}")
    return True


@contextmanager
def without_trl_engine(args: "PolicyConfig", own_engine: bool) -> Iterator[None]:
    """TRL's constructor must not build its own engine where ours is attached afterwards."""
    args.use_vllm = args.use_vllm and not own_engine
    try:
        yield
    finally:
        args.use_vllm = args.use_vllm or own_engine


def require_engine_of_experts(args: "PolicyConfig", own_engine: bool) -> None:
    """Refuse experts in an engine that would sample without them. Raises: ConfigError."""
    if args.use_vllm and not own_engine:
        raise ConfigError(
            "use_vllm=True would sample without the experts: TRL's vLLM runs CUDA graphs or another process, where "
            "they do not act, and routed experts do not merge into weights; set use_vllm: false"
        )


def attach_cpu_engine(trainer: "PolicyTrainer") -> None:
    """Build the engine and hand it to the trainer in place of TRL's.

    The seam is four attributes that TRL's own constructor sets.
    """
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = args.generation_kwargs or {}
    sampling = Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        extra={**given, "stop_token_ids": [*trainer.eos_token_ids, *given.get("stop_token_ids", [])]},
    )
    longest = getattr(base.config, "max_position_embeddings", DEFAULT_MODEL_LENGTH)
    options = EngineOptions(
        dtype=engine_dtype(trainer),
        max_model_len=args.vllm_max_model_length or min(longest, DEFAULT_MODEL_LENGTH),
    )
    trainer.vllm_generation = CpuEngine(
        base.config._name_or_path, lambda: merged_parameters(model), sampling, options, expert_layers(model)
    )
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "colocate", -1


def engine_dtype(trainer: "PolicyTrainer") -> Literal["float32", "bfloat16"]:
    """The engine's dtype: what was asked for, else what the trainer's forward computes in."""
    asked = trainer.args.vllm_dtype
    coarse = _computes_in_bf16(trainer) if asked is None else asked == "bfloat16"
    return "bfloat16" if coarse else "float32"


def engine_tolerance(trainer: "PolicyTrainer") -> float:
    """Largest accepted mean |log-prob difference| between engine and trainer, in nats."""
    if trainer.args.mismatch_tolerance is not None:
        return trainer.args.mismatch_tolerance
    exact = (
        trainer.args.device.type != "cuda" and engine_dtype(trainer) == "float32" and not _computes_in_bf16(trainer)
    )
    return default_tolerance("float32" if exact else "bfloat16")


def _computes_in_bf16(trainer: "PolicyTrainer") -> bool:
    return bool(trainer.args.bf16) or trainer.model.dtype == torch.bfloat16
