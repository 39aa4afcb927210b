"""A head partitioned by DeepSpeed's ZeRO-3 over two real processes (gloo) trains as the whole one does in one process.

Inside the engine's forward ZeRO-3 gathers it for the module that asks for its weight, and frees it; beside it the head
does so. The first run on a machine takes longer: it compiles a part of DeepSpeed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from kernels_ranks import RATE, STEPS, Llama, Trained, assert_trained_alike, batch, loss, on_two_ranks, trained_by_one
from torch import Tensor, nn

from rlvr_kernels import TokenStats, token_stats

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        # Small parameters are partitioned, too, and none is kept because it will be used again soon.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


class Biased(nn.Module):
    """A head with a bias under one layer. Returns the hidden states if there are no targets."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.lm_head = nn.Linear(5, 6), nn.Linear(6, 11)
        self.lm_head.requires_grad_(not frozen)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | TokenStats:
        hidden = self.body(x)
        return hidden if targets is None else self.statistics(hidden, targets)

    def statistics(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        return token_stats(hidden, self.lm_head.weight, targets, bias=self.lm_head.bias)


class Seen(NamedTuple):
    """trained: losses and weights.   held: elements of the head's weight at hand after each forward and each step."""

    trained: Trained
    held: list[int]


def vectors(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """x [N, 5] and targets [N]: 7 tokens on rank 0; 3 on rank 1, and none in the last step."""
    g = torch.Generator().manual_seed(10 * step + rank)
    n = 7 if rank == 0 else 0 if step == STEPS - 1 else 3
    return torch.randn(n, 5, generator=g), torch.randint(11, (n,), generator=g)


def engine_of(model: nn.Module) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config=SETTINGS)[0]


def train(model: Any, rank: int, inputs: Callable[[int, int], tuple[Tensor, Tensor]], beside: bool = False) -> Seen:
    from deepspeed import zero

    engine, losses, held = engine_of(model), [], []
    for step in range(STEPS):
        x, targets = inputs(step, rank)
        stats = model.statistics(engine(x), targets) if beside else engine(x, targets)
        held.append(model.lm_head.weight.numel())
        objective = loss(stats)
        engine.backward(objective)
        engine.step()
        held.append(model.lm_head.weight.numel())
        losses.append(objective.item())
    with zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Seen(Trained(losses, weights), held)


def trained_beside(rank: int) -> tuple[Tensor, str]:
    """Log-probs of a partitioned head without gradient, and what happens with it."""
    model, (x, targets) = Biased(frozen=False), vectors(0, 0)
    engine = engine_of(model)
    with torch.no_grad():
        logps = model.statistics(engine(x), targets).logps
    with pytest.raises(RuntimeError) as error:
        engine.backward(loss(model.statistics(engine(x), targets)))
    return logps, str(error.value)


def work(rank: int) -> dict[str, Any]:
    return {
        "biased": train(Biased(frozen=False), rank, vectors),
        "frozen": train(Biased(frozen=True), rank, vectors),
        "frozen_beside": train(Biased(frozen=True), rank, vectors, beside=True),
        "tied": train(Llama(tied=True), rank, batch),
        "untied": train(Llama(tied=False), rank, batch),
        "trained_beside": trained_beside(rank),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return on_two_ranks(work)


@pytest.mark.parametrize("name", ["biased", "frozen", "frozen_beside", "tied", "untied"])
def test_a_partitioned_head_trains_as_a_whole_one_and_is_not_kept(name: str, two_ranks: list[dict[str, Any]]) -> None:
    """With fewer tokens on one rank, then none; in neither step is it kept between the passes or after them."""
    seen: list[Seen] = [results[name] for results in two_ranks]
    if name in ("tied", "untied"):
        want = trained_by_one(Llama(name == "tied"), batch)
    else:
        want = trained_by_one(Biased(name != "biased"), vectors)
    assert_trained_alike([each.trained for each in seen], want)
    assert all(each.held == [0] * 2 * STEPS for each in seen)


def test_a_partitioned_head_beside_the_engine_has_statistics_but_no_gradient(two_ranks: list[dict[str, Any]]) -> None:
    want = Biased(frozen=False)(*vectors(0, 0)).logps
    for results in two_ranks:
        logps, error = results["trained_beside"]
        torch.testing.assert_close(logps, want.detach(), rtol=1e-6, atol=1e-6)
        assert "ZeRO-3" in error
