"""Verifiers that misbehave, through the pool and the reward: their own rows get no reward, are counted, and the others
are judged. tests/test_rewards.py has the milder ones.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_verifier_fence import gone

from rlvr.rewards import VerifierReward
from rlvr.verifier_pool import VerifierPool

FAULTY = """
import ctypes, os, signal, struct, sys, time

def pipes():
    links = {int(fd): os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")}
    return [fd for fd, link in links.items() if fd > 2 and os.path.lexists(link) and "pipe:" in os.readlink(link)]

def verify(completion, answer, path=None):
    if path:
        open(path, "a").write(f"{os.getpid()}\\n")
    if completion == "hang in C":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(600)  # keeps the lock of the interpreter
    if completion == "child hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
        open(path, "a").write(f"{os.getpid()}\\n")
        time.sleep(600)
    if completion == "flood":
        for stream in (1, 2) * 200:
            os.write(stream, b"flood" * 10000)
        sys.stdout.write("flood" * 1000000)
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "signal":
        os.kill(os.getpid(), 40)
    if completion == "kill group":
        os.killpg(0, signal.SIGKILL)
    if completion == "leave":
        sys.exit(0)
    if completion == "close":
        os.closerange(3, 64)
    texts = {"garbage": b"xyz", "list": b"[1]", "fatal": b'{"fatal": "x"}', "text value": b'{"value": "x"}',
             "infinite value": b'{"value": Infinity}', "nan value": b'{"value": NaN}', "nothing": b""}
    replies = {name: struct.pack("!I", len(text)) + text for name, text in texts.items()}
    replies["endless"] = b"\\xff" * (1 << 21)
    if completion in replies:
        for fd in pipes():
            try:
                os.write(fd, replies[completion])
            except OSError:
                pass
        time.sleep(600)
    return {"text": "1", "list": [1.0], "complex": 1j, "huge": 10**400}.get(completion, completion == answer)
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "folders").mkdir()  # a guard that is killed cannot remove its worker's
    pool = VerifierPool("faulty:verify", workers=2, timeout=2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("TMPDIR", str(folder / "folders"))
        yield pool
        pool.close()


def row(completion: str, **columns: Any) -> dict[str, Any]:
    return {"completion": completion, "answer": "a", **columns}


@pytest.mark.parametrize(
    ("completion", "failure", "says"),
    [
        ("interrupt", "error", "WorkerDied: the verifier's process ended with signal SIGINT"),
        ("signal", "error", "ended with signal 40"),
        ("kill group", "error", "ended with signal SIGKILL"),
        ("leave", "error", "SystemExit: 0"),
        ("close", "error", "ended with exit code 1"),
        ("garbage", "error", "a reply that cannot be read (Expecting value"),
        ("list", "error", "a reply that cannot be read (unexpected: [1]"),
        ("fatal", "error", "a reply that cannot be read (unexpected: {'fatal': 'x'}"),
        ("text value", "error", "a reply that cannot be read (unexpected: {'value'"),
        ("infinite value", "error", "a reply that cannot be read (unexpected: {'value'"),
        ("nan value", "error", "a reply that cannot be read (unexpected: {'value'"),
        ("nothing", "error", "a reply that cannot be read (Expecting value"),
        ("endless", "error", "a reply that cannot be read (it is too long"),
        ("complex", "error", "TypeError: the verifier returned 1j, not a number"),
        ("huge", "error", "OverflowError"),
        ("hang in C", "timeout", "no verdict after 2 s"),
    ],
)
def test_pool_fault_is_said_and_hits_its_own_row_alone(
    pool: VerifierPool, completion: str, failure: str, says: str
) -> None:
    before, fault, after = pool.score([row("a"), row(completion), row("a")])
    assert (before.value, after.value) == (1.0, 1.0)
    assert fault.value is None and fault.failure == failure and says in fault.message


@pytest.mark.parametrize("completion", ["hang in C", "child hangs"])
def test_pool_kills_what_ignores_its_signals(pool: VerifierPool, completion: str, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert pool.score([row(completion, path=str(path))])[0].failure == "timeout"
    pids = {int(pid) for pid in path.read_text().split()}
    assert len(pids) == (2 if completion == "child hangs" else 1) and gone(list(pids), patience=0)


def test_pool_drops_a_flood_of_output_and_judges_the_row(
    pool: VerifierPool, capfd: pytest.CaptureFixture[str]
) -> None:
    pool.close()
    assert pool.score([row("flood"), row("a")])[0].value == 0.0  # 25 MB
    pool.close()
    shown = capfd.readouterr().err
    assert 1 << 16 <= shown.count("flood") * 5 + 5 <= (1 << 16) + 10
    assert shown.count("has printed enough: the rest is dropped") == 1


def test_pool_worker_that_is_killed_from_outside_is_replaced(pool: VerifierPool) -> None:
    pool.close()
    for victim in ("worker", "guard"):
        assert pool.score([row("a")])[0].value == 1.0
        (guard,) = (worker.process.pid for worker in pool._pool)
        (worker,) = map(int, Path(f"/proc/{guard}/task/{guard}/children").read_text().split())
        os.kill(worker if victim == "worker" else guard, signal.SIGKILL)
        assert gone([guard, worker])
        assert pool.score([row("a")])[0].value == 1.0  # no row is lost for one that died at rest


def test_pool_survives_a_guard_that_does_not_answer(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr.verifier_process.KILL_SECONDS", 0.2)
    pool.close()
    assert pool.score([row("a")])[0].value == 1.0
    guard = pool._pool[0].process.pid
    (worker,) = map(int, Path(f"/proc/{guard}/task/{guard}/children").read_text().split())
    os.kill(guard, signal.SIGSTOP)
    start = time.monotonic()
    pool.close()
    assert gone([guard, worker]) and time.monotonic() - start < 5
    assert pool.score([row("a")])[0].value == 1.0


def test_pool_worker_that_hangs_in_c_ends_with_a_trainer_that_was_killed(pool: VerifierPool, tmp_path: Path) -> None:
    (tmp_path / "folders").mkdir()
    path = tmp_path / "pids"
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from rlvr.verifier_pool import VerifierPool
pool = VerifierPool("faulty:verify", workers=1, timeout=600)
pool.score([{{"completion": "hang in C", "answer": "", "path": {str(path)!r}}}])
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path / "folders")})
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text().strip():
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list((tmp_path / "folders").iterdir())) == 1
    trainer.kill()
    trainer.wait()
    assert gone([int(path.read_text())], patience=15)
    while list((tmp_path / "folders").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_reward_counts_each_fault_once_and_gives_none(pool: VerifierPool) -> None:
    completions = ["a", "hang in C", "interrupt", "garbage", "text", "b", "kill group", "a"]
    metrics: dict[str, float] = {}
    values = VerifierReward(pool)(
        prompts=[""] * 8, completions=completions, log_metric=metrics.__setitem__, answer=["a"] * 8
    )
    assert values == [1.0, None, None, None, None, 0.0, None, 1.0]
    assert metrics["reward/verifier_timeouts"] == 1 / 8 and metrics["reward/verifier_errors"] == 4 / 8


def test_pool_row_whose_worker_was_killed_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text(
        "import os\n"
        "def verify(completion, answer, tries):\n"
        "    with open(tries, 'ab') as file:\n"
        "        file.write(b'x')\n"
        "    if completion == 'always' or os.path.getsize(tries) == 1:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one = VerifierPool("killed:verify", workers=2, timeout=20.0)
    rows = [{**row(name), "tries": str(tmp_path / name)} for name in ("once", "always", "once")]
    once, always, again = one.score(rows)
    one.close()
    assert (once.value, again.value) == (1.0, 1.0)
    assert always.failure == "error" and "signal SIGKILL" in always.message
    assert (tmp_path / "always").read_bytes() == b"xx"
