"""What a trainer does when its vLLM server fails: a real HTTP server answers as vLLM does, and fails by a script."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr.errors import ConfigError, RunError
from rlvr.rollout import weight_file
from rlvr.rollout.cpu_engine import Sampling
from rlvr.rollout.server_engine import EngineUnavailableError, ServerEngine, ServerOptions


class Vllm:
    """Answers as a server of `rlvr serve` whose samples are the token `seed % 100`; `fault` may answer instead."""

    def __init__(self, tmp_path: Path) -> None:
        self.weights, self.restarts, self.seeds, self.loaded = "default", 0, [], 0
        self.folder, self.dtype = tmp_path, "float32"
        self.sampling, self.pause = 0, 0.0  # completions at work; seconds that each takes
        self.fault: Callable[[str], tuple[int, Any] | None] = lambda path: None
        self.http: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, said = outer.fault(self.path) or (200, outer.answer(self.path, body))
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.weights, self.restarts = "default", self.restarts + 1
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        assert self.http is not None
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        where = self.folder / f"weights{self.restarts}"
        if path == "/update_weight_version":
            self.weights = body["new_version"]
        if path == "/inference/v1/generate":
            seed = body["sampling_params"]["seed"]
            self.seeds.append(seed)
            self.sampling += 1
            time.sleep(self.pause)
            self.sampling -= 1
            told = {"content": [{"token_id": seed % 100, "logprob": -0.5}]}
            span = {"version": self.weights, "start": 0, "end": 1}
            return {"choices": [{"token_ids": [seed % 100], "finish_reason": "stop", "logprobs": told,
                                 "weight_versions": [span]}]}  # fmt: skip
        if body.get("method") == "rlvr_state":
            config = {"hidden_size": 8, "model_type": "llama"}
            state = {"path": str(where), "model": "m", "dtype": self.dtype, "max_model_len": 64, "config": config}
            return {"results": [{**state, "logprobs_mode": "processed_logprobs"}]}
        if "method" in body and body["args"][0] != str(where):
            return {"results": [{"error": "not here", "another": True}]}
        if body.get("method") == "rlvr_load":
            assert dict(weight_file.read(where, body["args"][2])).keys() == {"w"}
            self.loaded += 1
        return {"success": self.sampling == 0, "results": [{"error": None}]}


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Vllm]:
    server = Vllm(tmp_path)
    yield server
    server.fault = lambda path: None
    server.down()


def engine(vllm: Vllm, timeout: float = 20.0, **options: Any) -> ServerEngine:
    options = {"url": f"http://127.0.0.1:{vllm.port}", "timeout": timeout, **options}
    return ServerEngine(lambda: iter([("w", torch.ones(2))]), Sampling(max_tokens=4), ServerOptions(**options))


def once(answer: tuple[int, Any], path: str) -> Callable[[str], tuple[int, Any] | None]:
    left = [answer]
    return lambda asked: left.pop() if asked == path and left else None


GENERATE, RPC = "/inference/v1/generate", "/collective_rpc"
DEAD = (500, {"error": {"message": "EngineCore encountered an issue"}})
ABORTED = (200, {"choices": [{"finish_reason": "abort", "token_ids": [], "logprobs": None, "weight_versions": []}]})


@pytest.mark.parametrize("fault", [DEAD, (503, {}), ABORTED], ids=["500", "503", "abort"])
def test_a_lost_request_is_repeated_with_its_seeds_after_a_new_sync(fault: Any, vllm: Vllm) -> None:
    one, noticed = engine(vllm), []
    one.on_restart = lambda: noticed.append(vllm.loaded)
    one.sync_weights()
    torch.manual_seed(3)
    expected = one.generate([[1], [2], [3]], None, 1)
    torch.manual_seed(3)
    vllm.fault, vllm.pause = once(fault, GENERATE), 0.5  # its siblings are still at work when one is lost
    assert one.generate([[1], [2], [3]], None, 1) == expected
    assert one.num_restarts == 1 and one.num_syncs == 2 == vllm.loaded
    assert noticed == [1]  # before the weights went there again
    assert len({*vllm.seeds}) == 3


def test_completions_of_a_server_that_was_started_again_unnoticed_are_not_used(vllm: Vllm) -> None:
    one = engine(vllm)
    one.generate([[1]], None, 1)  # which syncs first
    assert vllm.loaded == 1
    vllm.down()
    vllm.up()
    one.generate([[1]], None, 1)
    assert one.num_restarts == 1 and vllm.loaded == 2 and vllm.weights.endswith(":2")


def test_a_server_that_was_started_again_before_a_sync_is_looked_at_again(vllm: Vllm) -> None:
    one = engine(vllm)
    one.sync_weights()
    vllm.down()
    vllm.up()
    one.sync_weights()
    assert one.num_restarts == 1 and vllm.loaded == 2
    vllm.down()
    vllm.dtype = "bfloat16"
    vllm.up()
    with pytest.raises(ConfigError, match="computes in bfloat16"):
        one.sync_weights()


def test_a_sync_that_was_broken_off_is_made_again(vllm: Vllm, tmp_path: Path) -> None:
    one = engine(vllm)
    asked = []

    def first(path: str) -> Any:
        asked.append(path)
        return DEAD if path == RPC and asked.count(RPC) == 1 else None

    vllm.fault = first
    one.sync_weights()
    assert one.num_restarts == 1 and vllm.loaded == 1
    assert [file.name for file in tmp_path.iterdir()] == []  # neither is the part that never arrived


def test_a_dead_server_is_one_error_within_the_timeout(vllm: Vllm) -> None:
    one = engine(vllm, timeout=1.5)
    one.sync_weights()
    vllm.down()
    start = time.monotonic()
    with pytest.raises(
        EngineUnavailableError, match=rf"127.0.0.1:{vllm.port} after .* s .*refused.*rlvr serve"
    ) as caught:
        one.generate([[1]], None, 1)
    assert time.monotonic() - start < 3 and "\n" not in str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    vllm.up()


def test_a_server_that_fails_again_and_again_is_given_up(vllm: Vllm) -> None:
    one = engine(vllm)
    vllm.fault = lambda path: DEAD if path == GENERATE else None
    with pytest.raises(EngineUnavailableError, match=r"failed 5 times in a row, last: POST .*500 .*EngineCore"):
        one.generate([[1]], None, 1)
    assert one.num_restarts == 5


def test_what_a_server_refuses_is_not_asked_again(vllm: Vllm) -> None:
    one = engine(vllm)
    vllm.fault = lambda path: (400, {"error": "too hot"}) if path == GENERATE else None
    with pytest.raises(RunError, match=r"refused .*too hot"):
        one.generate([[1]], None, 1)
    assert one.num_restarts == 0


def test_a_second_run_on_the_same_server_is_found_out(vllm: Vllm) -> None:
    one, other = engine(vllm), engine(vllm)
    one.sync_weights()
    other.sync_weights()
    with pytest.raises(RunError, match="another run sends weights"):
        one.generate([[1]], None, 1)
    other.generate([[1]], None, 1)


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        ((404, {}), {}, "not one that takes weights .*rlvr serve"),
        ((500, {"error": "'CPUWorker' object has no attribute 'rlvr_state'"}), {}, "worker that takes no weights"),
        (None, {"dtype": "bfloat16"}, "computes in float32, not in vllm_dtype=bfloat16"),
        (None, {"config": {"hidden_size": 16}}, "hidden_size=8, the policy has 16"),
        (None, {"max_model_len": 65}, "max_model_len=64.*--max_model_len 65"),
        (None, {"url": "ftp://x"}, "vllm_server_base_url='ftp://x'"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_once(fault: Any, options: Any, said: str, vllm: Vllm) -> None:
    vllm.fault = lambda path: fault
    with pytest.raises(ConfigError, match=said) as caught:
        engine(vllm, **options)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_too_long_and_unknown_settings_are_refused(vllm: Vllm) -> None:
    with pytest.raises(
        ValueError, match="a prompt of 61 tokens and max_tokens=4 exceed the server's max_model_len=64"
    ):
        engine(vllm).generate([[1] * 61], None, 1)
    with pytest.raises(ConfigError, match=r"generation_kwargs=\['beam'\]"):
        ServerEngine(list, Sampling(max_tokens=4, extra={"beam": 2}), ServerOptions(url="http://127.0.0.1:1"))


def test_interrupts_need_not_wait_for_the_server(vllm: Vllm) -> None:
    one = engine(vllm)
    one.sync_weights()
    released, asked = threading.Event(), []

    def hang(path: str) -> None:
        if path == GENERATE:
            asked.append(path)
            if len(asked) == 8:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # Ctrl-C
            released.wait(30)

    vllm.fault = hang
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            one.generate([[1]] * 8, None, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5
    released.set()
