"""How long a run has trained, and how long it has to: without the pauses between an end and a resumption."""

import math

import numpy as np

from rlvr.monitor.payloads.view import View

RECENT = 50  # records whose pace is that of the rest of the run


def seconds_trained(view: View) -> np.ndarray:
    """Seconds spent training until each record [count]; they never fall.

    Where the run was resumed between two records, the time between them is the later one's time/step, or the median
    of the others where it has none. A record without a time has the value of the one before.
    """
    table = view.table
    spent = np.zeros(table.count)
    known = np.flatnonzero(np.isfinite(table.time))
    if not len(known):
        return spent
    time, step = table.time[known], table.step[known]
    before = np.append(time[0] if view.started is None else view.started, time[:-1])
    passed = np.maximum(time - before, 0)
    resumed = _resumptions(view)
    last = np.searchsorted(resumed, time)
    paused = last > np.searchsorted(resumed, before)
    if paused.any():
        steps = np.maximum(np.diff(step, prepend=step[0] - 1), 1)  # of a sketch, more than one
        usual = table.column("time/step")[known]
        others = (passed / steps)[1:][~paused[1:]]
        usual = (
            np.where(np.isfinite(usual) & (usual >= 0), usual, np.median(others) if len(others) else np.nan) * steps
        )
        usual = np.where(np.isfinite(usual), usual, time - resumed[last - 1])
        passed = np.where(paused, np.minimum(passed, usual), passed)
    spent[known] = passed
    return np.cumsum(spent)


def _resumptions(view: View) -> np.ndarray:
    """Unix seconds, ascending."""
    times = [entry.get("time") for entry in view.run.get("resumed", ())]
    return np.array(sorted(t for t in times if isinstance(t, (int, float)) and math.isfinite(t)), float)


def seconds_left(view: View, spent: np.ndarray, max_steps: int | None) -> float | None:
    """Until the last step, at the pace of the RECENT ones; None for a run that does not run, or if it is not known.

    spent [count]: of `seconds_trained`.
    """
    if view.status.state != "running" or max_steps is None or len(spent) < 2:
        return None
    step = view.table.step
    begin = max(0, len(spent) - 1 - RECENT)
    steps, seconds = int(step[-1] - step[begin]), float(spent[-1] - spent[begin])
    if steps <= 0 or seconds <= 0:
        return None
    return seconds / steps * max(0, max_steps - int(step[-1]))
