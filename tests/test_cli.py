"""The `rlvr` command: its words, its exit status, and that it needs no torch."""

import subprocess
import sys

import pytest

from rlvr import __version__
from rlvr.cli import main
from rlvr.monitor import METRICS, Recorder


@pytest.fixture
def run_dir(tmp_path):
    recorder = Recorder(tmp_path / "run")
    recorder.record_step(1, {"entropy/mean": 0.5, "policy/tokens": 10})
    return tmp_path / "run"


def test_summary_prints_the_run(run_dir, capsys):
    assert main(["summary", str(run_dir)]) == 0
    assert "1 optimizer step (last 1)" in capsys.readouterr().out


def test_report_prints_the_path_it_wrote(run_dir, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(run_dir), "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output) and output.stat().st_size > 1000


def test_metrics_prints_every_name(capsys):
    assert main(["metrics"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in METRICS)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"rlvr {__version__}\n"


@pytest.mark.parametrize("command", ["summary", "report"])
def test_a_directory_without_a_run_is_one_line_and_status_2(command, tmp_path, capsys):
    assert main([command, str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "holds no run" in captured.err


def test_monitor_and_cli_import_without_torch():
    heavy = ["torch", "trl", "transformers", "vllm", "matplotlib"]
    code = f"import sys, rlvr.cli, rlvr.monitor; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
