"""Errors against float64 on the logits of a trained model, whose distributions random ones do not resemble."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr_kernels import reference

from .measure import Entrant, Inputs

TOKENS = 512
ENTROPY_COEF = 0.01
ROWS = 64  # at a time in float64, for its memory
TEXT = """The tide gauge at the end of the pier has been read every hour since 1871. At first a keeper walked out with
a lantern and wrote the level into a ledger; later a float, a chain and a pen drew the curve on a drum of
paper, and today a radar looks down at the water six times a minute. The series is one of the longest of its
kind, and it is the reason why a small town knows something that large cities had to guess: its harbour rises
by 2.1 millimetres per year, a little faster than the ocean, because the ground beneath it is sinking.

Question: A tank holds 240 litres. One pipe fills it in 6 hours, a second one in 4 hours, and a leak empties the full
tank in 12 hours. All three are open. How long does it take to fill the tank? Answer: The first pipe brings 240 / 6 =
40 litres per hour, the second 240 / 4 = 60. The leak loses 240 / 12 = 20. Together that is 40 + 60 - 20 = 80 litres
per hour, so the tank is full after 240 / 80 = 3 hours. The answer is 3.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

Dear Ms. Okafor, thank you for your letter of the 3rd of May. We are sorry that the chairs arrived with two screws too
few and have sent a full set this morning. Please keep the old ones; they fit the table as well. If anything else is
missing, call us on any weekday between nine and five, and ask for Henrik, who packed your order and would like to
apologise.

To bake the bread, mix 500 g of flour with 350 g of warm water and leave it for half an hour. Add 10 g of salt and 100
g of ripe starter, fold the dough four times, and let it rise until it has grown by half. Shape it, put it into a
basket overnight in the fridge, and bake it the next morning in a hot pot, 20 minutes with the lid and 25 without."""


class Errors(NamedTuple):
    """In nats; of the gradients relative to their norm. None for what a side does not compute."""

    name: str
    logps_max: float
    logps_mean: float
    entropy_max: float | None
    hidden: float
    weight: float


def real_inputs(model: str, dtype: torch.dtype, device: str) -> Inputs:
    """The model's last hidden states on the text, its head, and the tokens that follow."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : TOKENS + 1]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        hidden = policy.base_model(ids[:, :-1]).last_hidden_state[0]
    weight = policy.get_output_embeddings().weight.detach()
    return Inputs(hidden.to(device, dtype), weight.to(device, dtype), ids[0, 1:].to(device))


def errors(entrants: Sequence[Entrant], inputs: Inputs) -> list[Errors]:
    """Of every entrant that runs; the gradient is that of mean(A log p), plus 0.01 mean(entropy) where it has one."""
    exact = {with_entropy: _exact(inputs, with_entropy) for with_entropy in (True, False)}
    return [_errors(e, inputs, exact[e.side.entropy]) for e in entrants if e.call is not None]


def _errors(entrant: Entrant, inputs: Inputs, exact: dict[str, Tensor]) -> Errors:
    assert entrant.call is not None
    hidden, weight = (x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight))
    want = ("logps", "entropy") if entrant.side.entropy else ("logps",)
    stats = entrant.call(hidden, weight, inputs.targets, want)
    upstream = _upstream(len(hidden), hidden.device)
    outputs = [stats[name] for name in want]
    torch.autograd.backward(outputs, [upstream[name].to(x.dtype) for name, x in zip(want, outputs, strict=True)])
    off = {name: (stats[name].detach().double() - exact[name]).abs() for name in want}
    entropy = float(off["entropy"].max()) if entrant.side.entropy else None
    by = [_relative(x.grad, exact[name]) for name, x in (("hidden", hidden), ("weight", weight))]
    return Errors(entrant.name, float(off["logps"].max()), float(off["logps"].mean()), entropy, *by)


def _exact(inputs: Inputs, with_entropy: bool) -> dict[str, Tensor]:
    """log-prob, entropy and the gradients by hidden and weight from the same inputs in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    upstream = _upstream(len(hidden), hidden.device)
    want = ("logps", "entropy") if with_entropy else ("logps",)
    found: dict[str, list[Tensor]] = {name: [] for name in want}
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        stats = reference.token_stats(hidden[rows], weight, inputs.targets[rows], want=want)
        outputs = [getattr(stats, name) for name in want]
        torch.autograd.backward(outputs, [upstream[name][rows] for name in want])
        for name, x in zip(want, outputs, strict=True):
            found[name].append(x.detach())
    assert hidden.grad is not None and weight.grad is not None
    return {name: torch.cat(x) for name, x in found.items()} | {"hidden": hidden.grad, "weight": weight.grad}


def _upstream(tokens: int, device: torch.device) -> dict[str, Tensor]:
    advantages = torch.randn(tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "logps": (advantages / tokens).to(device),
        "entropy": torch.full((tokens,), ENTROPY_COEF / tokens, dtype=torch.float64, device=device),
    }


def _relative(found: Tensor | None, exact: Tensor) -> float:
    assert found is not None
    return float((found.double() - exact).norm() / exact.norm())
