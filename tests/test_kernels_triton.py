"""The laws of triton_cases.py, in a process of their own: Triton decides at its import whether it interprets."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreter", "gpu"])
def test_triton_backends_keep_their_laws(interpret):
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(CASES)],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        cwd=CASES.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
