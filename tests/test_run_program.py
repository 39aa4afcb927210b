"""Programs that a verifier runs: what they print, how they end, and that nothing of them stays."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_verifier_fence import gone

from rlvr.verifier_pool import VerifierPool
from rlvr.verifiers import OUTPUT, run_program

DOCS = Path(__file__).parents[1] / "docs" / "security.md"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder in which programs leave nothing."""
    (tmp_path / "folders").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "folders"))
    yield
    assert list((tmp_path / "folders").iterdir()) == []


def test_program_reads_its_input_and_says_how_it_ended(folders: None) -> None:
    echo = run_program("import sys; print(sys.stdin.read()[::-1]); print('ä \ud800', file=sys.stderr)", "ab\n")
    assert (echo.returncode, echo.stdout, echo.stderr) == (0, "\nba\n", "ä ?\n")
    assert run_program("raise SystemExit(3)").returncode == 3
    assert "SyntaxError" in run_program("print(").stderr
    assert run_program("import os; os.kill(os.getpid(), 11)").returncode == -signal.SIGSEGV
    assert run_program("", "unread" * 100_000).returncode == 0


def test_program_that_takes_too_long_is_killed_with_its_children(folders: None, tmp_path: Path) -> None:
    source = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("so far", flush=True)
time.sleep(600)
"""
    start = time.monotonic()
    done = run_program(source, timeout=3.0)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "so far\n") and time.monotonic() - start < 15
    assert gone([int((tmp_path / "pid").read_text())])


def test_program_that_ends_leaves_no_child(folders: None, tmp_path: Path) -> None:
    source = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    )
    assert gone([int(run_program(source).stdout)])


def test_program_output_is_cut(folders: None) -> None:
    done = run_program(f"print('x' * {3 * OUTPUT})")
    assert done.returncode == 0 and done.stdout == "x" * OUTPUT


def test_program_is_given_to_the_command_in_a_folder_of_its_own(folders: None) -> None:
    listing = run_program("", command=("sh", "-c", 'pwd; ls; echo "$0"'))
    where, names, path = listing.stdout.split()
    assert names == "program" and path == f"{where}/program"
    with pytest.raises(FileNotFoundError):
        run_program("", command=("/no/such/sandbox",))


def test_documented_verifier_of_code_tells_programs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "documented.py").write_text(re.findall(r"```python\n(.*?)```\n", DOCS.read_text(), re.DOTALL)[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = json.dumps([{"input": "1 2", "output": "3"}, {"input": "20 -5\n", "output": "15\n"}])
    programs = {
        "print(sum(map(int, input().split())))": 1.0,
        "print(3)": 0.0,
        "print(sum(map(int, input().split()))); raise SystemExit(1)": 0.0,
        "while True: pass": 0.0,
        "x = b'x' * (1 << 40)": 0.0,
        "while True: print('flood' * 10000)": 0.0,
        "import os\nwhile True: os.fork()": None,  # beyond the limit of its worker: an error, which is counted
    }
    pool = VerifierPool("documented:passes_tests", workers=2, timeout=30.0)
    said = [f"Let me see.\n```python\n{source}\n```\n" for source in programs]
    verdicts = pool.score([{"completion": text, "answer": answer} for text in [*said, "no program"]])
    pool.close()
    assert [verdict.value for verdict in verdicts] == [*programs.values(), 0.0]
    assert "more than 64 processes" in verdicts[-2].message


def test_program_does_not_see_the_import_path_of_training(folders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert "No module named 'toy_verifiers'" in run_program("import toy_verifiers").stderr
    assert run_program("import sys; print(sys.executable)").stdout.strip() == sys.executable
