"""Bytes on each GPU: what stays for the whole run, and what a pass, an optimizer step or a rollout adds at its peak.

The constants are those of the libraries as they are configured in recipes/accelerate; each says where it is from.
"""

from dataclasses import dataclass
from typing import NamedTuple

from rlvr.planning.settings import DTYPES, OPTIMIZERS, Settings

GIB = 2**30
FLOAT, HALF = 4, 2
# DeepSpeed's defaults, in numbers, of which it keeps as many in bfloat16: reduce_bucket_size, which is allocated whole
# however small the model is; stage3_max_live_parameters and stage3_prefetch_bucket_size; sub_group_size.
BUCKET, LIVE, PREFETCH, SUB_GROUP = 5 * 10**8, 10**9, 5 * 10**7, 10**9
# Of rlvr_kernels: tokens and vocabulary of a tile, and on GPUs how many gradients by logits are held.
CHUNKED_TILE = (512, 1024)
TRITON_TILE, TRITON_SPLIT, TRITON_GRADIENTS = (2048, 4096), 16384, 2**27
CONTEXT = 1.5 * GIB  # CUDA's context, cuBLAS, NCCL: an assumption
USABLE = 0.95  # of a GPU; the rest is lost between blocks of the allocator: an assumption
ENGINE = 1.0 * GIB  # vLLM's own passes and graphs: an assumption

SINGLE = ("one_gpu", "zero2_offload", "zero3_offload")
SEVERAL = ("ddp", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload")  # in the order of preference


class Passes(NamedTuple):
    """Bytes beyond weights and gradients, of the backbone on one micro-batch.

    forward: at the peak of the forward pass.   saved: at its end.   backward: at the peak of the backward pass.
    """

    forward: int
    saved: int
    backward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """parameters: of the model.   adapters: of LoRA on it, 0 for none.   head: vocabulary * hidden.   layer: of the
    largest decoder layer.   cached: numbers per token of a KV cache.   passes: of weights in the settings' dtype;
    passes_in_half: of weights in bfloat16 without autocast, as DeepSpeed and FSDP compute.
    """

    parameters: int
    adapters: int
    layers: int
    layer: int
    hidden: int
    vocabulary: int
    tied: bool
    cached: int
    passes: Passes
    passes_in_half: Passes

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        return self.parameters + self.adapters


class Weights(NamedTuple):
    """Numbers of a model, and how many of them are trained."""

    total: int
    trained: int


@dataclass(slots=True)
class Held:
    """Bytes that stay for the run; `buffers` while a pass is made, `step` more in an optimizer step. host: of each
    machine's memory.
    """

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    buffers: float = 0
    step: float = 0
    host: float = 0

    @property
    def always(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One launch. others: reference and critic.   passed: activations and the head at the peak of a pass.
    peak: the most at any time.   phase: when.   room: what training may use of a GPU.
    """

    strategy: str
    policy: Held
    others: Held
    passed: float
    peak: float
    phase: str
    room: float

    @property
    def fits(self) -> bool:
        """On the GPU; a colocated engine may still lack room of its own, see `engine_sequences`."""
        return self.peak <= self.room

    @property
    def host(self) -> float:
        return self.policy.host + self.others.host


def estimates(shape: ModelShape, settings: Settings) -> list[Estimate]:
    """Of each way to launch on that many GPUs, the simplest first."""
    names: tuple[str, ...] = SINGLE if settings.gpus == 1 else SEVERAL
    if settings.critic != "none":
        names = tuple(name for name in names if name != "fsdp2")  # PPO refuses it
    if not settings.optim.startswith("adamw_torch"):
        names = tuple(name for name in names if not name.endswith("_offload"))  # which would make Adam of it
    return [_estimate(name, shape, settings) for name in names]


def pass_moments(
    shape: ModelShape, settings: Settings, *, replicated: bool, tile_of: str = "triton"
) -> dict[str, float]:
    """Bytes that a pass keeps beside the weights, by moment.

    replicated: each process has the weights whole, as they were loaded.   tile_of: the head's backend.
    """
    passes = shape.passes if replicated else shape.passes_in_half
    width = DTYPES[settings.dtype] if replicated else HALF
    tied = width * shape.head if shape.tied and not shape.adapters else 0  # its gradient waits for the embedding's
    of_head = head_bytes(shape, settings, tile_of=tile_of, replicated=replicated)
    return {
        "forward": passes.forward,
        "head": passes.saved + of_head,
        "backward": passes.backward + tied,
    }


def _estimate(strategy: str, shape: ModelShape, settings: Settings) -> Estimate:
    policy = held(strategy, Weights(shape.total, shape.adapters or shape.parameters), shape, settings)
    others = Held()
    for weights in _other_models(shape, settings):
        one = held(strategy, weights, shape, settings)
        for name in Held.__slots__:
            setattr(others, name, getattr(others, name) + getattr(one, name))
    replicated = strategy in ("one_gpu", "ddp")
    always = policy.always + others.always + CONTEXT
    moments = pass_moments(shape, settings, replicated=replicated)
    phases = {name: always + policy.buffers + others.buffers + x for name, x in moments.items()}
    phases["step"] = always + policy.step + others.step
    rollout = always + _rollout(strategy, shape, settings)
    phases["rollout"] = rollout
    share = settings.vllm_gpu_memory_utilization * settings.gpu_memory * GIB if settings.colocated else 0.0
    room = USABLE * settings.gpu_memory * GIB
    if settings.vllm_enable_sleep_mode:
        phases["rollout"] += share
    else:
        room -= share
    phase = max(phases, key=lambda name: phases[name])
    return Estimate(
        strategy=strategy,
        policy=policy,
        others=others,
        passed=max(moments.values()),
        peak=phases[phase],
        phase=phase,
        room=room,
    )


def _other_models(shape: ModelShape, settings: Settings) -> list[Weights]:
    found = []
    if settings.beta and not shape.adapters:  # adapters are switched off instead
        found.append(Weights(shape.parameters, 0))
    if settings.critic not in ("none", "shared"):
        backbone = shape.parameters - (0 if shape.tied else shape.head)
        lora = settings.use_peft if settings.critic_lora is None else settings.critic_lora
        adapters = shape.adapters if lora else 0
        found.append(Weights(backbone + adapters, adapters or backbone))
    return found


def held(strategy: str, model: Weights, shape: ModelShape, settings: Settings) -> Held:
    """Of one model under a strategy."""
    ranks, per_node = settings.gpus, settings.gpus // settings.nodes
    total, trained = model
    frozen = total - trained
    kept, kept_bytes = OPTIMIZERS[settings.optim]
    if strategy in ("one_gpu", "ddp"):
        width = DTYPES[settings.dtype]
        of_trained = FLOAT if frozen else width  # PEFT keeps adapters in float32
        gradients = of_trained * trained
        return Held(
            weights=width * frozen + of_trained * trained,
            gradients=gradients,
            optimizer=kept * (kept_bytes or of_trained) * trained,
            buffers=gradients if strategy == "ddp" else 0,  # DDP's buckets are copies
            step=of_trained * trained if settings.optim == "adamw_torch" else 0,  # multi-tensor kernels
        )
    states = (FLOAT + kept * (kept_bytes or FLOAT)) * trained / ranks  # float32 weights and the optimizer's
    bucket = HALF * BUCKET if trained else 0
    if strategy == "fsdp2":
        outside = shape.head * (1 if shape.tied else 2) + 2 * shape.layer  # the root's and two layers', gathered
        return Held(
            weights=(DTYPES[settings.dtype] * frozen + FLOAT * trained) / ranks,
            gradients=FLOAT * trained / ranks,
            optimizer=kept * (kept_bytes or FLOAT) * trained / ranks,
            buffers=HALF * (outside + (0 if frozen else shape.head + shape.layer)),
        )
    offloaded, largest = strategy.endswith("_offload"), max(shape.head, shape.layer)
    on_host = (states * ranks + FLOAT * trained) * per_node / ranks if offloaded else 0.0  # and float32 gradients
    result = Held(optimizer=0 if offloaded else states, gradients=0 if offloaded else HALF * trained / ranks)
    if strategy.startswith("zero2"):
        result.weights = HALF * total
        result.buffers = bucket + (HALF * largest if offloaded else 0)
        result.step = 0 if offloaded else (HALF + FLOAT) * trained / ranks  # flattened, then in float32
        result.host = on_host + (HALF * (trained + largest) * per_node if offloaded else 0)  # each rank's gradients
        return result
    result.weights = 0 if offloaded else HALF * total / ranks
    result.buffers = HALF * (min(total, LIVE + PREFETCH) + min(trained, BUCKET)) + bucket  # gathered; flat, to reduce
    result.step = 0 if offloaded else FLOAT * min(trained / ranks, SUB_GROUP)
    result.host = on_host + (HALF * (total + trained) * per_node / ranks if offloaded else 0)
    return result


def head_bytes(shape: ModelShape, settings: Settings, *, tile_of: str, replicated: bool = True) -> float:
    """The head's peak, in its backward pass, with all completions at their longest. tile_of: chunked or triton."""
    tokens, hidden = settings.per_device_train_batch_size * settings.max_completion_length, shape.hidden
    computed = HALF if settings.computes_in_bf16 else FLOAT
    stored = DTYPES[settings.dtype] if replicated else HALF
    gradient = 0 if shape.adapters else stored * shape.head
    # Hidden states and those with a gradient; their gradient in float32, converted, and where it is put together.
    end = tokens * hidden * (FLOAT + 5 * computed)
    if tile_of == "chunked":
        rows, columns = min(CHUNKED_TILE[0], tokens), min(CHUNKED_TILE[1], shape.vocabulary)
        tiles = 4 * rows * columns + (3 * columns + rows) * hidden
        middle = tokens * hidden * (2 * computed + 2 * FLOAT) + FLOAT * tiles
    else:
        rows, columns = TRITON_TILE
        split = min(TRITON_SPLIT, max(TRITON_GRADIENTS // tokens // columns, 1) * columns, shape.vocabulary)
        tile = FLOAT * min(rows, tokens) * columns
        middle = tokens * hidden * (2 * computed + FLOAT) + tokens * split * computed + tile
        middle += 0 if shape.adapters else FLOAT * split * hidden
    return max(middle, end) + gradient


def _rollout(strategy: str, shape: ModelShape, settings: Settings) -> float:
    """What generation by transformers adds: a KV cache, and whole weights where they are sharded."""
    if settings.use_vllm:
        return 0.0
    computed = HALF if settings.computes_in_bf16 else FLOAT
    cache = settings.rollout_size * settings.length * shape.cached * computed
    return cache + (HALF * shape.total if strategy.startswith(("zero3", "fsdp2")) else 0)


def engine_sequences(shape: ModelShape, settings: Settings) -> float:
    """Longest sequences that a colocated engine's KV cache holds; negative where its weights do not fit."""
    share = settings.vllm_gpu_memory_utilization * settings.gpu_memory * GIB * settings.vllm_tensor_parallel_size
    room = share - HALF * shape.parameters - ENGINE * settings.vllm_tensor_parallel_size
    return room / (HALF * shape.cached * settings.length)
