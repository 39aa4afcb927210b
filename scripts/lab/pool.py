"""Makes the runs of a plan: a process per core, a progress bar with the time left, and what failed."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from tqdm import tqdm

from .base import BaseSettings, base_model
from .plan import BASE, BASES, bases_needed, seconds
from .runs import RUNS, LabRun, is_made, perform

LOGS = RUNS.parent / "logs"
TICK = 1.0 if sys.stderr.isatty() else 60.0  # seconds between two looks of the progress bar at the clock
AT_ONCE = 20  # runs of a worker, after which a fresh one takes its place

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
        _do(work[: len(bases)], jobs, bar, failed)  # that everything else waits for
        _do(work[len(bases) :], jobs, bar, failed)
    return failed


def _do(work: Sequence[Work], jobs: int, bar: tqdm, failed: dict[str, str]) -> None:
    """One worker per thread, replaced after AT_ONCE pieces of work: an old one keeps a gigabyte."""
    todo: SimpleQueue[Work] = SimpleQueue()
    for what in work:
        todo.put(what)
    done: SimpleQueue[tuple[str, float, BaseException | None]] = SimpleQueue()
    for _ in range(jobs):
        Thread(target=_take, args=(todo, done), daemon=True).start()
    try:
        left = len(work)
        while left:
            try:
                name, worth, error = done.get(timeout=TICK)
            except Empty:
                bar.refresh()
                continue
            left -= 1
            if error is not None:
                failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                tqdm.write(f"{name} failed, see {LOGS}: {failed[name]}", file=sys.stderr)
            bar.set_postfix_str(name, refresh=False)
            bar.update(round(worth))
    except BaseException:  # interrupted: what is half done is made again anyway
        while not todo.empty():
            todo.get()
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def _take(todo: "SimpleQueue[Work]", done: "SimpleQueue[tuple[str, float, BaseException | None]]") -> None:
    """Does what is to be done by one worker at a time. An executor could replace its workers by itself, but then
    Python 3.11's may wait for ever (cpython issue 115634).
    """
    while not todo.empty():
        # `spawn`, since torch's threads do not survive a fork.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in range(AT_ONCE):
                try:
                    name, worth, make, what = todo.get_nowait()
                except Empty:
                    return
                error = pool.submit(make, *what).exception()
                done.put((name, worth, error))
                if isinstance(error, BrokenExecutor):
                    break  # the worker was killed, such as for memory: the next takes a fresh one


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
