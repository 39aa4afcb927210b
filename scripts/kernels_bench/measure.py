"""Time and memory of one forward and one backward pass, all sides in turns."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_kernels.stats import MOMENTS

from .sides import Call, Side


class Inputs(NamedTuple):
    """hidden: [N, D].   weight: [V, D].   targets: [N] int64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Work(NamedTuple):
    """want: fields to compute; log-prob and entropy get a gradient.   active: share of the tokens that have one."""

    title: str
    want: tuple[str, ...] = ("logps", "entropy")
    active: float = 1.0
    frozen: bool = False


class Entrant(NamedTuple):
    """A side at one setting.   call: None if it cannot run here, for the reason `why`.   best: its fastest setting."""

    name: str
    side: Side
    call: Call | None
    why: str = ""
    best: bool = True


class Result(NamedTuple):
    """Seconds of each repetition, and bytes at the peak beyond the inputs."""

    name: str
    forward: list[float]
    backward: list[float]
    peak: int

    @property
    def total(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


WORKS = (
    Work("Log-prob and entropy"),
    Work("Log-prob only", ("logps",)),
    Work("Log-prob, entropy and moments (without gradient)", ("logps", "entropy", *MOMENTS)),
)
LESS_WORK = (
    Work("Log-prob and entropy, 50 % of the tokens with a gradient", active=0.5),
    Work("Log-prob and entropy, 25 % of the tokens with a gradient", active=0.25),
    Work("Log-prob and entropy, weight frozen", frozen=True),
)


def random_inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    """Logits of standard deviation 2."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    weight = normal(vocabulary, hidden).mul_(2 / hidden**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return Inputs(normal(tokens, hidden).to(dtype), weight, targets)


def passes(call: Call, inputs: Inputs, work: Work) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not work.frozen)
    upstream = torch.ones_like(inputs.targets, dtype=torch.float32)
    upstream[torch.randperm(len(upstream), device=upstream.device) >= work.active * len(upstream)] = 0
    began = _now(hidden.device)
    stats = call(hidden, weight, inputs.targets, work.want)
    between = _now(hidden.device)
    outputs = [stats[name] for name in ("logps", "entropy") if name in work.want]
    torch.autograd.backward(outputs, [upstream.to(x.dtype) for x in outputs])
    return between - began, _now(hidden.device) - between


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch has allocated at the peak beyond those before; the libraries' own workspaces are not in it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    recorded = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def enter(side: Side, inputs: Inputs) -> Entrant:
    """The side at its default setting, or why it cannot run here."""
    name = _label(side, side.tiles[0])
    try:
        call = partial(side.load(), **side.tiles[0])
        passes(call, inputs, _usual(side))
    except Exception as error:  # whatever a peer raises on a device that it is not made for
        return Entrant(name, side, None, why=_reason(error))
    return Entrant(name, side, call)


def tuned(entrant: Entrant, inputs: Inputs) -> list[Entrant]:
    """The entrant and, if another setting is faster, the side at its fastest one."""
    name, side, call, *_ = entrant
    if call is None or len(side.tiles) == 1:
        return [entrant]
    calls = {_label(side, tile): partial(side.load(), **tile) for tile in side.tiles}
    seconds = {label: _seconds(call, inputs, _usual(side)) for label, call in calls.items()}
    best = min(seconds, key=seconds.__getitem__)
    if best == name:
        return [entrant]
    return [entrant._replace(best=False), Entrant(f"{best}, best of {len(calls)}", side, calls[best])]


def compare(entrants: Sequence[Entrant], inputs: Inputs, work: Work, repetitions: int) -> list[Result]:
    """All entrants that compute this work, in turns whose order rotates, after one pass to warm up."""
    calls = {e.name: e.call for e in entrants if e.call is not None and e.side.computes(work.want)}
    found = {}
    for name, call in calls.items():
        passes(call, inputs, work)
        found[name] = Result(name, [], [], peak(partial(passes, call, inputs, work), inputs.hidden.device))
    names = list(calls)
    for i in range(repetitions):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            forward, backward = passes(calls[name], inputs, work)
            found[name].forward.append(forward)
            found[name].backward.append(backward)
    return list(found.values())


def _usual(side: Side) -> Work:
    return WORKS[0] if side.entropy else WORKS[1]


def _seconds(call: Call, inputs: Inputs, work: Work) -> float:
    """The faster of two, after one to warm up."""
    try:
        return min([sum(passes(call, inputs, work)) for _ in range(3)][1:])
    except torch.OutOfMemoryError:
        return float("inf")


def _label(side: Side, tile: dict[str, int]) -> str:
    return " ".join([side.name, "x".join(map(str, tile.values()))]).strip()


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    first_line, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first_line}"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()  # which other processes on the machine disturb less
    return time.perf_counter()
