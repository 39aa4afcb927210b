"""The entropy laboratory: does entropy collapse, what holds it, and what is that worth? On CPUs, with rlvr's trainers.

    make lab                                    the whole suite, resumable, about an hour on two cores
    make lab ARGS=--quick                       fewer methods, seeds and rollouts: planned for three minutes
    make lab ARGS=--page                        the page again, from the records alone
    make lab ARGS="--read DIR"                  the page of other runs, DIR/METHOD-seedN (docs/lab.md)
    make lab ARGS="--methods grpo ppo ppo-no-groups --seeds 0 1 2"     other comparisons

Runs are kept in runs/lab/runs; one that was interrupted starts again. The page is runs/lab/report.html, its numbers
are runs/lab/records.json; those of --quick are in runs/lab/quick. Rollouts are those of transformers: vLLM's attention
for CPUs does not support this model's heads of 24.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

# One thread that sleeps while it waits: results repeat exactly, and several processes do not fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lab.methods import ALL

from rlvr.errors import ConfigError

if TYPE_CHECKING:
    from lab.plan import Size
    from lab.records import Record
    from lab.runs import LabRun

OUT = Path("runs/lab")
SETTING = (
    "Countdown with three numbers, a Llama of 342,816 parameters, learning rate 1e-4. The base model was selected for "
    "what it shows: bases with less supervised training gave RL little to sharpen."
)


def main() -> None:
    arguments = _parser().parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    from lab.page import write_page
    from lab.plan import FULL, QUICK, plan
    from lab.pool import conduct
    from lab.records import Kept, load_kept, read_others, read_record, write_kept
    from lab.runs import finished

    size, out = (QUICK, OUT / "quick") if arguments.quick else (FULL, OUT)
    if arguments.methods:
        names = tuple(dict.fromkeys(("grpo", *arguments.methods)))
        size, out = replace(size, methods=names, knob_methods=(), probe_rollouts=0, length_rollouts=0), OUT / "chosen"
    if arguments.seeds:
        size = replace(size, seeds=tuple(arguments.seeds))
    runs = plan(size)
    kept = out / "records.json"
    if arguments.page:
        if not kept.exists():
            raise ConfigError(f"{kept} is not there: make the runs first, without --page")
        print(write_page(load_kept(kept), out))
        return
    if arguments.read:
        records = read_others(arguments.read)
        if not records:
            raise ConfigError(f"--read {arguments.read}: holds no finished run in a directory METHOD-seedN")
        print(write_page(Kept(records, {"runs": f"{len(records)} of {arguments.read}"}), arguments.read))
        return
    failed = conduct(runs, arguments.jobs)
    records = [read_record(run) for run in runs if finished(run)]
    missing = [f"{name}: {why}" for name, why in failed.items()]
    write_kept(Kept(records, _about(size, runs, records), missing), kept)
    print(write_page(load_kept(kept), out))
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed; the page says which, call again to repeat them")


def _about(size: "Size", runs: "Sequence[LabRun]", records: "Sequence[Record]") -> dict[str, str]:
    """Facts of the suite, for its page."""
    from lab.countdown import distinct_problems
    from lab.plan import seconds
    from lab.runs import GROUP, HELD_OUT_PROMPTS, PROMPTS, UPDATES, held_out_prompts

    turned = f"{len(size.knob_seeds)} seeds, {size.knob_rollouts} rollouts or as many as the table says"
    return {
        "setting": SETTING,
        "runs": f"{len(records)} of {len(runs)}; seeds {', '.join(map(str, size.seeds))}",
        "a run": f"{size.rollouts} rollouts of {PROMPTS} prompts x {GROUP} completions, {UPDATES} updates each",
        "held out": f"{HELD_OUT_PROMPTS} prompts x {size.samples} samples, the same prompts for all runs; drawn with "
        f"repetition, {distinct_problems(held_out_prompts())} different problems",
        "knobs": turned if size.knob_methods else "not turned",
        "planned": f"{sum(map(seconds, runs)) / 60:.0f} minutes of one idle core",
        "took": f"{sum(sum(one.seconds) for one in records) / 60:.0f} minutes in the trainers' steps, of one core",
        "command": "python " + shlex.join(["scripts/entropy_lab.py", *sys.argv[1:]]),
    }


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four methods, three seeds, 40 rollouts")
    parser.add_argument("--page", action="store_true", help="write the page from the records that are there")
    parser.add_argument("--read", type=Path, metavar="DIR", help="write the page of the runs in DIR/METHOD-seedN")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes at once; default: one per core")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are kept, call again to go on")
