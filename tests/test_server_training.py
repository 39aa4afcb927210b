"""Training through the death of its vLLM server, on several ranks, and with weights that ZeRO-3 shards."""

import dataclasses
import importlib.util
import json
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_cases import Server, require_in_step, serving, shared_files
from server_run import trainer
from test_ranks_training import run_script
from transformers import TrainerCallback

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_steps
from rlvr.rollout.server_engine import EngineUnavailableError

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tiny_model_dir, tmp_path_factory.mktemp("serve") / "log") as one:
        yield one


def test_experts_are_refused_before_a_server_is_asked(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would sample without the experts"):
        trainer(str(tiny_model_dir), str(tmp_path), "mole", "http://127.0.0.1:1")


# ------------------------------------------------------------------------------------------------ several ranks


@slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("where", ["server", "in process"])
@pytest.mark.parametrize("launched", ["ddp", "zero3"])
def test_engine_follows_the_policy_of_two_ranks(
    launched: str, where: str, method: str, server: Server, tiny_model_dir: Path, tmp_path: Path
) -> None:
    url = [server.url] if where == "server" else []
    run_script("server_run.py", launched, str(tiny_model_dir), str(tmp_path), method, *url)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2 and result["sharded"] == (launched == "zero3")
    assert len(result["steps"]) == 5
    require_in_step(result["steps"])
    assert shared_files() == set()


# ------------------------------------------------------------------------------------------------ death


class Killer(TrainerCallback):
    """Kills the server while it samples for the third step, and again, unnoticed, after the fourth."""

    def __init__(self, server: Server) -> None:
        self.server, self.killed = server, threading.Event()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            threading.Thread(target=self._kill_while_it_samples, daemon=True).start()
        if state.global_step == 4:
            self.server.stop(signal.SIGKILL)
            self.server.start()
            self.server.wait()

    def _kill_while_it_samples(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not any(
            line.startswith("vllm:num_requests_running") and float(line.split()[-1]) > 0
            for line in opener.open(f"{self.server.url}/metrics", timeout=5).read().decode().splitlines()
        ):
            time.sleep(0.005)
        self.server.stop(signal.SIGKILL)
        self.killed.set()
        self.server.start()


@slow
def test_a_run_goes_on_when_its_server_is_killed_and_started_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_model_dir, tmp_path / "log") as server:
        long = {"max_completion_length": 100, "per_device_train_batch_size": 64, "vllm_max_model_length": 128}
        with closing(
            trainer(str(tiny_model_dir), str(tmp_path / "run"), "full", server.url, max_steps=6, **long)
        ) as one:
            probed = []
            check = one._check_engine
            one._check_engine = lambda tokens: (probed.append(one.state.global_step), check(tokens))
            killer = Killer(server)
            one.add_callback(killer)
            one.train()
            engine = one.vllm_generation
            assert killer.killed.is_set() and engine.num_restarts == 2
            assert engine.num_syncs == 6 + 1  # one for each rollout, and one for that which was drawn again
            assert probed == [0, 2, 4]  # the start-up probe, and once after each restart
            steps = [record["metrics"] for record in read_steps(tmp_path / "run")]
            assert len(steps) == 6
            require_in_step(steps)

            server.stop(signal.SIGKILL)
            engine.options = dataclasses.replace(engine.options, timeout=3.0)
            one.args.max_steps = 7
            start = time.monotonic()
            with pytest.raises(EngineUnavailableError, match=f"no vLLM server at {server.url} after "):
                one.train()
            assert time.monotonic() - start < 20
        assert shared_files() == set()


@slow
def test_a_killed_server_leaves_no_process_while_it_starts_either(tiny_model_dir: Path, tmp_path: Path) -> None:
    server = Server(tiny_model_dir, tmp_path / "log")
    server.start()
    while not any("EngineCore" in process.name() for process in server.tree()):
        time.sleep(0.1)
    tree = server.tree()
    server.process.kill()
    assert server.process.wait(10) == -signal.SIGKILL
    _, alive = psutil.wait_procs(tree, timeout=90)
    assert alive == []


@slow
def test_serve_says_how_it_ended(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_model_dir, tmp_path / "log") as server:
        assert server.stop(signal.SIGINT) == 0
    missing = Server(tmp_path / "nowhere", tmp_path / "log2")
    missing.start()
    assert missing.process.wait(100) == 1
