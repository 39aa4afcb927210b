"""The runs below a directory: which there are, each looked at under its own lock, long ones read in the background."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError
from rlvr.monitor.history import EAGER
from rlvr.monitor.payloads.view import View
from rlvr.monitor.records import holds_run
from rlvr.monitor.watched import Watched

DEPTH = 4  # folders below the directory that are searched
SCAN_EVERY = 2.0  # seconds
HEAD_START = 1.0  # seconds before long runs are read whole, for whoever opens the page at once
PATIENCE = 0.3  # seconds that the list of runs waits for one of them that is busy
LIST_WITHIN = 0.6  # seconds
GIVE_WAY = 0.2  # seconds that reading in the background waits for answers, after each chunk

Row = dict[str, Any]

logger = logging.getLogger("rlvr.dashboard")


class Catalog:
    """runs_dir: a directory of runs, at any depth down to DEPTH, or a run itself."""

    def __init__(self, runs_dir: str | Path, eager: int = EAGER) -> None:
        """eager: see History. Raises: ConfigError if the directory is not there."""
        self.runs_dir = Path(runs_dir)
        if not self.runs_dir.is_dir():
            raise ConfigError(
                f"RUNS_DIR={str(runs_dir)!r} is no directory; give a folder of runs, or a run's output_dir"
            )
        self._eager = eager
        self._runs: dict[str, Watched] = {}
        self._last: dict[str, Row] = {}
        self._unnamed: list[dict[str, str]] = []  # problems of runs that no address can name
        self._asked: dict[str, float] = {}
        self._answering, self._counting = 0, threading.Lock()
        self._logged: set[tuple[str, str]] = set()
        self._scan_lock = threading.Lock()
        self._next_scan = 0.0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._read_on, name="rlvr-dashboard-reader", daemon=True)

    def start(self) -> None:
        """Open the runs and read the long ones, in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End that thread as soon as it has read the file at hand."""
        self._stop.set()
        self._wake.set()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Somebody waits: what is read in the background is read later."""
        with self._counting:
            self._answering += 1
        try:
            yield
        finally:
            with self._counting:
                self._answering -= 1

    def run(self, id: str) -> Watched:
        """The run with this id. Raises: KeyError if there is none."""
        self._scan()
        run = self._runs[id]
        self._asked[id] = time.monotonic()
        return run

    def rows(self, make: Callable[[View], Row], within: float = LIST_WITHIN) -> tuple[list[Row], list[dict[str, str]]]:
        """What `make` makes of every run as it is now, or as it was where it is busy, by id; and those that cannot be
        read: {"id", "error"}.

        within: seconds after which no run is opened for the first time.
        """
        self._scan()
        rows: dict[str, Row] = {}
        problems = list(self._unnamed)
        begin = time.monotonic()
        for run in sorted(self._runs.values(), key=self._order):
            if run.id not in self._last and rows and time.monotonic() - begin > within:
                break
            try:
                if run.history.lock.acquire(timeout=PATIENCE):
                    try:
                        self._last[run.id] = make(self.look(run))
                    finally:
                        run.history.lock.release()
            except Exception as error:
                self._last.pop(run.id, None)
                problems.append({"id": run.id, "error": self._problem(run, error)})
            if run.id in self._last:
                rows[run.id] = self._last[run.id]
        return [rows[id] for id in sorted(rows)], sorted(problems, key=itemgetter("id"))

    def _problem(self, run: Watched, error: Exception) -> str:
        """One line, which the log gets once, too."""
        known = isinstance(error, (ConfigError, OSError))
        said = str(error) if known else f"{run.run_dir} cannot be read: {type(error).__name__}: {error}"
        if (run.id, said) not in self._logged:
            self._logged.add((run.id, said))
            logger.warning("%s", said, exc_info=None if known else error)
        return " ".join(said.split())

    def _order(self, run: Watched) -> tuple[bool, float]:
        """Runs that are open already, then the latest first."""
        if run.id in self._last:
            return False, 0.0
        try:
            return True, -run.history.path.stat().st_mtime
        except OSError:
            return True, 0.0

    def look(self, run: Watched) -> View:
        """The run as it is now; its lock is to be held. Raises: ConfigError for a damaged file."""
        view = run.look()
        if run.history.pending:
            self._wake.set()
        return view

    # ------------------------------------------------------------------------------------------------------- finding

    def _scan(self) -> None:
        with self._scan_lock:
            begin = time.monotonic()
            if begin < self._next_scan:
                return
            found = dict(find_runs(self.runs_dir))
            self._unnamed = [_unnamed(id) for id in found if not _is_text(id)]
            found = {id: path for id, path in found.items() if _is_text(id)}
            names = Counter(id.rpartition("/")[2] for id in found)
            runs = {}
            for id, path in found.items():
                name = id.rpartition("/")[2]
                shown = name if names[name] == 1 else id
                runs[id] = self._runs.get(id) or Watched(id, shown, path, self._eager)
                runs[id].name = shown
            self._runs = runs
            self._last = {id: row for id, row in self._last.items() if id in runs}
            now = time.monotonic()
            self._next_scan = now + max(SCAN_EVERY, 5 * (now - begin))

    # ------------------------------------------------------------------------------------------------------- reading

    def _read_on(self) -> None:
        """Read what is pending, first of the runs that were asked for last."""
        with suppress(OSError):
            self._open_all()
        self._stop.wait(HEAD_START)
        while not self._stop.is_set():
            pending = [run for run in list(self._runs.values()) if run.history.pending]
            if pending:
                self._read_all(max(pending, key=lambda run: self._asked.get(run.id, 0.0)))
                continue
            self._wake.wait()
            self._wake.clear()

    def _read_all(self, run: Watched) -> None:
        try:
            run.history.read_all(self._give_way)
        except Exception as error:
            self._problem(run, error)
            run.history.pending = False  # until somebody asks again

    def _open_all(self) -> None:
        self._scan()
        for run in sorted(self._runs.values(), key=self._order):
            with run.history.lock, suppress(Exception):  # which the list of runs will tell
                self.look(run)
            self._give_way()

    def _give_way(self) -> None:
        until = time.monotonic() + GIVE_WAY
        while self._answering and time.monotonic() < until:
            time.sleep(0.005)


def _is_text(id: str) -> bool:
    """Whether its bytes are UTF-8: those that are not are halves of surrogate pairs in a path."""
    return not any("\ud800" <= letter <= "\udfff" for letter in id)


def _unnamed(id: str) -> dict[str, str]:
    shown = id.encode("utf-8", "replace").decode("utf-8")
    return {"id": shown, "error": f"the folder name {shown!r} is not UTF-8, so no address can name it; rename it"}


def find_runs(runs_dir: Path) -> Iterator[tuple[str, Path]]:
    """Id and path of each run, ordered by id: the path below `runs_dir`, or that one's name if it is a run itself.

    Folders inside a run, hidden ones, and those that were seen on another way (links) are not searched.
    """
    if holds_run(runs_dir):
        yield runs_dir.resolve().name, runs_dir
        return
    seen = set()
    folders = [(runs_dir, 0)]
    found = []
    while folders:
        folder, depth = folders.pop()
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            if depth and holds_run(folder):
                found.append((folder.relative_to(runs_dir).as_posix(), folder))
            elif depth < DEPTH:
                below = sorted((entry.name for entry in os.scandir(folder) if entry.is_dir()), reverse=True)
                folders += [(folder / name, depth + 1) for name in below if not name.startswith(".")]
        except OSError:  # not readable, or gone
            continue
    yield from sorted(found)
