"""What a mixture of LoRA experts costs beside one linear layer: forward and backward, sides taking turns.

    python scripts/bench_mole.py [--tokens 512] [--rounds 15]

Sides: LoRA of the same total rank; our experts (one product of all of them); a loop over experts, each computed for
every token (as DynMoLE's release does) or for its own tokens alone (as MixLoRA's does); and a grouped product of the
selected experts. Times are multiples of the frozen layer's own forward and backward in the same round.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from rlvr.mole.experts import Experts
from rlvr.mole.routers import build_router

SHAPES = {"SmolLM2-135M, up": (576, 1536, 6, 24), "1.5B, up": (1536, 8960, 8, 16), "7B, up": (3584, 18944, 8, 32)}


def routed(experts: Experts, x: Tensor) -> Tensor:
    return experts.route(linear(x, experts.router).softmax(-1)).weight * experts.scaling


def dense_loop(experts: Experts, x: Tensor) -> Tensor:
    weight, a, b = routed(experts, x), experts.a.split(experts.r), experts.b.split(experts.r, 1)
    return sum(weight[:, e : e + 1] * linear(linear(x, a[e]), b[e]) for e in range(experts.num_experts))  # type: ignore[return-value]


def sparse_loop(experts: Experts, x: Tensor) -> Tensor:
    weight, a, b = routed(experts, x), experts.a.split(experts.r), experts.b.split(experts.r, 1)
    out = x.new_zeros(len(x), len(experts.b))
    for e in range(experts.num_experts):
        mine = weight[:, e].nonzero()[:, 0]
        out = out.index_add(0, mine, weight[mine, e : e + 1] * linear(linear(x[mine], a[e]), b[e]))
    return out


def grouped(experts: Experts, x: Tensor) -> Tensor:
    weight = routed(experts, x)
    expert, token = weight.t().nonzero(as_tuple=True)  # sorted by expert
    ends = expert.bincount(minlength=experts.num_experts).cumsum(0).int()
    a = experts.a.view(experts.num_experts, experts.r, -1).transpose(1, 2)
    b = experts.b.t().reshape(experts.num_experts, experts.r, -1)
    hidden = grouped_mm(x[token], a, offs=ends) * weight[token, expert].unsqueeze(1)
    return torch.zeros(len(x), b.size(-1)).index_add(0, token, grouped_mm(hidden, b, offs=ends))


class Lora(nn.Module):
    def __init__(self, inside: int, outside: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, inside) / 50), nn.Parameter(torch.zeros(outside, rank))

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.a), self.b)


def sides(inside: int, outside: int, experts: int, r: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def mixture(router: object) -> Experts:
        one = Experts(inside, outside, num_experts=experts, r=r, scaling=2.0, router=build_router(router))  # type: ignore[arg-type]
        nn.init.normal_(one.b, std=0.02)
        return one

    top2, dynmole = mixture({"name": "top_k", "k": 2}), mixture("dynmole")
    found = {
        "LoRA": Lora(inside, outside, experts * r),
        "ours, DynMoLE": dynmole,
        "ours, top 2": top2,
        "loop over all, DynMoLE": lambda x: dense_loop(dynmole, x),
        "loop over selected, top 2": lambda x: sparse_loop(top2, x),
        "grouped, top 2": lambda x: grouped(top2, x),
    }
    x = torch.randn(7, inside)
    for name, reference in (
        ("loop over selected, top 2", top2),
        ("grouped, top 2", top2),
        ("loop over all, DynMoLE", dynmole),
    ):
        torch.testing.assert_close(found[name](x), reference(x), rtol=1e-4, atol=1e-4)
    return found


def beside(base: nn.Module, added: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return base(x) + added(x)  # type: ignore[no-any-return]


def seconds(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    begun = time.perf_counter()
    function(x).backward(grad)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s), {arguments.tokens} tokens, float32; with the layer, in its own time")
    for shape, (inside, outside, experts, r) in SHAPES.items():
        base = nn.Linear(inside, outside, bias=False).requires_grad_(False)
        x, grad = torch.randn(arguments.tokens, inside, requires_grad=True), torch.randn(arguments.tokens, outside)
        taking_turns = {
            "layer alone": base,
            **{name: partial(beside, base, f) for name, f in sides(inside, outside, experts, r).items()},
        }
        times: dict[str, list[float]] = {name: [] for name in taking_turns}
        for _ in range(arguments.rounds + 2):
            for name, function in taking_turns.items():
                times[name].append(seconds(function, x, grad))
        print(f"{shape}: {inside} to {outside}, {experts} experts of rank {r}")
        for name, taken in times.items():
            ratios = sorted(t / b for t, b in zip(taken[2:], times["layer alone"][2:], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            print(f"  {name:<26} {median(ratios):.2f}  ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
