"""Time, memory and accuracy of a head's log-prob and entropy: ours, naive PyTorch and the public fused heads.

    OMP_WAIT_POLICY=passive python scripts/bench_kernels.py --out kernels

All sides run in one process and take turns in an order that rotates: one forward pass, and one backward pass by
hidden states and weight. Times are wall time, or CPU time where one thread computes, as medians with quartiles;
ratios to ours are medians of those within each repetition. Memory is what PyTorch has allocated at the peak beyond
the inputs, outputs and gradients among it; the libraries' own workspaces are not.

Peers run where they are installed and made for the device: a table says what each computes, and why one does not run.
A side with a tile to choose runs with its default and with the fastest of those tried. In the tables with less work,
each has its fastest only.

The second shape is a trained model's own head on a text, and so is the comparison with float64: inputs rounded to
bfloat16 on every side, in float64 too. Gradients come back in bfloat16, whose rounding alone is 2e-3 of their norm.
"""

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from kernels_bench.accuracy import errors, real_inputs
from kernels_bench.measure import LESS_WORK, WORKS, Inputs, Result, compare, enter, random_inputs, tuned
from kernels_bench.report import draw, errors_table, results_table, sides_table
from kernels_bench.sides import OURS, SIDES, Side

from rlvr_kernels import choose_backend

DEFAULTS = {"cpu": (2048, 256, 32_000, "float32"), "cuda": (8192, 4096, 151_936, "bfloat16")}
PEERS = ("torch", "triton", "trl", "verl", "liger-kernel", "cut-cross-entropy")


def shape_of(inputs: Inputs) -> str:
    (tokens, hidden), vocabulary = inputs.hidden.shape, len(inputs.weight)
    return f"N={tokens} D={hidden} V={vocabulary} {str(inputs.hidden.dtype).removeprefix('torch.')}"


class Report(list[str]):
    """Paragraphs of Markdown, printed as they come."""

    def say(self, paragraph: str) -> None:
        self.append(paragraph)
        print(f"{paragraph}\n", flush=True)


def bench(inputs: Inputs, sides: Sequence[Side], repetitions: int, report: Report) -> dict[str, list[Result]]:
    """Say the tables of one shape. Returns: the results to draw, by title."""
    entrants = [e for side in sides for e in tuned(enter(side, inputs), inputs)]
    report.say(sides_table(entrants))
    drawn = {}
    for work in (*WORKS, *LESS_WORK):
        chosen = entrants if work in WORKS else [e for e in entrants if e.best]
        results = compare(chosen, inputs, work, repetitions)
        report.say(f"### {work.title}")
        report.say(results_table(results, ours(inputs)))
        if work in WORKS[:2]:
            drawn[f"{work.title}, {shape_of(inputs)}"] = results
    return drawn


def ours(inputs: Inputs) -> str:
    return OURS[choose_backend(inputs.hidden, inputs.weight).name]


def header(options: argparse.Namespace) -> str:
    versions = []
    for package in PEERS:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"
    return f"# Heads side by side\n\n{machine}; {', '.join(versions)}; {options.repetitions} repetitions."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="of real logits (`make quickstart`)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    names = [side.name for side in SIDES]
    sides = "which, beside ours, of: " + ", ".join(names)
    parser.add_argument("--sides", nargs="*", default=names, choices=names, metavar="SIDE", help=sides)
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.png")
    options = parser.parse_args()
    for name, value in zip(("tokens", "hidden", "vocab", "dtype"), DEFAULTS[options.device], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    made = {"Random": random_inputs(options.tokens, options.hidden, options.vocab, dtype, options.device)}
    real = Path(options.model).is_dir()
    if real:
        made[Path(options.model).name] = real_inputs(options.model, dtype, options.device)
    sides = [side for side in SIDES if side.name in {*options.sides, *(ours(inputs) for inputs in made.values())}]
    report = Report()
    report.say(header(options))
    panels: dict[str, list[Result]] = {}
    for name, inputs in made.items():
        report.say(f"## {name}: {shape_of(inputs)}")
        panels |= bench(inputs, sides, options.repetitions, report)
    if real:
        rounded = real_inputs(options.model, torch.bfloat16, options.device)
        report.say(f"## Errors, {Path(options.model).name}: {shape_of(rounded)}")
        report.say(errors_table(errors([enter(side, rounded) for side in sides], rounded)))
    else:
        report.say(f"No real logits: {options.model} is not there; `make quickstart` makes it.")
    if options.out:
        options.out.with_suffix(".md").write_text("\n\n".join(report) + "\n")
        draw(panels, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
