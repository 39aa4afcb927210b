"""Weights on their way to a vLLM server on the same machine: safetensors files in shared memory, a part at a time.

The server draws one path when it starts and tells it to whoever asks; the client writes there, and names no path in a
request, so a server never opens a file of somebody else's choice.
"""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

PART_BYTES = 2**28  # of one file: what writer and server hold beside their weights; a larger tensor is a file alone
_SHARED = Path("/dev/shm")


def new_path() -> Path:
    """Where a server's weights are handed over: nobody else can guess the name, or replace it."""
    folder = _SHARED if _SHARED.is_dir() else Path(tempfile.gettempdir())
    return folder / f"rlvr-weights-{secrets.token_hex(16)}.safetensors"


def parts(parameters: Iterable[tuple[str, Tensor]], most: int = PART_BYTES) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors in dicts of at most `most` bytes, or of one tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in parameters:
        if part and size + tensor.nbytes > most:
            yield part
            part, size = {}, 0
        part[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        part[name].copy_(tensor.detach())
        size += tensor.nbytes
    yield part


def write(path: Path, part: dict[str, Tensor], version: str = "") -> None:
    """Put a part at the agreed path, for this user's eyes only. Raises: RuntimeError if shared memory is full.

    version: of the weights, which its reader must expect.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        save_file(part, path, metadata={"version": version})
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensor in part.values())
        raise RuntimeError(
            f"{path.parent} has no room for {need / 2**20:.0f} MiB of weights ({error}): give it more (in Docker: "
            "--shm-size)"
        ) from error


def read(path: Path, version: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the part at the agreed path. Raises: ValueError unless it is a plain file of this user, and of
    that version.
    """
    from safetensors import safe_open

    try:
        found = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"no weights at {path}: trainer and server must share a machine and its /dev/shm") from None
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
        raise ValueError(f"{path} is not a plain file of this user: it is not loaded")
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("version") != version:
            raise ValueError("another run sends weights to this server: start one server for each run")
        for name in file.keys():  # noqa: SIM118  it is no mapping
            yield name, file.get_tensor(name)
