"""The real `rlvr serve` for tests, and what its processes and its shared memory are."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """`rlvr serve` as a process of its own, on a port that stays its own when it is started again."""

    def __init__(self, model: Path, log: Path, **flags: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        given = {"model": model, "port": self.port, "max_model_len": 128, "kv_cache_gib": 0.05, **flags}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        self.command = [sys.executable, "-m", "rlvr.cli", "serve", *words]

    def start(self) -> None:
        """Begin to start it; `wait` returns when it answers."""
        with self.log.open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)

    def wait(self, seconds: float = 200.0) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(int(seconds * 5)):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError), opener.open(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-3000:])

    def tree(self) -> list[psutil.Process]:
        """Its processes: server, engine, worker and helpers."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it, and see that nothing of it stays. Returns the exit status."""
        tree = self.tree()
        self.process.send_signal(how)
        status = self.process.wait(60)
        _, alive = psutil.wait_procs(tree, timeout=30)
        for process in alive:
            process.kill()
        assert alive == []
        return status


@contextlib.contextmanager
def serving(model: Path, log: Path, **flags: object) -> Iterator[Server]:
    """A server that answers, until the end of the block."""
    server = Server(model, log, **flags)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def shared_files() -> set[Path]:
    """What weight syncs have left behind."""
    return set(Path("/dev/shm").glob("rlvr-weights-*"))


def require_in_step(steps: list[dict[str, float]]) -> None:
    """Metrics of the steps of a run in which the policy moved, and the engine with it."""
    for metrics in steps:
        assert metrics["mismatch/abs_logp_mean"] <= 1e-4
        assert metrics["mismatch/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    entropies = [metrics["entropy/mean"] for metrics in steps]
    assert max(entropies) - min(entropies) > 0.01
