"""A head spread over two real processes (gloo) computes what one process computes with the whole of it.

Tensor parallelism (each rank has rows of the vocabulary, all have the same tokens), DTensors (each rank has tokens of
its own) and FSDP2 around a model that uses its head's weight beside the head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import CASES, IGNORED, Case, Result, check_grads, check_stats, coefficients, evaluate, random_case
from kernels_ranks import RATE, STEPS, Llama, Trained, assert_trained_alike, batch, loss, on_two_ranks, trained_by_one
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from rlvr_kernels import token_stats
from rlvr_kernels.sharded import gathered

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


class Split(NamedTuple):
    """A case, the rank that has each token [N], and the coefficients [N] of each statistic in the loss."""

    case: Case
    owner: Tensor
    coef: dict[str, Tensor]

    def of(self, rank: int) -> "Split":
        mine = self.owner == rank
        options = {k: x[mine] if isinstance(x, Tensor) else x for k, x in self.case.options.items()}
        case = self.case._replace(hidden=self.case.hidden[mine], targets=self.case.targets[mine], options=options)
        return Split(case, self.owner[mine], {name: c[mine] for name, c in self.coef.items()})


class Traffic(NamedTuple):
    """Collectives of the passes by name, and the elements of the largest tensor that is kept between them."""

    forward: dict[str, int]
    backward: dict[str, int]
    kept: int
    by_hidden: Tensor


class Layout(NamedTuple):
    mesh: tuple[int, ...]
    weight: list[Placement]
    bias: list[Placement]


LAYOUTS = {
    "rows": Layout((2,), [Shard(0)], [Shard(0)]),
    "columns": Layout((2,), [Shard(1)], [Replicate()]),
    "replicated": Layout((2,), [Replicate()], [Replicate()]),
    "rows_of_replicas": Layout((2, 1), [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
}
FSDP2 = [(tied, alone, reshard) for tied in (True, False) for alone in (True, False) for reshard in (True, False)]


def unlabeled(case: Case) -> Case:
    return case._replace(targets=torch.full_like(case.targets, IGNORED))


VOCABULARY_PARALLEL: dict[str, Callable[[], Case]] = {
    **CASES,
    "no_labels": lambda: unlabeled(CASES["bias"]()),
    "no_tokens": lambda: random_case(0, 16, 67),
}


def splits() -> dict[str, Split]:
    case = CASES["bias"]()
    n = len(case.targets)
    few, coef = (torch.arange(n) > n - 4).long(), coefficients(n)
    warm = CASES["per_token_temperature"]()
    return {
        "even": Split(case, torch.arange(n) % 2, coef),
        "uneven": Split(case, few, coef),
        "temperature": Split(warm, (warm.targets % 3 == 0).long(), coefficients(len(warm.targets))),
        "rank 1 has no tokens": Split(case, torch.zeros_like(few), coef),
        "rank 1 has no labels": Split(case._replace(targets=case.targets.where(few == 0, IGNORED)), few, coef),
        "rank 1 has no live tokens": Split(case, few, {name: c * (1 - few) for name, c in coef.items()}),
    }


def vocabulary_of(case: Case, rank: int) -> tuple[Case, int]:
    """The rank's rows of the head, the first rank having one third of them; and the number of the first."""
    cut = -(-len(case.weight) // 3)
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    return case._replace(weight=case.weight[mine], bias=None if case.bias is None else case.bias[mine]), mine.start


def distributed(case: Case, name: str) -> Case:
    layout = LAYOUTS[name]
    mesh = init_device_mesh("cpu", layout.mesh)
    weight = distribute_tensor(case.weight, mesh, layout.weight)
    return case._replace(
        weight=weight, bias=None if case.bias is None else distribute_tensor(case.bias, mesh, layout.bias)
    )


def whole(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def refusal(start: int, target: int) -> str:
    """What a rank is told whose 5 rows are said to begin at `start`."""
    hidden, weight, targets = torch.ones(1, 3), torch.ones(5, 3), torch.tensor([target])
    try:
        token_stats(hidden, weight, targets, group=torch.distributed.group.WORLD, vocab_start=start)
    except ValueError as error:
        return str(error)
    return ""


def calls(mode: CommDebugMode) -> dict[str, int]:
    return {op.__name__: count for op, count in mode.get_comm_counts().items() if count}


def traffic(case: Case, frozen: bool = False, **options: Any) -> Traffic:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.detach().requires_grad_(not frozen)
    with CommDebugMode() as forward:
        stats = token_stats(hidden, weight, case.targets, **options)
    saved = [x.to_local() if isinstance(x, DTensor) else x for x in stats.logps.grad_fn.saved_tensors if x is not None]
    with CommDebugMode() as backward:
        stats.logps.sum().backward()
    assert (weight.grad is None) == frozen
    return Traffic(calls(forward), calls(backward), max(x.numel() for x in saved), hidden.grad)


def wide() -> Case:
    """A head that is larger than everything else."""
    return random_case(4, 16, 102)


def fsdp2(rank: int, tied: bool, alone: bool, reshard: bool) -> tuple[Trained, bool]:
    """alone: the head is a group of its own, with the embedding if it is tied.   reshard: the root's after forward.

    And whether the head's weight is a DTensor where the root's forward uses it.
    """
    model, seen, losses = Llama(tied), [], []
    for layer in model.model.layers:
        fully_shard(layer)
    if alone:
        fully_shard([model.model.embed_tokens, model.lm_head] if tied else model.lm_head)
    fully_shard(model, reshard_after_forward=reshard)
    model.model.register_forward_hook(lambda *_: seen.append(isinstance(model.lm_head.weight, DTensor)))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        objective = loss(model(*batch(step, rank)))
        objective.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective.item())
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return Trained(losses, weights), all(seen)


def work(rank: int) -> dict[Any, Any]:
    """Everything that this rank computes, by mechanism and case."""
    found: dict[Any, Any] = {}
    group = torch.distributed.group.WORLD
    for dtype in TOLERANCE:
        for name, make in VOCABULARY_PARALLEL.items():
            case, start = vocabulary_of(make().to(dtype), rank)
            found["group", name, dtype] = evaluate(token_stats, case, group=group, vocab_start=start)
        for layout in LAYOUTS:
            for name, split in splits().items():
                case, _, coef = split.of(rank)
                result = evaluate(token_stats, distributed(case.to(dtype), layout), coef)
                assert result.grads["weight"].placements == tuple(LAYOUTS[layout].weight)
                found[layout, name, dtype] = result._replace(grads=whole(result.grads))
    case, start = vocabulary_of(wide(), rank)
    found["traffic", "group"] = traffic(case, group=group, vocab_start=start)
    found["start forgotten"] = refusal(0, target=1)
    found["target beyond"] = refusal(5 * rank, target=10)
    found["start given"] = refusal(5 * rank, target=9)
    for frozen in (False, True):
        found["traffic", "rows", frozen] = traffic(distributed(wide(), "rows"), frozen)
    replica = distribute_tensor(wide().weight, init_device_mesh("cpu", (2,)), [Replicate()])
    with gathered(replica, None) as (weight, _):
        found["copied"] = weight.data_ptr() != replica.to_local().data_ptr()
    for options in FSDP2:
        found["fsdp2", *options] = fsdp2(rank, *options)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    return on_two_ranks(work)


@cache
def one_process_trained(tied: bool) -> list[Trained]:
    return trained_by_one(Llama(tied), batch)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", VOCABULARY_PARALLEL)
def test_a_vocabulary_over_ranks_is_the_whole_vocabulary(name: str, dtype: torch.dtype, two_ranks: list[dict]) -> None:
    case = VOCABULARY_PARALLEL[name]().to(dtype)
    want = evaluate(token_stats, case)
    got: list[Result] = [results["group", name, dtype] for results in two_ranks]
    for mine in got:
        check_stats(mine.stats, want.stats, TOLERANCE[dtype])
        check_grads({"hidden": mine.grads["hidden"]}, {"hidden": want.grads["hidden"]}, TOLERANCE[dtype])
    rows = {key: torch.cat([mine.grads[key] for mine in got]) for key in want.grads if key != "hidden"}
    check_grads(rows, {key: want.grads[key] for key in rows}, TOLERANCE[dtype])


def test_shards_that_are_no_vocabulary_and_targets_beyond_it_are_refused_on_all_ranks(two_ranks: list[dict]) -> None:
    for rank in two_ranks:
        assert "shards (first row, rows) [(0, 5), (0, 5)] leave a gap or overlap at 5" in rank["start forgotten"]
        assert "targets has 10: want numbers in [0, 10)" in rank["target beyond"]
        assert rank["start given"] == ""


def test_a_vocabulary_over_ranks_takes_one_collective_for_each_pass(two_ranks: list[dict]) -> None:
    for results in two_ranks:
        seen = results["traffic", "group"]
        assert (sum(seen.forward.values()), sum(seen.backward.values())) == (1, 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", splits())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dtensor_head_gets_the_average_of_the_ranks_gradients(
    layout: str, name: str, dtype: torch.dtype, two_ranks: list[dict]
) -> None:
    """On the ranks' own tokens, however many; the sum over all tokens is that of one process."""
    split = splits()[name]
    want = evaluate(token_stats, split.case.to(dtype), split.coef)
    for rank, results in enumerate(two_ranks):
        got, mine = results[layout, name, dtype], split.owner == rank
        check_stats(got.stats, type(want.stats)(*(x[mine] for x in want.stats)), TOLERANCE[dtype])
        expected = {key: g[mine] if key == "hidden" else g / 2 for key, g in want.grads.items()}
        check_grads(got.grads, expected, TOLERANCE[dtype])


def test_a_dtensor_head_is_gathered_for_each_pass_and_not_kept_between(two_ranks: list[dict]) -> None:
    for results in two_ranks:
        seen = results["traffic", "rows", False]
        assert seen.forward == {"all_gather_into_tensor": 1}
        assert seen.backward == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
        assert seen.kept == wide().weight.numel() // 2


def test_a_frozen_dtensor_head_passes_the_gradient_on_and_reduces_none(two_ranks: list[dict]) -> None:
    want = traffic(wide())
    for results in two_ranks:
        seen = results["traffic", "rows", True]
        assert seen.backward == {"all_gather_into_tensor": 1}
        assert torch.equal(seen.by_hidden, want.by_hidden)


def test_a_whole_head_is_not_copied(two_ranks: list[dict]) -> None:
    weight, bias = torch.zeros(3, 2, requires_grad=True), torch.zeros(3)
    with gathered(weight, bias) as (w, b):
        assert w.data_ptr() == weight.data_ptr()
        assert b is not None and b.data_ptr() == bias.data_ptr()
    assert not any(results["copied"] for results in two_ranks)


@pytest.mark.parametrize(("tied", "alone", "reshard"), FSDP2)
def test_fsdp2_trains_what_one_process_does(tied: bool, alone: bool, reshard: bool, two_ranks: list[dict]) -> None:
    got = [results["fsdp2", tied, alone, reshard] for results in two_ranks]
    assert_trained_alike([trained for trained, _ in got], one_process_trained(tied))
    assert all(is_dtensor == (alone and not tied) for _, is_dtensor in got)
