"""What a step of a real model allocates, as PyTorch's allocator reports it, for the tests of `rlvr.planning`."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from rlvr.planning.settings import Settings
from rlvr.trainers.forward import completion_statistics
from rlvr.trainers.head import add_token_stats

SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
EXPERTS = Qwen3MoeConfig(
    **SIZE, vocab_size=4000, head_dim=32, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2
)
MODELS = {
    "llama": LlamaConfig(**SIZE, vocab_size=8000, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZE, vocab_size=32000, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**{**SIZE, "num_hidden_layers": 7, "head_dim": 64}, vocab_size=1000),
    "wide": LlamaConfig(**{**SIZE, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2}),
}


def peak_of(job: Callable[[], object]) -> int:
    """Bytes allocated on the CPU at the peak, beyond what is there at the start."""
    gc.collect()  # what others left would be let go meanwhile, and counted against the job
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        job()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak


def alive() -> int:
    """Bytes of all tensors that Python reaches."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type != "meta":
            storage = one.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def build(config: Any, settings: Settings) -> Any:
    """The model as the trainer makes it, with gradients, as from the second micro-batch on."""
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa")
    whole = model
    if settings.use_peft:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=settings.lora_r, target_modules=settings.lora_target_modules, task_type="CAUSAL_LM")
        lora.lora_dropout = 0.0
        whole = get_peft_model(model, lora)
        if settings.gradient_checkpointing:
            whole.enable_input_require_grads()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_token_stats(model, temperature=1.0)
    for p in whole.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return whole.train()


def micro_batch(model: Any, settings: Settings, backward: Callable[[Tensor], object] = Tensor.backward) -> None:
    """Forward and backward through the fused head, on sequences at their longest, one of them padded."""
    device = next(model.parameters()).device
    rows, length = settings.per_device_train_batch_size, settings.length
    ids = torch.randint(3, 100, (rows, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, : settings.prompt_length // 2] = 0
    trained = torch.ones(rows, settings.max_completion_length, dtype=torch.bool, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.computes_in_bf16):
        found, _ = completion_statistics(model, ids, mask, trained, ("logps", "entropy"))
    advantages = torch.randn(rows, 1, device=device)
    backward(-(found["logps"] * advantages).mean() - 0.01 * found["entropy"].mean())
