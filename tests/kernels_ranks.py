"""Two real processes (gloo), and a small model with its head outside of any module's forward, for them to train."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from rlvr_kernels import TokenStats, token_stats

RANKS, STEPS, VOCABULARY, RATE = 2, 2, 37, 0.5


def on_two_ranks(work: Callable[[int], Any]) -> list[Any]:
    """What work(rank), a function of a module, returns on each of two ranks; one that waits for the other too long
    fails."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, args=(work, folder), nprocs=RANKS)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _run(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    # Asked for by launchers' libraries; the file is what is used.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Trained(NamedTuple):
    """losses: of each step.   weights: by name, whole, after the last one."""

    losses: list[float]
    weights: dict[str, Tensor]


class Llama(nn.Module):
    """A tiny one whose head's weight is used by the root's forward, the head's own forward never."""

    def __init__(self, tied: bool) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, initializer_range=0.2, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = LlamaModel(config)
            self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> TokenStats:
        hidden = self.model(input_ids=ids).last_hidden_state
        return token_stats(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Token numbers and targets [1, 9]: rank 1 has fewer labels than rank 0, and in the last step none."""
    g = torch.Generator().manual_seed(10 * step + rank)
    ids, targets = torch.randint(VOCABULARY, (2, 1, 9), generator=g)
    if rank == 1:
        targets[:, 0 if step == STEPS - 1 else 4 :] = -100
    return ids, targets


def loss(stats: TokenStats) -> Tensor:
    assert stats.logps is not None and stats.entropy is not None
    return -(stats.logps + 0.3 * stats.entropy).sum() / 20


def trained_by_one(model: nn.Module, inputs: Callable[[int, int], tuple[Tensor, Tensor]]) -> list[Trained]:
    """One process takes the average of the ranks' losses, of inputs(step, rank); what each rank has to report."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        each = [loss(model(*inputs(step, rank))) for rank in range(RANKS)]
        (sum(each, torch.zeros(())) / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
        for mine, x in zip(losses, each, strict=True):
            mine.append(x.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return [Trained(mine, weights) for mine in losses]


def assert_trained_alike(got: list[Trained], want: list[Trained]) -> None:
    """Within float32 rounding."""
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine.losses, expected.losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.weights, expected.weights, rtol=1e-6, atol=1e-6)
