"""Gives TRL's trainer our engines on a CPU, in this process or of `rlvr serve`; on CUDA it uses its own, unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlvr.errors import ConfigError
from rlvr.mole.model import expert_layers
from rlvr.rollout.cpu_engine import CpuEngine, EngineOptions, Sampling
from rlvr.rollout.parity import default_tolerance
from rlvr.rollout.server_engine import ServerEngine, ServerOptions
from rlvr.rollout.weights import merged_parameters
from rlvr.trainers.head import shards_parameters

if TYPE_CHECKING:
    from rlvr.trainers.config import PolicyConfig
    from rlvr.trainers.policy import PolicyTrainer

DEFAULT_MODEL_LENGTH = 4096


def needs_cpu_engine(args: "PolicyConfig") -> bool:
    """Whether vLLM runs on the CPU: TRL's colocate mode is wrong there, and its server mode needs NCCL."""
    if not args.use_vllm or args.device.type == "cuda":
        return False
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
    if args.use_vllm and (not own_engine or args.vllm_mode == "server"):
        raise ConfigError(
            "use_vllm=True would sample without the experts: TRL's vLLM runs CUDA graphs or another process, where "
            "they do not act, and routed experts do not merge into weights; set use_vllm: false"
        )


def attach_cpu_engine(trainer: "PolicyTrainer") -> None:
    """Build the engine and hand it to the trainer in place of TRL's.

    The seam is four attributes that TRL's own constructor sets.
    """
    args = trainer.args
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
    make = _server_engine if args.vllm_mode == "server" else _engine_in_process
    trainer.vllm_generation = make(trainer, sampling)
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, args.vllm_mode, -1


def _engine_in_process(trainer: "PolicyTrainer", sampling: Sampling) -> CpuEngine:
    model, base = _policy(trainer)
    experts = expert_layers(model)
    if experts and shards_parameters(trainer):
        raise ConfigError(
            "use_vllm=True calls the experts themselves, which ZeRO-3 shards: use ZeRO-2, or set use_vllm: false"
        )
    longest = getattr(base.config, "max_position_embeddings", DEFAULT_MODEL_LENGTH)
    options = EngineOptions(
        dtype=engine_dtype(trainer),
        max_model_len=trainer.args.vllm_max_model_length or min(longest, DEFAULT_MODEL_LENGTH),
    )
    return CpuEngine(base.config._name_or_path, lambda: merged_parameters(model), sampling, options, experts)


def _server_engine(trainer: "PolicyTrainer", sampling: Sampling) -> ServerEngine:
    args = trainer.args
    if getattr(trainer, "tools", None) and args.world_size > 1:
        raise ConfigError("tools of several processes ask the engine at different times: use vllm_mode: colocate")
    model, base = _policy(trainer)
    options = ServerOptions(
        url=args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}",
        timeout=args.vllm_server_timeout,
        dtype=engine_dtype(trainer),
        max_model_len=args.vllm_max_model_length,
        config=base.config.get_text_config().to_dict(),
    )

    def check_again() -> None:
        trainer._parity_checked = False

    return ServerEngine(lambda: merged_parameters(model), sampling, options, on_restart=check_again)


def _policy(trainer: "PolicyTrainer") -> tuple[Any, Any]:
    """The unwrapped policy, and the model of its checkpoint in it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model, model.get_base_model() if hasattr(model, "get_base_model") else model


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
