"""A rollout-scope control over two real processes decides what it decides in one: gloo, through accelerate."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from control_cases import CASES, batch
from test_controls import assert_same, decide, pick
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from rlvr.types import Coefficients, Mean, Tokens


class Split(NamedTuple):
    """A whole batch, and the rank that has each token."""

    tokens: Tokens
    rank: Tensor


class Result(NamedTuple):
    """What one rank has to say about one split: coefficients, metrics, or the error it met."""

    coefficients: dict[str, Tensor]
    metrics: dict[str, Mean]
    error: str


def splits() -> dict[str, Split]:
    tokens = batch(7)
    tokens = replace(tokens, logps=tokens.logps.detach(), entropy=tokens.entropy.detach())
    ones, few = torch.ones_like(tokens.sequence), (tokens.sequence > 2).long()
    zeros = torch.zeros_like(tokens.old_logps)
    return {
        "uneven": Split(tokens, few),
        "interleaved": Split(tokens, tokens.sequence % 2),
        "rank 1 has no tokens": Split(tokens, 0 * ones),
        "rank 0 has no tokens": Split(tokens, ones),
        "ties": Split(replace(tokens, logps=zeros - 1, old_logps=zeros - 1), few),
        "no advantage": Split(replace(tokens, advantages=zeros), few),
        "no tokens": Split(pick(tokens, ones[:0]), few[:0]),
    }


def run_rank(rank: int, folder: str) -> None:
    """Save what every control decides on this rank's part of every split."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )  # accelerate asks for them; the file is what is used
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from accelerate import Accelerator

    from rlvr.trainers.distributed import AcceleratorReduce

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    reduce, found = AcceleratorReduce(accelerator), {}
    for split, (tokens, owner) in splits().items():
        for name, case in CASES.items():
            try:
                coefficients, metrics = decide(case.active, tokens.select(owner == rank), reduce)
                found[split, name] = (coefficients.present(), {k: (m.total, m.count) for k, m in metrics.items()}, "")
            except Exception as error:  # told to the parent; collectives are over when it is raised, on both ranks
                found[split, name] = ({}, {}, repr(error))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Result]]:
    """Results by (split, control), of each rank; the processes run once for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, args=(str(folder),), nprocs=2)
    return [load(folder / f"{rank}.pt") for rank in range(2)]


def load(path: Path) -> dict[tuple[str, str], Result]:
    return {
        key: Result(coefficients, {k: Mean(*m) for k, m in metrics.items()}, error)
        for key, (coefficients, metrics, error) in torch.load(path).items()
    }


@pytest.mark.parametrize(("split", "name"), [(split, name) for split in splits() for name in CASES])
def test_two_ranks_decide_what_one_does(split: str, name: str, two_ranks: list[dict[tuple[str, str], Result]]) -> None:
    tokens, owner = splits()[split]
    whole, metrics = decide(CASES[name].active, tokens)
    for rank, results in enumerate(two_ranks):
        got = results[split, name]
        assert not got.error
        expected = {k: x[owner == rank] for k, x in whole.present().items()}
        assert_same(Coefficients(**got.coefficients), Coefficients(**expected))
    for key, mean in metrics.items():
        both = two_ranks[0][split, name].metrics[key] + two_ranks[1][split, name].metrics[key]
        assert float(both.count) == float(mean.count)
        assert float(both.total) == pytest.approx(float(mean.total), abs=1e-10)
