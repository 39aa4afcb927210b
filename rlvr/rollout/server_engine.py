"""A vLLM server on this machine as a trainer's engine, with the two methods TRL's trainer asks of one.

The server may be killed and started again while training. It comes back with its checkpoint's weights, which shows
because it names the weights of each token; the policy's are sent again and the completions drawn again.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import distributed

from rlvr.errors import ConfigError, RunError
from rlvr.rollout.cpu_engine import Parameters, Rollouts, Sampling
from rlvr.rollout.server_client import START, ServerClient, ServerLost

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_ATTEMPTS = 5  # at one rollout, before a server that comes back and fails again is given up
_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_EXTRA = {  # what of vllm.SamplingParams a rollout may want besides; the server ignores unknown names without a word
    "allowed_token_ids", "bad_words", "frequency_penalty", "ignore_eos", "logit_bias", "min_tokens",
    "presence_penalty", "stop", "stop_token_ids",
}  # fmt: skip
_SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip


class EngineUnavailableError(RunError):
    """The server is gone and did not come back in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server is, and what it must be.

    url: http://host:port.   timeout: seconds to wait for it, at the start and each time it is gone.
    dtype: it must compute in.   max_model_len: that it must take at least; None for any.
    config: of the policy's model, whose shape it must have.
    """

    url: str
    timeout: float = 240.0
    dtype: str = "float32"
    max_model_len: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class ServerEngine:
    """Completions of a server that `rlvr serve` has started; the policy's weights go there before each rollout.

    parameters: yields (name as in the checkpoint, tensor) of the policy, LoRA merged; called by each sync.
    on_restart: called on every rank when the server was lost, before its next completions are returned.

    Every method is called by all ranks of the process group together. Each rank draws its own completions; the first
    one sends the weights, and must share a machine with the server. Each completion has a seed of its own, drawn from
    torch's global generator (or by sampling.seed): siblings differ, and with the same generator state, weights and
    prompts the same completions come back, up to what rounding decides.
    Raises: ConfigError for a server that does not fit; EngineUnavailableError if there is none within the timeout.
    """

    def __init__(
        self,
        parameters: Parameters,
        sampling: Sampling,
        options: ServerOptions,
        on_restart: Callable[[], None] = lambda: None,
    ) -> None:
        if unknown := sorted(set(sampling.extra) - _EXTRA):
            raise ConfigError(
                f"generation_kwargs={unknown} do not reach a vLLM server: use {', '.join(sorted(_EXTRA))}"
            )
        self.sampling, self.options, self.on_restart = sampling, options, on_restart
        self.num_calls = self.num_restarts = self.num_syncs = 0
        self.max_model_len, self._path = 0, ""
        self._parameters = parameters
        self._client = ServerClient(options.url, options.timeout)
        self._sends = not distributed.is_initialized() or distributed.get_rank() == 0
        self._run = _from_first(uuid4().hex)
        self._version: str | None = None  # of the weights that the server has; None: not this policy's
        self._together(self._connect)

    def sync_weights(self) -> None:
        """Give the server every policy weight.

        Raises: EngineUnavailableError; RuntimeError for weights that its model cannot take.
        """
        self._version = None
        self._until_done(lambda: None)

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Rollouts:
        """As `CpuEngine.generate`; of the policy as the last sync sent it, whatever happens to the server meanwhile.

        Raises: also EngineUnavailableError; RunError if another run sends weights to this server.
        """
        del num_generations
        if images is not None:
            raise ConfigError("images are not supported by the CPU engine; use text prompts")
        requests = [
            (prompt, self._settings(seed)) for prompt, seed in zip(prompts, self._seeds(len(prompts)), strict=True)
        ]
        with profiler or contextlib.nullcontext():
            tokens, logps = self._until_done(lambda: self._sample(requests))
        self.num_calls += 1
        return None, tokens, [[[logp] for logp in one] for one in logps], None

    def close(self) -> None:
        """Leave the server; it goes on."""
        self._client.close()

    # ---------------------------------------------------------------------------------------------- on every rank

    def _until_done(self, work: Callable[[], Result]) -> Result:
        """work() with the policy's weights on the server, again after the server was lost."""
        for _ in range(_ATTEMPTS):
            try:
                if self._version is None:
                    self._together(self._send)
                    self.num_syncs += 1
                    self._version = self._name()
                return self._together(work)
            except ServerLost as lost:
                reason = lost
            self._version = None
            self.num_restarts += 1
            if self._sends:
                logger.warning(
                    "vLLM server %s is lost (%s): waiting up to %.0f s, then its weights are sent and the completions "
                    "drawn again", self.options.url, reason, self.options.timeout,
                )  # fmt: skip
            self._together(self._connect)
            self.on_restart()
        raise EngineUnavailableError(
            f"the vLLM server at {self.options.url} failed {_ATTEMPTS} times in a row, last: {reason}; see its log, "
            "start it again with `rlvr serve` and resume from the last checkpoint"
        )

    def _together(self, work: Callable[[], Result]) -> Result:
        """work() on every rank; where one rank cannot, all raise what it raises."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        told = _of_all(None if error is None else (isinstance(error, ServerLost), type(error).__name__, str(error)))
        failed = [one for one in told if one is not None]
        if error is not None and not isinstance(error, ServerLost):
            raise error
        for lost, kind, said in failed:
            if not lost:
                raise RunError(f"another rank stopped: {kind}: {said}")
        if failed:
            raise ServerLost(failed[0][2]) from error
        return result  # type: ignore[return-value]

    # ---------------------------------------------------------------------------------------------- on one rank

    def _connect(self) -> None:
        """Wait until there is a server, and see that it fits."""
        start, pause = time.monotonic(), 0.5
        while True:
            try:
                state = self._client.state()
                break
            except ServerLost as lost:
                waited, reason = time.monotonic() - start, lost
            if waited + pause > self.options.timeout:
                raise EngineUnavailableError(
                    f"no vLLM server at {self.options.url} after {waited:.0f} s (vllm_server_timeout="
                    f"{self.options.timeout:g}), last: {reason}; {START} and resume from the last checkpoint"
                ) from reason
            time.sleep(pause)
            pause = min(1.5 * pause, 5.0)
        self._require_fit(state)
        self._path, self.max_model_len = state["path"], state["max_model_len"]

    def _require_fit(self, state: dict[str, Any]) -> None:
        where = f"the server at {self.options.url}"
        if state["dtype"] != self.options.dtype:
            raise ConfigError(
                f"{where} computes in {state['dtype']}, not in vllm_dtype={self.options.dtype} (by default the "
                f"trainer's): start it with --dtype {self.options.dtype}, or set vllm_dtype: {state['dtype']}"
            )
        if state["logprobs_mode"] != "processed_logprobs":
            raise ConfigError(f"{where} has logprobs_mode={state['logprobs_mode']}, not processed_logprobs: {START}")
        needed = max(self.sampling.max_tokens + 1, self.options.max_model_len or 0)
        if needed > state["max_model_len"]:
            raise ConfigError(
                f"{where} has max_model_len={state['max_model_len']}, vllm_max_model_length or max_completion_length "
                f"and a prompt need {needed}: start it with --max_model_len {needed} or more"
            )
        ours, its = self.options.config, state["config"]
        for name in _SHAPE:
            if None not in (ours.get(name), its.get(name)) and ours[name] != its[name]:
                raise ConfigError(
                    f"{where} has the model {state['model']} with {name}={its[name]}, the policy has {ours[name]}: "
                    "start `rlvr serve` with the policy's own checkpoint"
                )

    def _send(self) -> None:
        parameters = iter(self._parameters())
        try:
            if self._sends:
                self._client.load(parameters, self._name(1), self._path)
        finally:
            for _ in parameters:  # weights that are sharded are gathered by all ranks at once, whoever reads them
                pass

    def _sample(self, requests: list[Any]) -> tuple[list[list[int]], list[list[float]]]:
        longest = max((len(prompt) for prompt, _ in requests), default=0)
        if longest + self.sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={self.sampling.max_tokens} exceed the server's "
                f"max_model_len={self.max_model_len}; start it with a larger --max_model_len or lower "
                "max_completion_length"
            )
        answers = self._client.sample_all(requests)
        for version in {version for _, _, versions in answers for version in versions or {"default"}} - {
            self._version
        }:
            if version == "default" or self._run in version:
                raise ServerLost("it was started again, with its checkpoint's weights")
            raise RunError(
                f"another run sends weights to the server at {self.options.url}: start one server for each run"
            )
        return [tokens for tokens, _, _ in answers], [logps for _, logps, _ in answers]

    def _name(self, ahead: int = 0) -> str:
        return f"{self._run}:{self.num_syncs + ahead}"

    def _seeds(self, count: int) -> list[int]:
        generator = None
        if self.sampling.seed is not None:
            generator = torch.Generator().manual_seed(hash((self.sampling.seed, self.num_calls)) % 2**63)
        return torch.randint(2**62, (count,), generator=generator).tolist()

    def _settings(self, seed: int) -> dict[str, Any]:
        """Of vllm.SamplingParams, for one completion: its log-probs are the sampled tokens' only."""
        given = {name: getattr(self.sampling, name) for name in _FIELDS} | dict(self.sampling.extra)
        # output_kind 2: the completion at its end and not in pieces
        return {**given, "n": 1, "seed": seed, "logprobs": 0, "output_kind": 2, "detokenize": bool(given.get("stop"))}


def _of_all(said: Any) -> list[Any]:
    """What each rank said."""
    if not distributed.is_initialized():
        return [said]
    heard: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(heard, said)
    return heard


def _from_first(said: str) -> str:
    """What the first rank said."""
    first: str = _of_all(said)[0]
    return first
