"""What a verifier can take, sees and leaves behind: each limit is run into, in a real worker."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvr.errors import ConfigError
from rlvr.tasks import TaskConfig, load_task
from rlvr.verifier_fence import Limits, ending
from rlvr.verifier_pool import Verdict, VerifierPool

FENCED = """
import ctypes, os, pathlib, resource, signal, subprocess, sys, tempfile, time

import_folder = os.getcwd()
server = subprocess.Popen(["sleep", "600"])
pathlib.Path(tempfile.mkdtemp(), "kept").write_text("kept")
pathlib.Path(tempfile.gettempdir(), "kept").write_text("kept")
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]

def verify(completion, answer, path=None, count=0):
    kept = pathlib.Path(tempfile.gettempdir(), "kept").read_text() == "kept" and server.poll() is None
    if completion == "memory":
        b"x" * (1 << 30)
    if completion == "memory in C":
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        assert libc.malloc(1 << 20) is not None
        ctypes.memset(libc.malloc(1 << 30), 1, 8)  # NULL: SIGSEGV
    if completion == "memory of a child":
        return float(subprocess.run([sys.executable, "-c", "b'x' * (1 << 30)"]).returncode == 1)
    if completion == "file":
        with open("big", "wb") as file:
            while True:
                file.write(bytes(1 << 20))
    if completion == "file of a child":
        return float(-subprocess.run(["dd", "if=/dev/zero", "of=big", "bs=1M"]).returncode == signal.SIGXFSZ)
    if completion == "core":
        return float(resource.getrlimit(resource.RLIMIT_CORE) == (0, 0))
    if completion == "children":
        for _ in range(count):
            subprocess.Popen(sleep)
        time.sleep(0.5)
    if completion == "bomb":
        while True:
            os.fork()
    if completion == "leave behind":
        detached = "import os, subprocess, sys; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); "
        detached += "open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n'); import time; time.sleep(600)"
        subprocess.run([sys.executable, "-c", detached, path])
        with open(path, "a") as pids:
            pids.write(f"{subprocess.Popen(sleep).pid}\\n")
        while len(pathlib.Path(path).read_text().split()) < 2:
            time.sleep(0.01)
        pathlib.Path("file").write_text("left"), os.mkdir("folder"), pathlib.Path("folder", "f").write_text("left")
        pathlib.Path(tempfile.gettempdir(), "scratch").write_text("left")
    if completion == "stop":
        with open(path, "a") as pids:
            pids.write(f"{subprocess.Popen(sleep, start_new_session=True).pid}\\n")
        os._exit(3)
    if completion == "no folder":
        import shutil
        shutil.rmtree(os.getcwd())
        return 1.0
    if completion == "folder":
        pathlib.Path(path).write_text(os.getcwd())
        mine = os.environ["HOME"] == os.environ["TMPDIR"] == os.getcwd()
        return float(mine and not os.path.exists("/proc/self/cwd/scratch") and len(os.listdir()) == 2 and kept)
    if completion == "imported in":
        return float(import_folder == answer)
    if completion == "environment":
        return float(sorted(os.environ) == answer.split())
    if completion == "copies":
        os.fork()
    return float(kept)
"""


@pytest.fixture(scope="module", autouse=True)
def fenced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("fenced")
    (folder / "fenced.py").write_text(FENCED)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Verdict]]:
    """One row in the one worker of a pool, whose folders lie in `tmp_path`/folders."""
    (tmp_path / "folders").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "folders"))
    pools: list[VerifierPool] = []

    def judge(completion: str, answer: str = "", limits: Limits | None = None, **columns: Any) -> Verdict:
        if not pools or limits is not None:
            pools.append(VerifierPool("fenced:verify", workers=1, timeout=8.0, limits=limits))
        return pools[-1].score([{"completion": completion, "answer": answer, **columns}])[0]

    yield judge
    for pool in pools:
        pool.close()
    assert list((tmp_path / "folders").iterdir()) == []  # whatever a verifier did


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pids: list[int], patience: float = 5.0) -> bool:
    """Whether these processes have ended, or do so soon."""
    deadline = time.monotonic() + patience
    while any(map(running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_fence_memory_that_runs_out_is_an_error_of_its_row(judge: Callable[..., Verdict]) -> None:
    small = Limits(memory_gib=0.5)
    assert judge("memory", limits=small) == Verdict(None, "error", "MemoryError: ")
    assert "SIGSEGV" in judge("memory in C").message
    assert judge("memory of a child").value == 1.0
    assert judge("a").value == 1.0  # in a new process
    assert judge("memory", limits=Limits(memory_gib=None)).value == 1.0


def test_fence_file_that_grows_too_large_is_an_error_of_its_row(judge: Callable[..., Verdict]) -> None:
    assert "OSError: [Errno 27] File too large" in judge("file", limits=Limits(file_mib=3.0)).message
    assert judge("file of a child").value == 1.0
    assert judge("core").value == 1.0


def test_fence_counts_the_processes_of_a_row(judge: Callable[..., Verdict]) -> None:
    few = Limits(processes=4)  # one is started by the import
    assert judge("children", limits=few, count=3).value == 1.0
    assert "ended with more than 4 processes (verifier_limits.processes)" in judge("children", count=4).message
    assert "ended with more than 4 processes" in judge("bomb").message
    assert judge("a").value == 1.0


def test_fence_what_a_row_leaves_behind_ends_with_it(judge: Callable[..., Verdict], tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert judge("leave behind", path=str(path)).value == 1.0
    left = [int(pid) for pid in path.read_text().split()]  # one in a session of its own, an orphan
    assert len(left) == 2 and gone(left, patience=0)
    assert judge("folder", path=str(path)).value == 1.0
    assert Path(path.read_text()).parent == tmp_path / "folders"


def test_fence_what_the_import_made_stays_for_all_rows(judge: Callable[..., Verdict]) -> None:
    assert [judge("a").value for _ in range(3)] == [1.0] * 3  # looks for its file and its process
    assert judge("imported in", os.getcwd()).value == 1.0


def test_fence_children_end_with_a_worker_that_leaves_by_itself(judge: Callable[..., Verdict], tmp_path: Path) -> None:
    path = tmp_path / "pids"
    assert "exit code 3" in judge("stop", path=str(path)).message
    children = [int(pid) for pid in path.read_text().split()]
    assert len(children) == 2 and gone(children, patience=0)  # of both tries


def test_fence_folder_that_a_row_removed_is_there_again(judge: Callable[..., Verdict]) -> None:
    assert judge("no folder").value == 1.0
    assert "FileNotFoundError" in judge("a").message  # the import's file went with it
    assert judge("core").message == judge("a").message


def test_fence_copy_that_returns_answers_nothing(judge: Callable[..., Verdict]) -> None:
    assert [judge("copies").value for _ in range(5)] == [1.0] * 5
    assert judge("imported in", "elsewhere").value == 0.0  # and not the answer of a copy


def test_fence_passes_no_variable_on_but_those_listed(
    judge: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C.UTF-8")
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    always = ["HOME", "LANG", "OMP_NUM_THREADS", "PATH", "PYTHONHASHSEED", "TMPDIR"]
    assert judge("environment", " ".join(always)).value == 1.0
    listed = Limits(environment=("API_KEY", "NOT_SET"))
    assert judge("environment", " ".join(sorted([*always, "API_KEY"])), limits=listed).value == 1.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory": 1}, "verifier_limits='memory' is not known; did you mean memory_gib"),
        ({"memory_gib": 0}, "verifier_limits.memory_gib=0 must be a number above 0, or null"),
        ({"memory_gib": "8"}, "verifier_limits.memory_gib='8' must be"),
        ({"file_mib": float("inf")}, "verifier_limits.file_mib=inf must be"),
        ({"file_mib": True}, "verifier_limits.file_mib=True must be"),
        ({"processes": -1}, "verifier_limits.processes=-1 must be an integer of at least 0, or null"),
        ({"processes": 1.5}, "verifier_limits.processes=1.5 must be"),
        ({"environment": "HF_HOME"}, r"verifier_limits.environment='HF_HOME' must be a list of names"),
        ({"environment": ["A=b"]}, r"verifier_limits.environment=\['A=b'\] must be a list"),
        ("{memory_gib: 1}", "verifier_limits='{memory_gib: 1}' is not JSON"),
        ("[1]", "verifier_limits='\\[1\\]' must be a mapping"),
    ],
)
def test_limits_errors_name_the_field(settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        TaskConfig(task="chain_sum", verifier_limits=settings)
    assert "\n" not in str(error.value)


def test_limits_of_a_task_are_those_of_its_workers_and_of_all_its_stages(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1 + 1", "answer": "2"}\n')
    given = '{"memory_gib": null, "processes": 3, "environment": ["HF_HOME"]}'
    settings = {"heldout_size": 0, "verifier_limits": given}
    entry = {"steps": 1, "task": str(data)}
    expected = Limits(memory_gib=None, processes=3, environment=("HF_HOME",))
    for task in (TaskConfig(task=str(data), **settings), TaskConfig(stages=[entry], **settings)):
        assert load_task(task).reward.pool.limits == expected  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"stages\[0\].verifier_limits=.*: set verifier_limits beside stages"):
        TaskConfig(stages=[{**entry, "verifier_limits": {}}])


def test_ending_names_signals_and_codes() -> None:
    assert (ending(3), ending(-9), ending(-40)) == ("exit code 3", "signal SIGKILL", "signal 40")
