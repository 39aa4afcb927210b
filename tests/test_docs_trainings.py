"""Trainings of the documents that one process makes, as they stand there, but two steps of a tiny model, no vLLM."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import docs_cases
import pytest
from docs_cases import ROOT

from rlvr.monitor.records import read_run, read_steps

pytestmark = pytest.mark.slow

LARGER = "docs/lab.md"  # the laboratory on SmolLM2: its runs become a page together
SERVED = "vllm_server_base_url"  # test_server_training.py
SMALL = {
    "max_steps": 2,
    "use_vllm": "false",
    "use_cpu": "true",
    "bf16": "false",
    "train_size": 32,
    "heldout_size": 4,
    "num_generations": 4,
    "num_generations_eval": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_completion_length": 4,
}
TRAININGS = [
    (page, line)
    for page, line in docs_cases.all_commands()
    if re.match(r"([A-Z_]+=\S+ )?python recipes/", line) and SERVED not in line
]


@pytest.fixture(scope="module")
def workplace(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory where the documents' model is a tiny one."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_model_dir, folder / "models" / "SmolLM2-135M-Instruct")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def train(line: str, workplace: Path) -> Path:
    """Runs the command with SMALL added; returns its run directory."""
    variables = dict(word.split("=", 1) for word in shlex.split(line) if re.fullmatch(r"[A-Z_]+=\S+", word))
    words = docs_cases.words_of(line)[1:] + [
        word for name, value in SMALL.items() for word in (f"--{name}", str(value))
    ]
    run = subprocess.run(
        [sys.executable, *words],
        cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = re.search(r"--output_dir (\S+)", line)
    path = workplace / (said[1] if said else "runs/mole_grpo")
    assert read_run(path)["status"] == "finished" and len(read_steps(path)) == 2
    return path


@pytest.mark.parametrize(("page", "line"), [one for one in TRAININGS if one[0] != LARGER])
def test_training_of_the_documents_runs(page: str, line: str, workplace: Path) -> None:
    train(line, workplace)


def test_larger_setting_of_the_laboratory_becomes_a_page(workplace: Path) -> None:
    runs = [train(line, workplace) for page, line in TRAININGS if page == LARGER]
    assert len(runs) > 3
    folder = runs[0].parent
    command = [sys.executable, str(ROOT / "scripts" / "entropy_lab.py"), "--read", str(folder)]
    subprocess.run(command, check=True, timeout=120)
    text = (folder / "report.html").read_text()
    assert all(f">{title}<" in text for title in ("GRPO", "Clip-Cov", "KL-Cov", "thermostat"))
