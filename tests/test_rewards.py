"""The pool that survives its verifiers, and the reward function over it."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr.child_process import child_command, pack, unpack
from rlvr.errors import ConfigError
from rlvr.rewards import VerifierReward, completion_text
from rlvr.verifier_pool import Verdict, VerifierPool

MISBEHAVING = """
import os, signal, subprocess, sys, time

print("a print at import must not reach the pipe")

def verify(completion, answer, **row):
    print("noise" * 100)
    if completion == "hang":
        while True:
            pass
    if completion == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(row["path"], "w").write(str(child.pid))
        time.sleep(600)
    if completion == "exit":
        os._exit(3)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "raise":
        raise ValueError("cannot judge this")
    if completion == "leave":
        sys.exit(1)
    if completion == "slow":
        time.sleep(0.2)
    odd = {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None}
    return odd.get(completion, completion == answer)

def modules(completion, answer):
    return float(any(name in sys.modules for name in ("torch", "trl", "transformers", "datasets")))
"""


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(module_path: Path) -> Any:
    pool = VerifierPool("misbehaving:verify", workers=2, timeout=1.0)
    yield pool
    pool.close()


def row(completion: str, answer: str = "a", **columns: Any) -> dict[str, Any]:
    return {"completion": completion, "answer": answer, **columns}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_pool_failures_hit_only_their_own_item(pool: VerifierPool) -> None:
    cases = ["a", "hang", "b", "exit", "raise", "a", "nan", "inf", "text", "none", "leave", "segfault", "b", "a"]
    verdicts = pool.score([row(case) for case in cases])
    by_case = dict(zip(cases, verdicts, strict=True))
    assert [v.value for v, case in zip(verdicts, cases, strict=True) if case in "ab"] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert by_case["hang"].failure == "timeout"
    for case in ("exit", "raise", "nan", "inf", "text", "none", "leave", "segfault"):
        assert by_case[case].failure == "error" and by_case[case].value is None, case
    assert by_case["raise"].message == "ValueError: cannot judge this"
    assert "exit code 3" in by_case["exit"].message
    assert "SIGSEGV" in by_case["segfault"].message


def test_pool_keeps_the_order_of_many_rows(pool: VerifierPool) -> None:
    rows = [row(str(i), str(i - i % 3)) for i in range(500)]
    assert [v.value for v in pool.score(rows)] == [float(i % 3 == 0) for i in range(500)]


def test_pool_workers_persist_between_calls_and_no_rows_need_none(pool: VerifierPool) -> None:
    pool.score([row("a"), row("a")])
    before = [worker.process.pid for worker in pool._pool]
    assert pool.score([]) == []
    pool.score([row("a")] * 5)
    assert [worker.process.pid for worker in pool._pool] == before


def test_pool_passes_text_of_any_size_and_script(pool: VerifierPool) -> None:
    texts = ["x" * 3_000_000, "数学 \ud800 \x00 \n", ""]
    assert [v.value for v in pool.score([row(t, t) for t in texts])] == [1.0, 1.0, 1.0]


def test_pool_row_that_json_cannot_hold_is_an_error(pool: VerifierPool) -> None:
    verdicts = pool.score([row("a", when=object()), row("a")])
    assert [v.failure for v in verdicts] == ["error", None]


def test_pool_row_without_answer_is_an_error(pool: VerifierPool) -> None:
    assert "'completion' and 'answer'" in pool.score([{"completion": "a"}])[0].message


def test_pool_serves_several_threads(pool: VerifierPool) -> None:
    results: dict[int, list[float | None]] = {}

    def work(k: int) -> None:
        results[k] = [v.value for v in pool.score([row(str(k), str(j)) for j in range(20)])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == {k: [float(k == j) for j in range(20)] for k in range(6)}


def test_pool_kills_what_a_hung_verifier_started(pool: VerifierPool, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert pool.score([row("child", path=str(path))])[0].failure == "timeout"
    deadline = time.monotonic() + 5
    while alive(int(path.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(path.read_text()))


def test_pool_interrupted_call_leaves_no_stale_verdict(pool: VerifierPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_step", lambda verdicts: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.score([row("slow", "slow")] * 2)
    assert [v.value for v in pool.score([row("b"), row("a")])] == [0.0, 1.0]


def test_pool_close_reaps_its_workers_and_a_later_call_starts_new_ones(module_path: Path) -> None:
    pool = VerifierPool("misbehaving:verify", workers=2, timeout=1.0)
    assert pool._pool == []  # lazy
    pool.score([row("a")] * 2)
    workers = [worker.process for worker in pool._pool]
    pool.close()
    assert all(process.returncode is not None for process in workers)
    assert pool.score([row("a")])[0] == Verdict(1.0)
    pool.close()


def test_pool_worker_is_light(module_path: Path) -> None:
    pool = VerifierPool("misbehaving:modules", workers=1)
    assert pool.score([row("")])[0].value == 0.0
    pool.close()


def test_pool_that_cannot_start_raises_with_the_reason() -> None:
    pool = VerifierPool("no_such_module_anywhere:verify", workers=1)
    with pytest.raises(ConfigError, match=r"reward='no_such_module_anywhere:verify' cannot start .*verifier_limits"):
        pool.score([row("a")])
    assert pool._pool == []


def test_pool_needs_no_main_guard_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\ndef pid(completion, answer):\n    return os.getpid()\n")
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from rlvr.verifier_pool import VerifierPool\n"
        "pool = VerifierPool('mine:pid', workers=1)\n"
        "print(int(pool.score([{'completion': '', 'answer': ''}])[0].value))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    started, pid = done.stdout.split()
    assert started == "started" and not alive(int(pid))


def test_pool_worker_dies_with_a_parent_that_was_killed(module_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(module_path)!r})\n"
        "import threading\nfrom rlvr.verifier_pool import VerifierPool\n"
        "pool = VerifierPool('misbehaving:verify', workers=1, timeout=600)\n"
        "pool.score([{'completion': 'a', 'answer': 'a'}])\n"
        "print(pool._pool[0].process.pid, flush=True)\n"
        "pool.score([{'completion': 'hang', 'answer': ''}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_child_command_does_not_put_the_working_directory_before_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "types.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run([*child_command("json:loads")], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "shadowed" not in done.stderr


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=4), st.integers(1, 9))
def test_messages_survive_any_cut_of_the_stream(messages: list[dict[str, Any]], step: int) -> None:
    stream = b"".join(pack(m) for m in messages)
    buffer, seen = bytearray(), []
    for i in range(0, len(stream), step):
        buffer += stream[i : i + step]
        while (message := unpack(buffer)) is not None:
            seen.append(message)
    assert seen == messages and not buffer


def test_math_pool_kills_a_power_tower_and_judges_the_rest() -> None:
    pool = VerifierPool("math_verify", workers=1, timeout=2.0)
    verdicts = pool.score([row("\\boxed{2}", "2"), row("$9^{9^{9^{9}}}$", "2"), row("\\boxed{3}", "2")])
    pool.close()
    assert [v.value for v in verdicts] == [1.0, None, 0.0]


def call(
    reward: VerifierReward, completions: list[Any], **columns: Any
) -> tuple[list[float | None], dict[str, float]]:
    metrics: dict[str, float] = {}
    values = reward(
        prompts=[""] * len(completions),
        completions=completions,
        completion_ids=[[]] * len(completions),
        log_metric=metrics.__setitem__,
        log_extra=lambda name, values: None,
        trainer_state=object(),
        **columns,
    )
    return values, metrics


def test_reward_counts_failures_and_never_scores_them_zero(
    pool: VerifierPool, caplog: pytest.LogCaptureFixture
) -> None:
    reward = VerifierReward(pool)
    with caplog.at_level(logging.WARNING):
        values, metrics = call(reward, ["a", "hang", "raise", "b"], answer=["a"] * 4)
        call(reward, ["raise"], answer=["a"])
    assert values == [1.0, None, None, 0.0]
    assert (metrics["reward/verifier_timeouts"], metrics["reward/verifier_errors"]) == (0.25, 0.25)
    assert reward.__name__ == "verify"
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 2  # one per kind, once
    assert any("'raise'" in text and "cannot judge this" in text for text in warnings)


def test_reward_logs_the_same_keys_whatever_happens(pool: VerifierPool) -> None:
    keys = [set(call(VerifierReward(pool), c, answer=["a"] * len(c))[1]) for c in (["a"], ["raise"], [])]
    assert keys[0] == keys[1] == keys[2] == {"reward/verifier_timeouts", "reward/verifier_errors", "time/verify"}


def test_reward_reads_conversations_and_cuts_at_the_next_example(pool: VerifierPool) -> None:
    said = [
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    ]
    assert call(VerifierReward(pool), said, answer=["a", "a"])[0] == [1.0, 1.0]
    assert call(VerifierReward(pool, stop="Question:"), ["aQuestion: b"], answer=["a"])[0] == [1.0]
    tools = [{"role": "assistant", "content": None}, {"role": "tool", "content": "x"}]
    assert completion_text(tools) == ""


def test_reward_names_a_missing_column(pool: VerifierPool) -> None:
    with pytest.raises(KeyError, match="level"):
        call(VerifierReward(pool, columns=("answer", "level")), ["a"], answer=["a"])
