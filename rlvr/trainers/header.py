"""The table printed before training: what one step is, so that nobody has to do batch arithmetic in their head."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from rlvr_kernels import choose_backend

if TYPE_CHECKING:
    from rlvr.mole.tracker import RouterTracker
    from rlvr.trainers.config import PolicyConfig
    from rlvr.trainers.policy import PolicyTrainer


def header(trainer: "PolicyTrainer") -> str:
    """The table as text."""
    task = trainer.run_config.get("task_description") or "reward functions of the caller"
    rows = [("model", describe(trainer.model, trainer.args)), *trainer.header_rows(), ("task", task)]
    rows += [*_step(trainer), *_objective(trainer), *_warnings(trainer)]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join(["", "one step =", *lines, ""])


def describe(model: Any, args: "PolicyConfig") -> str:
    """A model by name, size and precision."""
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in parameters), sum(n for n, grad in parameters if grad)
    share = "" if trained == total else f", {trained / 1e6:.2f} M trained (LoRA)"
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.config._name_or_path}: {total / 1e6:.1f} M parameters{share}, {dtype} weights, {precision}"


def _step(trainer: "PolicyTrainer") -> list[tuple[str, str]]:
    args = trainer.args
    ranks = trainer.accelerator.num_processes
    completions = args.generation_batch_size
    updates = args.updates_per_rollout
    engine = "transformers"
    if trainer.use_vllm:
        engine = f"vLLM, {type(trainer.vllm_generation).__name__}, {trainer.vllm_mode}"
    reuse = (
        f"{updates:g} optimizer steps per rollout" if updates >= 1 else f"{1 / updates:g} rollouts per optimizer step"
    )
    per_step = args.per_device_train_batch_size * ranks * args.gradient_accumulation_steps
    return [
        (
            "rollout",
            f"{completions // args.num_generations} prompts x {args.num_generations} = {completions} completions of "
            f"at most {args.max_completion_length} tokens, temperature {args.temperature:g}, by {engine}",
        ),
        (
            "optimizer step",
            f"{per_step} completions = {ranks} process(es) x {args.gradient_accumulation_steps} micro-batches x "
            f"{args.per_device_train_batch_size}; at most {per_step * args.max_completion_length} tokens",
        ),
        ("reuse", f"{reuse} ({args.num_iterations} pass(es) over each rollout)"),
        (
            "run",
            f"{trainer.state.max_steps} optimizer steps, learning rate {args.learning_rate:g} "
            f"{_name(args.lr_scheduler_type)}",
        ),
    ]


def _head(trainer: "PolicyTrainer") -> str:
    if not trainer._own_head:
        return "TRL's"
    weight = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    backend, why = choose_backend(weight, weight)
    idle = "; sequences without any gradient are not trained on" if trainer.args.skip_idle_sequences else ""
    return f"rlvr_kernels, {backend} ({why}){idle}"


def _experts(routers: "RouterTracker") -> str:
    layers = list(routers.layers.values())
    counts = sorted({experts.num_experts for experts in layers})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} of rank {layers[0].r} beside each of {len(layers)} layers, {_settings(routers.router)}"


def _objective(trainer: "PolicyTrainer") -> list[tuple[str, str]]:
    args = trainer.args
    rows = [
        ("surrogate", _settings(args.surrogate_fn)),
        ("aggregation", f"{args.aggregation} (loss_type {args.loss_type}); advantages {args.advantages_line}"),
    ]
    rows.append(("head", _head(trainer)))
    if trainer.routers is not None:
        rows.append(("experts", _experts(trainer.routers)))
    for control in args.control_list:
        rows.append(("control", f"{control.name}: {_settings(control)}"))
    if not args.control_list:
        rows.append(("control", "none"))
    if args.thermostat_config is not None:
        one = args.thermostat_config
        moves = f"moves {one.lever} within [{one.lowest:g}, {one.highest:g}]"
        rows.append(("thermostat", f"holds entropy in [{one.low:g}, {one.high:g}] nats: {moves}"))
    if args.beta and "reference_kl" not in [control.name for control in args.control_list]:
        rows.append(("reference KL", f"beta {args.beta:g}"))
    if trainer.use_vllm and args.vllm_importance_sampling_correction:
        rows.append(
            (
                "engine correction",
                f"{args.vllm_importance_sampling_mode}, at most {args.vllm_importance_sampling_clip_max}",
            )
        )
    rows.append(
        (
            "entropy",
            f"exact, nats, of softmax(z / {args.temperature:g}), mean over the trained tokens of the step, all ranks"
            + (", skipped ones as of the rollout" if args.skip_idle_sequences and trainer._own_head else ""),
        )
    )
    return rows


def _warnings(trainer: "PolicyTrainer") -> list[tuple[str, str]]:
    """What will probably not do what its user expects."""
    if trainer.is_deepspeed_enabled:
        return []
    return rounding_warning(trainer.model, "learning_rate", trainer.args.learning_rate)


def rounding_warning(model: Any, name: str, rate: float) -> list[tuple[str, str]]:
    """A row if steps of a learning rate, the field `name`, are too small for the trained weights of a model."""
    if rate >= 1e-5 or all(p.dtype != torch.bfloat16 for p in model.parameters() if p.requires_grad):
        return []
    text = (
        f"the trained weights are bfloat16 and keep 3 digits: most updates at {name} {rate:g} round to nothing. Set "
        "dtype: float32 (bf16: true still computes in bfloat16), or use DeepSpeed, which keeps float32 copies"
    )
    return [("WARNING", text)]


def _settings(instance: Any) -> str:
    values = ", ".join(f"{f.name}={getattr(instance, f.name)}" for f in fields(instance))
    return f"{type(instance).__name__}({values})"


def _name(scheduler: Any) -> str:
    return str(getattr(scheduler, "value", scheduler))
