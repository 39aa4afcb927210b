"""The benchmark of heads: its adapters compute what they say, its memory is exact, and its report is whole."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from scripts.kernels_bench.accuracy import errors
from scripts.kernels_bench.measure import LESS_WORK, WORKS, enter, peak, random_inputs
from scripts.kernels_bench.sides import SIDES

ROOT = Path(__file__).parents[1]
INPUTS = random_inputs(48, 16, 300, torch.float32, "cpu")


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its header."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.name)
def test_a_side_computes_what_it_says_or_says_why_not(side):
    entrant = enter(side, INPUTS)
    if entrant.call is None:
        assert not side.name.endswith(("chunked", "PyTorch", "TRL"))
        pytest.skip(entrant.why)
    (found,) = errors([entrant], INPUTS)
    assert (found.entropy_max is not None) == side.entropy
    assert all(error < 2e-6 for error in found[1:] if error is not None)


def test_peak_counts_what_lives_at_the_same_time():
    def run():
        for _ in range(3):
            a = torch.empty(1000)
            b = a.exp()
            del a
            b.exp()

    assert peak(run, torch.device("cpu")) == 3 * 4000  # a, its exp, and b of the round before


def test_the_report_has_every_table(tiny_model_dir, tmp_path, monkeypatch):
    shape = ["--tokens", "48", "--hidden", "16", "--vocab", "300", "--repetitions", "2"]
    sides = ["--sides", "naive PyTorch", "TRL", "cut-cross-entropy"]
    out = tmp_path / "report"
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench", *shape, *sides, "--model", str(tiny_model_dir), "--out", str(out)])
    runpy.run_path(str(ROOT / "scripts" / "bench_kernels.py"), run_name="__main__")

    _, *of_shapes, accuracy = out.with_suffix(".md").read_text().split("\n## ")
    assert len(of_shapes) == 2
    for section in of_shapes:
        about, *tables = section.split("\n### ")
        here = {name: why for name, *_, why in rows(about)}
        assert here["ours, chunked"] == here["naive PyTorch"] == here["TRL 4096x32768"] == "runs"
        assert here["cut-cross-entropy"] != "runs"
        assert [table.splitlines()[0] for table in tables] == [work.title for work in (*WORKS, *LESS_WORK)]
        for table in tables:
            ours, *others = rows(table)
            assert (ours[0], ours[4], ours[6]) == ("ours, chunked", "1.00", "1.00")
            assert others[0][0] == "naive PyTorch" and others[-1][0].startswith("TRL")
    ours, *others = rows(accuracy)
    assert all(float(other[1]) > float(ours[1]) for other in others)  # they round the logits, we do not
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
