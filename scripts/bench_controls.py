"""What each control's own arithmetic costs, as a share of the forward and backward passes over the same tokens.

    OMP_WAIT_POLICY=passive python scripts/bench_controls.py --model models/SmolLM2-135M-Instruct

`bench_step.py` times whole steps, whose noise of some percent hides costs this small. Here a control decides on many
tokens at once, median of several calls, and the model trains on a few sequences; both are divided by their tokens. Not
in these numbers: the moments that `clip_v` and `steer` with `form: full` ask of the head in the rollout's own pass.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from rlvr.controls import CONTROLS, Control, apply
from rlvr.surrogates import PpoClip
from rlvr.trainers.instruments import TokenDiagnostics
from rlvr.types import Coefficients, LocalReduce, Tokens, token_keys

SETTINGS = {"token_budget": {"tokens": 50_000}, "adaptive_entropy": {"coef": 0.001, "enabled": True}}


def seconds(call: Callable[[], object], times: int) -> float:
    """Median over `times` calls, after one to warm up."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def rollout(num_tokens: int, length: int = 512) -> Tokens:
    """Tokens of sequences of one length, with log-probs and entropies of a language model's size."""
    generator = torch.Generator().manual_seed(0)
    sequence = torch.arange(num_tokens) // length
    position = torch.arange(num_tokens) % length
    old = -torch.rand(num_tokens, generator=generator).exp().sub(1)
    return Tokens(
        logps=old,
        old_logps=old,
        advantages=torch.randn(num_tokens // length + 1, generator=generator)[sequence],
        sequence=sequence,
        num_sequences=int(sequence[-1]) + 1,
        position=position,
        key=token_keys(0, 0, sequence, position),
        entropy=torch.rand(num_tokens, generator=generator),
        rollout_logps=old + 0.01 * torch.randn(num_tokens, generator=generator),
        ref_logps=old,
        mean_discriminator=0.1 * torch.rand(num_tokens, generator=generator),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=100_000, help="of a rollout, for the controls")
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    passes = seconds(lambda: model(ids, labels=ids).loss.backward(), options.times) / ids.numel()
    tokens, surrogate = rollout(options.tokens), PpoClip()
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
    weight = 2 * torch.rand(options.tokens, generator=torch.Generator().manual_seed(1))

    def diagnose() -> None:
        diagnostics = TokenDiagnostics(True)
        diagnostics.add(tokens, Coefficients(weight=weight))
        diagnostics.close(LocalReduce())

    print(f"forward and backward: {1e6 * passes:.0f} us per token")
    print(f"{'control':<20} {'us per token':>12} {'share':>9}")
    for name in CONTROLS:
        control: Control = CONTROLS[name](**SETTINGS.get(name, {}))
        cost = seconds(lambda c=control: apply([c], tokens, clipped, LocalReduce()), options.times) / options.tokens  # type: ignore[misc]
        print(f"{name:<20} {1e6 * cost:>12.3f} {cost / passes:>9.4%}")
    cost = seconds(diagnose, options.times) / options.tokens
    print(f"{'(diagnostics)':<20} {1e6 * cost:>12.3f} {cost / passes:>9.4%}")


if __name__ == "__main__":
    main()
