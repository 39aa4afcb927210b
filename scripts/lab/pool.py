"""Makes the runs of a plan: a process per core, a progress bar with the time left, and what failed."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .base import BaseSettings, base_model
from .plan import BASE, BASES, bases_needed, seconds
from .runs import RUNS, LabRun, is_made, perform

LOGS = RUNS.parent / "logs"
AT_ONCE = 10  # runs of a worker, after which a fresh one takes its place

Work = tuple[str, float, Callable[..., Path], tuple[Any, ...]]  # name, seconds, what makes it of what


def conduct(runs: Sequence[LabRun], jobs: int) -> dict[str, str]:
    """Make the bases and runs that are missing; returns what failed, by name, with the reason in a line.

    Output of a run goes to a file of LOGS. Interrupted, what is finished stays and the rest is made by the next call.
    Raises: ConfigError if a run that is there has other settings than the plan's.
    """
    missing = [run for run in runs if not is_made(run, BASES[run.numbers].path)]
    bases = [settings for settings in bases_needed(missing) if not settings.path.exists()]
    total = sum(map(seconds, runs)) + len(bases) * BASE
    done = sum(map(seconds, runs)) - sum(map(seconds, missing))
    failed: dict[str, str] = {}
    work: list[Work] = [(f"base-{one.path.name}", BASE, _make_base, (one,)) for one in bases]
    work += [(_name(run), seconds(run), _make, (run, BASES[run.numbers].path)) for run in missing]
    bar = tqdm(
        total=round(total),
        initial=round(done),
        smoothing=0,  # the time left by the mean speed so far: runs end one by one, far apart
        unit="s",
        desc="lab",
        bar_format="{desc} {percentage:3.0f}% |{bar:10}| {elapsed} gone, {remaining} left {postfix}",
    )
    with bar:
        rest = work[len(bases) :]
        batches = [work[: len(bases)], *(rest[at : at + jobs * AT_ONCE] for at in range(0, len(rest), jobs * AT_ONCE))]
        for batch in batches:
            _do(batch, jobs, bar, failed)
    return failed


def _do(work: Sequence[Work], jobs: int, bar: tqdm, failed: dict[str, str]) -> None:
    """By fresh workers: an old one keeps a gigabyte. Executors can replace them, but then Python 3.11's may wait for
    ever (cpython issue 115634).
    """
    # `spawn`, since torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = {pool.submit(make, *what): (name, worth) for name, worth, make, what in work}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                name, worth = waiting.pop(future)
                error = future.exception()
                if error is not None:
                    failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    tqdm.write(f"{name} failed, see {LOGS}: {failed[name]}", file=sys.stderr)
                bar.set_postfix_str(name, refresh=False)
                bar.update(round(worth))
    except BaseException:  # interrupted: what is half done is made again anyway
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _name(run: LabRun) -> str:
    return f"{run.part}-{run.name}-seed{run.seed}"


def _make_base(settings: BaseSettings) -> Path:
    _quiet(f"base-{settings.path.name}")
    return base_model(settings)


def _make(run: LabRun, base: Path) -> Path:
    _quiet(_name(run))
    if not base.exists():
        raise FileNotFoundError(f"{base}: the base model was not made")
    return perform(run, base)


def _quiet(name: str) -> None:
    """Both streams of this worker into a file; what libraries write themselves too."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = os.open(LOGS / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
