"""Requests to the vLLM server that `rlvr serve` starts: one that cannot answer is told apart from one that refuses."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from rlvr.errors import ConfigError, RunError
from rlvr.rollout import weight_file

Item = TypeVar("Item")
Result = TypeVar("Result")

START = "start one with `rlvr serve --model MODEL`"
_CONCURRENT = 256  # requests at once: vLLM's own limit of sequences in a batch
_PULSE = 30.0  # seconds without any answer after which the server is asked whether it lives
_NOT_FINITE = -9999.0  # what the server says in place of a log-prob of -inf or NaN


class ServerLost(Exception):
    """The server could not be reached, or it says that its engine is dead: it may come back."""


class ServerClient:
    """A server's requests, for many threads at once.   timeout: seconds that one may take, other than sampling."""

    def __init__(self, url: str, timeout: float) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.url, self.timeout = url.rstrip("/"), timeout
        self._failures = requests.exceptions
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy does not know this machine's 127.0.0.1
        self._session.mount("http://", HTTPAdapter(pool_maxsize=_CONCURRENT))

    def post(self, path: str, body: Any, timeout: float | None = None) -> Any:
        """The answer's JSON. timeout: seconds without any answer, None for no limit.

        Raises: ServerLost; ConfigError if the server has no such path; RunError for what it refuses.
        """
        try:
            answer = self._session.post(self.url + path, json=body, timeout=(10, timeout))
        except (self._failures.InvalidURL, self._failures.InvalidSchema, self._failures.MissingSchema) as error:
            raise ConfigError(f"vllm_server_base_url={self.url!r} is no http URL: {error}") from error
        except self._failures.RequestException as error:
            cause = getattr(error.args[0], "reason", error) if error.args else error
            raise ServerLost(_one_line(cause) or type(error).__name__) from error
        if answer.ok:
            try:
                return answer.json()
            except ValueError as error:
                raise ConfigError(f"the server at {self.url} is not vLLM's ({_one_line(error)}): {START}") from error
        said = f"POST {path}: {answer.status_code} {_one_line(answer.text)}"
        if answer.status_code in (403, 404, 405):
            raise ConfigError(f"the server at {self.url} is not one that takes weights ({said}): {START}")
        if answer.status_code >= 500:
            raise ServerLost(said)
        raise RunError(f"the server at {self.url} refused {said}")

    def state(self) -> dict[str, Any]:
        """What `ServerWorker.rlvr_state` says. Raises: as `post`."""
        try:
            return self._call("rlvr_state")
        except ServerLost as lost:
            if "rlvr_state" in str(lost):  # vLLM says that its worker has no such method
                raise ConfigError(f"the server at {self.url} has a worker that takes no weights: {START}") from lost
            raise

    def load(self, parameters: Iterable[tuple[str, Tensor]], version: str, path: str) -> None:
        """Give the server new weights under the name of a version, with which it marks each token from now on.

        path: of its `state`, by which it knows that it was not started again since.
        Raises: as `post`; RuntimeError for weights that the server's model cannot take.
        """
        self.post("/update_weight_version", {"new_version": f"a part of {version}"}, self.timeout)
        try:
            for number, part in enumerate(weight_file.parts(parameters)):
                weight_file.write(Path(path), part, version)
                self._told(self._call("rlvr_load", path, number == 0, version))
        finally:
            Path(path).unlink(missing_ok=True)
        self._told(self._call("rlvr_finish", path, version))
        if not self.post("/reset_prefix_cache", {}, self.timeout)["success"]:
            raise ServerLost("it is still sampling, for another run or what was given up")
        self.post("/update_weight_version", {"new_version": version}, self.timeout)

    def sample(self, prompt: Sequence[int], settings: dict[str, Any]) -> tuple[list[int], list[float], set[str]]:
        """(token ids, log-prob of each, versions of the weights that drew them). settings: of SamplingParams.

        Raises: as `post`.
        """
        body = {"token_ids": prompt, "sampling_params": settings}
        choice = self.post("/inference/v1/generate", body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(f"it broke a completion off: finish_reason={choice['finish_reason']}")
        logps = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        versions = {span["version"] for span in choice["weight_versions"]}
        return choice["token_ids"], [math.nan if logp <= _NOT_FINITE else logp for logp in logps], versions

    def sample_all(self, requests: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> list[Any]:
        """`sample` of each request, at once and in their order."""
        return in_threads(lambda request: self.sample(*request), requests, _CONCURRENT, self.state, _PULSE)

    def close(self) -> None:
        """Close idle connections."""
        self._session.close()

    def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        answer = self.post("/collective_rpc", {"method": method, "args": arguments}, self.timeout)
        if not isinstance(answer, dict) or not answer.get("results"):
            raise ConfigError(f"the server at {self.url} is not one that takes weights: {START}")
        found: dict[str, Any] = answer["results"][0]
        return found

    def _told(self, answer: dict[str, Any]) -> None:
        if answer["error"] is None:
            return
        if answer["another"]:
            raise ServerLost("it was started again")
        raise RuntimeError(f"the server at {self.url} could not load the weights: {answer['error']}")


def in_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    most: int,
    pulse: Callable[[], object],
    every: float,
) -> list[Result]:
    """work(item) of each, at most `most` at a time, results in order. The first error is raised when what is already
    at work has ended, or after `every` seconds: until then the server is busy.

    pulse: called after each `every` seconds without a result; may raise.
    The threads are daemons, which Ctrl-C or the interpreter's exit leave alone with what they wait for.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, Exception | None]] = queue.SimpleQueue()
    given_up = threading.Event()
    for number in range(len(items)):
        todo.put(number)

    def run() -> None:
        while not given_up.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, work(items[number]), None))
            except Exception as error:
                done.put((number, None, error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(most, len(items)))]
    for thread in threads:
        thread.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < len(items):
            try:
                number, results_of, error = done.get(timeout=every)
            except queue.Empty:
                pulse()
                continue
            if error is not None:
                raise error
            results[number] = results_of
    except Exception:
        given_up.set()
        leave = time.monotonic() + every
        for thread in threads:
            thread.join(max(0.0, leave - time.monotonic()))
        raise
    finally:
        given_up.set()
    return [results[number] for number in range(len(items))]


def _one_line(said: object) -> str:
    return " ".join(str(said).split())[:300]
