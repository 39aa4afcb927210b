"""Which runs there are, and what each of them is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlvr import __version__
from rlvr.alarm import EntropyAlarm
from rlvr.monitor.histograms import HISTOGRAMS
from rlvr.monitor.instruments import thermostat_of
from rlvr.monitor.metrics import EFFECT, METRICS, Metric
from rlvr.monitor.payloads.clock import seconds_left, seconds_trained
from rlvr.monitor.payloads.numbers import number
from rlvr.monitor.payloads.view import View, control_names, last_time, parsed, settings

# Areas of METRICS that are no control's: a control has an effect on top of its own metrics.
OTHER_AREAS = frozenset(
    (
        *("advantage", "clip", "covariance", "critic", "dynamics", "entropy", "heldout", "law", "mismatch", "optim"),
        *("policy", "reward", "rollout", "router", "thermostat", "time"),
    )
)


def metrics_payload() -> dict[str, Any]:
    """Every metric with its unit and meaning, and the bins of every histogram."""
    controls = dict.fromkeys(name.partition("/")[0] for name in METRICS)
    effects = {f"{area}/effect": EFFECT for area in controls if area not in OTHER_AREAS}
    return {
        "metrics": {name: _explained(entry) for name, entry in (METRICS | effects).items()},
        "histograms": {
            name: {"unit": one.unit, "meaning": one.meaning, "edges": list(one.edges)}
            for name, one in HISTOGRAMS.items()
        },
        "version": __version__,
    }


def _explained(entry: Metric) -> dict[str, Any]:
    return {"unit": entry.unit, "meaning": entry.meaning, "normal": entry.normal, "touches": entry.touches}


def runs_payload(
    rows: Iterable[Mapping[str, Any]], problems: Sequence[Mapping[str, str]], now: float
) -> dict[str, Any]:
    """rows: of `run_row`.   problems: {"id", "error"} of runs that cannot be read.   now: Unix seconds."""
    return {"runs": list(rows), "problems": list(problems), "now": now}


def run_row(view: View) -> dict[str, Any]:
    """How a run stands, in a line of the list of runs."""
    config, table = settings(view.run), view.table
    most = config.get("max_steps")
    most = most if isinstance(most, int) and most > 0 else None
    spent = seconds_trained(view)
    left = seconds_left(view, spent, most)
    updated = last_time(table, view.evals) or view.run.get("finished") or view.started
    return {
        **_head(view),
        "updated": updated,
        "steps": view.num_steps,
        "last_step": int(table.step[-1]) if table.count else 0,
        "max_steps": most,
        "spent": round(float(spent[-1]), 3) if len(spent) else 0.0,
        "left": None if left is None else round(left, 3),
        "tokens": int(table.tokens[-1]) if table.count else 0,
        "entropy": number(table.last("entropy/mean")),
        "reward": number(table.last("reward/mean")),
        "alerts": len(table.alerts),
        "model": config.get("model") or config.get("model_name_or_path"),
        "controls": control_names(config),
        "version": view.version,
        "read": view.read,
    }


def _head(view: View) -> dict[str, Any]:
    return {
        "id": view.id,
        "name": view.name,
        "status": view.status.state,
        "detail": view.status.detail,
        "started": view.started,
    }


def run_payload(view: View) -> dict[str, Any]:
    """All that is known of a run beside its numbers over the training.

    config: of its start.   settings: the same with what resumptions changed.
    """
    run, table = view.run, view.table
    return {
        **_head(view),
        "finished": run.get("finished") if view.status.state != "running" else None,
        "error": run.get("error"),
        "commit": run.get("commit"),
        "versions": run.get("versions", {}),
        "config": run.get("config", {}),
        "settings": settings(run),
        "resumed": run.get("resumed", []),
        "metrics": sorted(table.names, key=_place),
        "alerts": [
            {"step": one.step, "time": one.time, "kind": one.alert.kind, "message": one.alert.message}
            for one in table.alerts
        ],
        "evals": list(view.evals),
        "band": _band(run),
        "alarm": _alarm(settings(run)),
        "not_finite": table.not_finite,
    }


_PLACES = {name: place for place, name in enumerate(METRICS)}


def _place(name: str) -> tuple[int, str]:
    return _PLACES.get(name, len(_PLACES)), name


def _band(run: Mapping[str, Any]) -> dict[str, Any] | None:
    found = thermostat_of(run)
    if found is None:
        return None
    return {name: getattr(found, name) for name in ("low", "high", "lever", "lowest", "highest")}


def _alarm(config: Mapping[str, Any]) -> dict[str, Any]:
    spec = parsed(config.get("entropy_alarm"))
    try:
        alarm = EntropyAlarm(**spec) if isinstance(spec, Mapping) else EntropyAlarm()
    except (TypeError, ValueError):
        alarm = EntropyAlarm()
    return {"low": alarm.low, "high": alarm.high}
