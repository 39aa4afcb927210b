"""Which backend computes a head, and why not a faster one."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_kernels import chunked
from rlvr_kernels.backend import Backend

BACKENDS = ("auto", "chunked", "triton", "triton_fused")
HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """name: of the backend.   why: it and not a faster one, for people to read."""

    name: str
    why: str


def choose_backend(hidden: Tensor, weight: Tensor) -> Choice:
    """What backend="auto" takes for these tensors."""
    refusal = triton_refusal(hidden, weight)
    if refusal is not None:
        return Choice("chunked", refusal)
    if hidden.device.type == "cpu":
        return Choice("chunked", "on a CPU Triton runs in its interpreter, which is for tests")
    return Choice("triton", "Triton kernels around the GPU library's matrix products")


def triton_refusal(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the Triton backends cannot run on these tensors, None if they can."""
    kind = hidden.device.type
    if kind == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return "the tensors are on a CPU"
    if kind not in ("cpu", "cuda") or torch.version.hip is not None:
        return f"the kernels are for CUDA, the tensors are on {'ROCm' if torch.version.hip else kind}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if kind == "cpu" and not _interpreter():
        return f"the tensors are on a CPU, and TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} does not interpret"
    if kind == "cuda" and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(hidden.device)} has less"
    for name, x in {"hidden": hidden, "weight": weight}.items():
        if x.dtype not in HALF_OR_FLOAT:
            return f"{name} is {x.dtype}; the kernels compute in float32"
    return None


def _interpreter() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def backend_named(name: str, hidden: Tensor, weight: Tensor) -> Backend:
    """The backend, or the one that "auto" stands for. Raises: ValueError if it is unknown or cannot run here."""
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not known; choose from {', '.join(BACKENDS)}")
    if name == "auto":
        name = choose_backend(hidden, weight).name
    if name == "chunked":
        return chunked.BACKEND
    refusal = triton_refusal(hidden, weight)
    if refusal is not None:
        raise ValueError(f"backend={name!r} cannot run here: {refusal}; use 'auto' or 'chunked'")
    from rlvr_kernels import triton_backend

    return triton_backend.FUSED if name == "triton_fused" else triton_backend.BACKEND
