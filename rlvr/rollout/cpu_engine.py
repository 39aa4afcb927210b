"""A vLLM engine in the training process, on a CPU, with the two methods TRL's trainer asks of one.

TRL's own colocate mode cannot be used there: it lets vLLM choose bfloat16 for a float32 policy, and after its weight
sync a tied output head silently keeps the old weights. vllm is imported when the first engine is built.
"""

import contextlib
import gc
import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlvr.errors import ConfigError
from rlvr.rollout.cpu_weights import load, require_loadable, weights_kept
from rlvr.rollout.experts import attach_experts

Parameters = Callable[[], Iterable[tuple[str, Tensor]]]
Rollouts = tuple[None, list[list[int]], list[list[list[float]]], None]

_FIELDS = frozenset({"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
_OWNED = _FIELDS | {"n", "seed", "logprobs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. The defaults sample from the policy itself.

    max_tokens: longest completion, in tokens.   top_k: 0 keeps the whole vocabulary.
    seed: None draws from torch's global generator, which the trainer saves in its checkpoints and seeds per rank; a
        number makes call k depend on (seed, k) alone and leaves the global generator where it was.
    extra: further fields of vllm.SamplingParams, for example {"stop_token_ids": [198]}.
    Raises: ConfigError for a value outside its range, or a field in extra that this class owns.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be positive")
        if owned := sorted(_OWNED & set(self.extra)):
            raise ConfigError(f"extra={owned} must be set as fields of Sampling (generation_kwargs may not hold them)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What of the engine is fixed when it is built.

    dtype: of weights and cache; the one the trainer computes in keeps sampler and trainer alike.
    max_model_len: prompt plus completion, tokens.   kv_cache_gib: memory for keys and values, GiB.
    block_size: tokens per cache block, a multiple of 32. Prompts share whole blocks only (vLLM's default is 128): a
        few-shot prefix of 32 tokens is computed once per rollout, one of 31 for every completion.
    Raises: ConfigError for another dtype or block size.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = 1024
    kv_cache_gib: float = 1.0
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16' on a CPU")
        if self.block_size < 32 or self.block_size % 32:
            raise ConfigError(f"block_size={self.block_size} must be a multiple of 32 on a CPU")


def require_vllm() -> None:
    """Say in one line that vllm is missing; imports nothing, so call it before a model is loaded.

    Raises: ConfigError if no importable `vllm` is installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "use_vllm=True but vllm is not installed; run `pip install 'rlvr[vllm]'` (CUDA) or `scripts/install.sh` "
            "(CPU), or set use_vllm=False to sample with transformers"
        )


class CpuEngine:
    """vLLM on the training process's own threads, weights copied from the policy before each rollout.

    checkpoint: directory or hub name that gives architecture and tokenizer.
    parameters: yields (name as in the checkpoint, tensor) of the policy, LoRA merged; called by each sync.
    experts: what acts beside the policy's linear layers, by their names in the checkpoint; called, never copied.
    Raises: ConfigError if vllm is missing or not a CPU build, or the options do not fit together.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        parameters: Parameters,
        sampling: Sampling,
        options: EngineOptions | None = None,
        experts: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.sampling = sampling
        self.options = options or EngineOptions()
        self.num_calls = 0
        self._parameters = parameters
        self._owns_process_group = not torch.distributed.is_initialized()
        if sampling.max_tokens >= self.options.max_model_len:
            raise ConfigError(
                f"max_model_len={self.options.max_model_len} leaves no room for a prompt beside "
                f"max_tokens={sampling.max_tokens}"
            )
        require_vllm()
        with _process_state_kept():
            self.llm = _build(str(checkpoint), self.options)
        self.llm.apply_model(require_loadable)
        if experts:
            self.llm.apply_model(lambda model: attach_experts(model, experts))

    def sync_weights(self) -> None:
        """Copy every policy weight into the engine and forget cached keys and values.

        Raises: RuntimeError naming the engine weights that `parameters` did not provide.
        """
        self.llm.apply_model(lambda model: load(model, self._parameters()))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached keys and values of the old weights: a request is still running")

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Rollouts:
        """Sample one completion per prompt; prompts come repeated num_generations times (not used otherwise).

        Returns: (None, B lists of token ids, B lists of one-element lists with the log-prob of each token, None). The
        log-probs, in nats, are those of the distribution sampled from: temperature, top_p and penalties included.
        Raises: ConfigError for images; ValueError if a prompt and max_tokens exceed max_model_len, which vLLM would
        answer by cutting completions short.
        """
        del num_generations
        if images is not None:
            raise ConfigError("images are not supported by the CPU engine; use text prompts")
        longest = max(map(len, prompts), default=0)
        if longest + self.sampling.max_tokens > self.options.max_model_len:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={self.sampling.max_tokens} exceed max_model_len="
                f"{self.options.max_model_len}; raise vllm_max_model_length or lower max_completion_length"
            )
        with profiler or contextlib.nullcontext(), self._random_stream():
            outputs = self.llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], self._sampling_params(), use_tqdm=False
            )
        self.num_calls += 1
        sampled = [output.outputs[0] for output in outputs]
        tokens = [list(one.token_ids) for one in sampled]
        logps = [
            [[entry[token].logprob] for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
            for one in sampled
        ]
        return None, tokens, logps, None

    def close(self) -> None:
        """Free the engine; calling it again does nothing."""
        llm, self.llm = getattr(self, "llm", None), None
        if llm is None:
            return
        from vllm.distributed.parallel_state import destroy_model_parallel
        from vllm.v1.engine import core

        clean_up = core.cleanup_dist_env_and_memory
        if not self._owns_process_group:  # the trainer's group: vLLM would destroy it with its own
            core.cleanup_dist_env_and_memory = destroy_model_parallel
        try:
            llm.llm_engine.engine_core.shutdown()
        finally:
            core.cleanup_dist_env_and_memory = clean_up
        del llm
        gc.collect()

    def __enter__(self) -> "CpuEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _sampling_params(self) -> Any:
        """The settings as vLLM's SamplingParams, with the log-prob of the sampled token only."""
        from vllm import SamplingParams

        fields = {name: getattr(self.sampling, name) for name in _FIELDS}
        return SamplingParams(n=1, logprobs=0, **fields, **self.sampling.extra)

    @contextlib.contextmanager
    def _random_stream(self) -> Iterator[None]:
        """Random numbers of this call. vLLM's own per-request seed would give all siblings one completion."""
        if self.sampling.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.sampling.seed, self.num_calls)) % 2**63)
            yield


def _build(checkpoint: str, options: EngineOptions) -> Any:
    """The vllm.LLM, with weights that can be loaded again."""
    import vllm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError("the installed vllm is not a CPU build; on this machine use TRL's colocate or server mode")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    with weights_kept():
        return vllm.LLM(
            checkpoint,
            dtype=options.dtype,
            enforce_eager=True,
            max_model_len=options.max_model_len,
            block_size=options.block_size,
            kv_cache_memory_bytes=int(options.kv_cache_gib * 2**30),
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
        )


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what importing and building vLLM does to the training process.

    It makes torch.set_num_threads a no-op, seeds the global generators with 0 and sets some fifteen environment
    variables, LOCAL_WORLD_SIZE=1 and LD_PRELOAD among them. VLLM_* variables stay, nothing else reads them.
    """
    environment = dict(os.environ)
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    os.environ.update(ours)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name in set(os.environ) - set(environment):
            if name in ours or not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(environment)
