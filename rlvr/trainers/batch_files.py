"""Micro-batches in a file: the rollout that a checkpoint falls into, and what a step that had to be skipped was on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Batch = Mapping[str, Any]


def write_batches(path: str | Path, batches: Sequence[Batch], state: Mapping[str, Any]) -> None:
    """A safetensors file: tensor `name` of micro-batch n as `n/name`; the rest, and `state`, as JSON in its metadata.

    state: plain JSON.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{n}/{name}": value.detach().cpu().contiguous().clone()
        for n, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    # Names in their order: coefficients of controls are combined in it.
    others = [{k: None if isinstance(value, Tensor) else value for k, value in batch.items()} for batch in batches]
    save_file(tensors, path, metadata={"rlvr": json.dumps({"batches": others, "state": dict(state)}, default=str)})


def read_batches(path: str | Path, device: Any = "cpu") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `write_batches` wrote: the micro-batches and the state."""
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["rlvr"])
        batches: list[dict[str, Any]] = described["batches"]
        for key in file.keys():  # noqa: SIM118  a safetensors file is no mapping
            n, _, name = key.partition("/")
            batches[int(n)][name] = file.get_tensor(key).to(device)
    return batches, described["state"]
