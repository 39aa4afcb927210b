"""A plan as text: what each launch takes, the simplest that fits, how to start it, and what was assumed."""

from collections.abc import Sequence

from rlvr.planning.memory import CONTEXT, GIB, HALF, USABLE, Estimate, ModelShape, engine_sequences, estimates
from rlvr.planning.settings import Settings

ASSUMED = (
    f"an estimate: {CONTEXT / GIB:g} GiB for CUDA and NCCL, {1 - USABLE:.0%} of a GPU lost by the allocator,\n"
    "completions at their longest, attention that keeps no scores (sdpa)"
)
ENGINE_REMEDIES = (
    "the engine has no room: raise vllm_gpu_memory_utilization or\nvllm_tensor_parallel_size, or set vllm_mode server"
)
COLUMNS = ("launch", "weights", "grads", "optim", "buffers", "ref+critic", "pass", "peak", "of", "", "host")


def describe(shape: ModelShape, settings: Settings, words: Sequence[str] = ()) -> str:
    """The plan. words: flags of the run, for the command that starts it."""
    found = estimates(shape, settings)
    engine = not settings.colocated or engine_sequences(shape, settings) >= 1
    best = next((one for one in found if one.fits), None) if engine else None
    rows = [("one pass", _pass(settings)), ("rollouts", _engine(shape, settings))]
    if best is None:
        rows.append(("nothing fits", _remedies(settings, found) if engine else ENGINE_REMEDIES))
    else:
        rows += [("fits", _choice(best, shape, settings)), ("launch", _command(best.strategy, settings, words))]
    rows.append(("assumed", ASSUMED))
    width = max(len(name) for name, _ in rows)
    indent = "\n" + " " * (width + 2)
    lines = [f"{name:<{width}}  {text.replace(chr(10), indent)}" for name, text in rows]
    return "\n".join([_model(shape, settings), "", *_table([COLUMNS, *(_row(one) for one in found)]), "", *lines])


def _choice(best: Estimate, shape: ModelShape, settings: Settings) -> str:
    told = f"{best.strategy}, the simplest that does"
    if best.host:
        told += f", if each machine has {best.host / GIB:.0f} GiB of memory to spare"
    if best.strategy in ("one_gpu", "ddp") and settings.dtype != "float32" and not shape.adapters:
        told += "\n(but bfloat16 weights lose small updates: set dtype float32, or launch with DeepSpeed)"
    return told


def _model(shape: ModelShape, settings: Settings) -> str:
    trained = f"LoRA of {shape.adapters / 1e6:.1f} M trained" if shape.adapters else "all trained"
    size = f"{shape.parameters / 1e9:.2f} B parameters, {trained}, {settings.dtype} weights, {settings.optim}"
    return f"{settings.model_name_or_path}: {size}"


def _row(one: Estimate) -> tuple[str, ...]:
    held, others = one.policy, one.others
    sizes = (held.weights, held.gradients, held.optimizer, held.buffers + others.buffers, others.always)
    fits = "fits" if one.fits else f"no, {one.phase}"
    host = f"{one.host / GIB:.0f}" if one.host else ""
    return (one.strategy, *(_gib(x) for x in (*sizes, one.passed, one.peak, one.room)), fits, host)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size > 0.05 * GIB else "-"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = {0, COLUMNS.index("")}
    lines = []
    for row in rows:
        cells = (x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return ["GiB of each GPU; host: GiB of each machine's memory", *lines]


def _pass(settings: Settings) -> str:
    tokens = f"{settings.prompt_length} + {settings.max_completion_length} tokens"
    checkpoints = "with" if settings.gradient_checkpointing else "without"
    each = f"{settings.per_device_train_batch_size} sequences of {tokens} on each of {settings.gpus} GPU(s)"
    return f"{each}, {checkpoints} gradient checkpointing"


def _engine(shape: ModelShape, settings: Settings) -> str:
    weights = f"{HALF * shape.parameters / GIB:.1f} GiB of bfloat16 weights"
    token = f"{HALF * shape.cached / 1024:.0f} KiB per token of KV cache"
    if not settings.use_vllm:
        cache = settings.rollout_size * settings.length * shape.cached * HALF / GIB
        return (
            f"by transformers, {settings.rollout_size} sequences at once: KV cache of {cache:.1f} GiB; slow: use_vllm"
        )
    if not settings.colocated:
        return f"vLLM server, on GPUs that are not counted here: {weights},\n{token}"
    share = settings.vllm_gpu_memory_utilization * settings.gpu_memory
    many = engine_sequences(shape, settings)
    held = (
        f"room for {int(many)} of the longest sequences" if many >= 1 else "NO ROOM for one of the longest sequences"
    )
    return f"vLLM colocated, {share:.1f} GiB of each GPU: {weights},\n{token}, {held}"


def _command(strategy: str, settings: Settings, words: Sequence[str]) -> str:
    script = "recipes/grpo.py" if settings.critic == "none" else "recipes/ppo.py"
    several = ""
    if settings.nodes > 1:
        several = f" --num_machines {settings.nodes} --machine_rank R --main_process_ip HOST --main_process_port 29500"
        several += " --deepspeed_multinode_launcher standard" if strategy.startswith("zero") else ""
    processes = "" if strategy == "one_gpu" else f" --num_processes {settings.gpus}"  # of all machines
    several += " --mixed_precision no" if settings.bf16 is False else ""
    first = f"accelerate launch --config_file recipes/accelerate/{strategy}.yaml{processes}{several}"
    lines = [*_wrapped(first.split()), *_wrapped([script, *words])]
    where = "\n(on each machine, R its number, HOST the address of machine 0)" if settings.nodes > 1 else ""
    return " \\\n".join(lines) + where


def _wrapped(words: Sequence[str], width: int = 84) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _remedies(settings: Settings, found: Sequence[Estimate]) -> str:
    least = min(found, key=lambda one: one.peak - one.room)
    ways = {
        "vllm_mode server": settings.colocated,
        "per_device_train_batch_size 1": settings.per_device_train_batch_size > 1,
        "gradient_checkpointing": not settings.gradient_checkpointing,
        "use_peft": not settings.use_peft,
        "use_vllm": not settings.use_vllm and least.phase == "rollout",
    }
    tried = ", ".join([way for way, open_ in ways.items() if open_] + ["more or larger GPUs"])
    return (
        f"{least.strategy} is nearest, {(least.peak - least.room) / GIB:.1f} GiB short ({least.phase});\ntry {tried}"
    )
