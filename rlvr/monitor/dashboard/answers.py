"""What the dashboard answers: the parameters of an address in, JSON out."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlvr.monitor.dashboard.catalog import Catalog
from rlvr.monitor.payloads.curves import POINTS, agreement_payload, law_payload, series_payload
from rlvr.monitor.payloads.details import histograms_payload, positions_payload, router_payload
from rlvr.monitor.payloads.numbers import to_json
from rlvr.monitor.payloads.prompts import prompts_payload
from rlvr.monitor.payloads.runs import metrics_payload, run_payload, run_row, runs_payload
from rlvr.monitor.payloads.tokens import forks_payload, steps_payload, tokens_payload
from rlvr.monitor.payloads.view import View
from rlvr.monitor.watched import Watched

MAX_POINTS = 20_000

Parameters = Mapping[str, str]


class NotThere(LookupError):
    """Nothing has this name; the message is a sentence for a person."""


class BadQuestion(ValueError):
    """A parameter is not what it has to be; the message is a sentence for a person."""


def answer(catalog: Catalog, name: str, parameters: Parameters) -> bytes:
    """The payload of this name, as JSON.

    Raises: NotThere for an unknown name, run or step; BadQuestion; ConfigError for a run with a damaged file.
    """
    if name == "metrics":
        return to_json(metrics_payload())
    if name == "runs":
        return to_json(runs_payload(*catalog.rows(run_row), time.time()))
    if name not in OF_RUN:
        raise NotThere(f"there is no api/{name}; there are metrics, runs, {', '.join(OF_RUN)}")
    if "run" not in parameters:
        raise BadQuestion(f"api/{name} needs run=ID, one of the ids of api/runs")
    try:
        run = catalog.run(parameters["run"])
    except KeyError as error:
        raise NotThere(f"there is no run {parameters['run']!r} here") from error
    with run.history.lock:  # also while its numbers are written out: they are those of the run itself
        return to_json(OF_RUN[name](run, catalog.look(run), parameters))


def _series(run: Watched, view: View, parameters: Parameters) -> Any:
    names = parameters["names"].split(",") if "names" in parameters else None
    points = _number(parameters, "points", POINTS, 1, MAX_POINTS)
    first, last = (
        _number(parameters, name, end, -math.inf, math.inf) for name, end in (("from", -math.inf), ("to", math.inf))
    )
    return series_payload(view, names, int(points), first, last, parameters.get("extremes") != "0")


def _tokens(run: Watched, view: View, parameters: Parameters) -> Any:
    if "step" not in parameters:
        return steps_payload(view.token_steps, len(view.token_steps))
    return tokens_payload(view.run_dir, _step(view, parameters))


def _forks(run: Watched, view: View, parameters: Parameters) -> Any:
    return forks_payload(view.run_dir, _step(view, parameters))


def _step(view: View, parameters: Parameters) -> int:
    step = int(_number(parameters, "step", math.nan, 0, 10**12))
    if step not in view.token_steps:
        raise NotThere(f"step {step} of {view.name} has no token-level records")
    return step


def _number(parameters: Parameters, name: str, default: float, least: float, most: float) -> float:
    try:
        value = float(parameters[name]) if name in parameters else default
    except ValueError:
        value = math.nan
    if not least <= value <= most or (name in parameters and math.isinf(value)):
        limits = f" from {least:g} to {most:g}" if math.isfinite(least) else ", and finite"
        raise BadQuestion(f"{name}={parameters.get(name)!r}: must be a number{limits}")
    return value


OF_RUN: dict[str, Callable[[Watched, View, Parameters], Any]] = {
    "run": lambda run, view, _: run_payload(view),
    "series": _series,
    "law": lambda run, view, _: law_payload(view),
    "agreement": lambda run, view, _: agreement_payload(view),
    "histograms": lambda run, view, _: histograms_payload(view),
    "positions": lambda run, view, _: positions_payload(view),
    "router": lambda run, view, _: router_payload(view),
    "tokens": _tokens,
    "forks": _forks,
    "prompts": lambda run, view, _: prompts_payload(run.prompts(), view.table),
}
