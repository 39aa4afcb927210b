"""A run in a terminal, as it goes: read from its directory, drawn anew as the records grow."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlvr.errors import ConfigError
from rlvr.monitor.instruments import thermostat_of
from rlvr.monitor.metrics import METRICS, TOUCHED
from rlvr.monitor.records import RUN, STEPS, alerts_of, holds_run, read_run, series
from rlvr.monitor.status import Status, run_status
from rlvr.monitor.summary import PHASES, count_alerts, format_alerts, format_seconds, phases
from rlvr.monitor.tail import Tail, parse_json

RECENT = 20  # optimizer steps over which times and shares are taken
LABEL, NUMBERS = 13, 30  # columns
BARS = "▁▂▃▄▅▆▇█"
STYLES = {"running": "green", "stalled": "yellow", "dead": "red", "finished": "blue", "failed": "red"}
ENDED = ("finished", "failed", "interrupted")
LAST_ALERTS = 4
NEEDED = frozenset(
    {"entropy/mean", "reward/mean", "law/holds", "law/ceiling", "law/ceiling_low", "law/ceiling_high"}
    | {"thermostat/value", "thermostat/position", "thermostat/outside", "mismatch/kl", "mismatch/abs_logp_mean"}
    | {"time/step", "policy/tokens", "rollout/tokens", *TOUCHED, *(f"time/{phase}" for phase in PHASES)}
    | {name for name in METRICS if name.startswith("reward/pass_at_")}
)


# ---------------------------------------------------------------------------------------------------------- one frame


def frame(
    name: str, run: Mapping[str, Any], steps: Sequence[dict[str, Any]], status: Status, now: float, width: int = 80
) -> RenderableType:
    """What is drawn of a run.   name: of its directory.   steps: as read.   now: Unix time.   width: columns."""
    head = Text.assemble((plain(name), "bold"), "  ", (status.state, STYLES.get(status.state, "magenta")))
    if status.detail:
        head.append(f"  {plain(status.detail)}", "red" if status.state in ("failed", "dead") else "")
    if not steps:
        return Group(head, Text("waiting for the first record", "dim"))
    table = Table.grid(padding=(0, 1), pad_edge=False)
    table.add_column(width=LABEL, style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in _rows(run, steps, width - LABEL - 1):
        table.add_row(label, line)
    age = format_seconds(max(0.0, now - steps[-1]["time"]))
    return Group(head, *_progress(run, steps, status, width), Text(), table, Text(f"last record {age} ago", "dim"))


def plain(text: Any) -> str:
    """Text that does nothing to a terminal: in one line, and without what is not printed."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))


def sparkline(values: Sequence[float], width: int) -> str:
    """Means of neighbors as bars between their lowest and highest; "" without a finite value."""
    finite = [x for x in values if math.isfinite(x)]
    columns = min(len(finite), max(1, width))
    cuts = [len(finite) * i // columns for i in range(columns + 1)] if columns else []
    means = [fmean(finite[a:b]) for a, b in pairwise(cuts)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[min(7, int(8 * (x - low) / span)) if span else 3] for x in means)


def _progress(
    run: Mapping[str, Any], steps: Sequence[dict[str, Any]], status: Status, width: int
) -> list[RenderableType]:
    step, most = steps[-1]["step"], _setting(run, "max_steps")
    told = [f"step {step}", f"{steps[-1]['tokens']:,} tokens"]
    seconds = series(steps[-RECENT:], "time/step")[1]
    if seconds:
        told.append(f"{format_seconds(fmean(seconds))} a step")
    if not isinstance(most, int) or most < 1:
        return [Text(" · ".join(told))]
    told[0] += f" of {most}"
    each = _seconds_between(run, steps) or (fmean(seconds) if seconds else None)
    if each and step < most and status.state == "running":
        told.append(f"{format_seconds((most - step) * each)} left")
    return [Text(" · ".join(told)), ProgressBar(total=most, completed=min(step, most), width=width)]


def _seconds_between(run: Mapping[str, Any], steps: Sequence[dict[str, Any]]) -> float | None:
    """Seconds from one record to the next, evaluations and checkpoints included, since the run was resumed last."""
    resumed = max((entry.get("time", 0) for entry in run.get("resumed", ())), default=0)
    times = [record["time"] for record in steps[-RECENT:] if record["time"] >= resumed]
    return max(0.0, times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def _rows(run: Mapping[str, Any], steps: Sequence[dict[str, Any]], width: int) -> list[tuple[str, Text]]:
    recent = steps[-RECENT:]
    last = {name: value for record in recent for name, value in record["metrics"].items() if math.isfinite(value)}
    rows = [
        ("entropy", _with_bars(_entropy(run, last), series(steps, "entropy/mean")[1], width)),
        ("reward", _with_bars(_number(last, "reward/mean"), series(steps, "reward/mean")[1], width)),
        ("pass rate", Text(_pass_rates(last))),
        ("tokens/s", Text(_rates(recent))),
        ("time", Text(_shares(recent))),
        ("law", Text(_law(steps))),
        ("thermostat", Text(_lever(run, last))),
        ("touched", Text(_touched(recent))),
        ("mismatch", Text(_mismatch(last))),
    ]
    rows = [(label, line) for label, line in rows if line.plain]
    if counts := count_alerts(steps):
        rows.append(("alerts", Text(format_alerts(counts), "yellow")))
    told = [(record["step"], alert) for record in steps for alert in alerts_of(record)]
    return rows + [(f"  step {step}", Text(plain(alert.message))) for step, alert in told[-LAST_ALERTS:]]


def _with_bars(text: Text, values: Sequence[float], width: int) -> Text:
    room = width - max(NUMBERS, text.cell_len + 2)
    if text.plain and room > 0:
        text.append(" " * (width - room - text.cell_len))
        text.append(sparkline(values, room), "cyan")
    return text


def _number(last: Mapping[str, float], name: str) -> Text:
    return Text(f"{last[name]:.3f}" if name in last else "")


def _entropy(run: Mapping[str, Any], last: Mapping[str, float]) -> Text:
    text, band = _number(last, "entropy/mean"), thermostat_of(run)
    if text.plain:
        text.append(" nats")
    if text.plain and band is not None:
        inside = band.low <= last["entropy/mean"] <= band.high
        text.stylize("green" if inside else "yellow")
        text.append(f", band {band.low:g} to {band.high:g}")
    return text


def _pass_rates(last: Mapping[str, float]) -> str:
    prefix = "reward/pass_at_"
    rates = sorted((int(name.removeprefix(prefix)), x) for name, x in last.items() if name.startswith(prefix))
    shown = rates[:1] + rates[1:][-1:]
    return ", ".join(f"pass@{k} {rate:.2f}" for k, rate in shown)


def _rates(recent: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{p.name} {p.tokens_per_s:,.0f}" for p in phases(recent) if p.tokens_per_s)


def _shares(recent: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{p.name} {100 * p.share:.0f} %" for p in phases(recent) if p.share >= 0.005)


def _law(steps: Sequence[dict[str, Any]]) -> str:
    fits = [record["metrics"] for record in steps[-RECENT:] if "law/holds" in record["metrics"]]
    if not fits or fits[-1]["law/holds"] == 0:
        return "not yet"
    fit = fits[-1]
    if fit["law/holds"] < 0 or "law/ceiling" not in fit:
        return "does not hold here"
    ends = [fit[name] for name in ("law/ceiling_low", "law/ceiling_high") if name in fit]
    interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if len(ends) == 2 else ""
    return f"predicted ceiling of the reward {fit['law/ceiling']:.3f}{interval}"


def _lever(run: Mapping[str, Any], last: Mapping[str, float]) -> str:
    if not {"thermostat/value", "thermostat/position", "thermostat/outside"} <= last.keys():
        return ""
    settings, outside = thermostat_of(run), int(last["thermostat/outside"])
    lever = plain(settings.lever) if settings is not None else "lever"
    where = f"{abs(outside)} steps {'below' if outside < 0 else 'above'} the band" if outside else "inside the band"
    position = f"{100 * last['thermostat/position']:.0f} % of the way to most entropy"
    return f"{lever} {last['thermostat/value']:.4g}, {position}; {where}"


def _touched(recent: Sequence[dict[str, Any]]) -> str:
    found = {name: series(recent, name)[1] for name in TOUCHED}
    means = {name: fmean(values) for name, values in found.items() if values}
    most = sorted((name for name, x in means.items() if x), key=lambda name: -means[name])[:4]
    return ", ".join(f"{name} {100 * means[name]:.2g} %" for name in most) or ("nothing" if means else "")


def _mismatch(last: Mapping[str, float]) -> str:
    if "mismatch/kl" not in last:
        return ""
    apart = last.get("mismatch/abs_logp_mean")
    mean = "" if apart is None else f", mean |log-prob difference| {apart:.2g}"
    return f"KL {last['mismatch/kl']:.2g} nats{mean}"


def _setting(run: Mapping[str, Any], name: str) -> Any:
    """Of the run's last resumption; each tells what differs from its first configuration."""
    value = run.get("config", {}).get(name)
    for resumption in run.get("resumed", ())[-1:]:
        value = resumption.get("changed_config", {}).get(name, value)
    return value


# ----------------------------------------------------------------------------------------------------------- watching


class Followed:
    """The records of a run directory, each read once.   Raises: ConfigError if it holds no run."""

    def __init__(self, run_dir: str | Path) -> None:
        if not holds_run(run_dir):
            raise ConfigError(
                f"RUN_DIR={str(run_dir)!r} holds no run (neither {RUN} nor {STEPS}); give its output_dir"
            )
        self.run_dir = Path(run_dir)
        self.run: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self._tail = Tail(self.run_dir / STEPS, _needed)

    def read(self) -> bool:
        """Take in what is new; whether anything is. Raises: ConfigError for a damaged file."""
        before = (self.run, len(self.steps), self._tail.generation)
        self.run = read_run(self.run_dir)  # first: a run that has ended has all its records
        self._tail.look()
        if self._tail.generation != before[2]:
            self.steps = []
        for records in self._tail.read():
            self.steps += records
        return before != (self.run, len(self.steps), self._tail.generation)

    @property
    def ended(self) -> bool:
        return self.run.get("status") in ENDED

    def frame(self, width: int) -> RenderableType:
        """As it is now."""
        now, last = time.time(), self.steps[-1]["time"] if self.steps else None
        seconds = series(self.steps[-1000:], "time/step")[1]
        status = run_status(self.run_dir, self.run, last, median(seconds) if seconds else None, now)
        return frame(str(self.run_dir), self.run, self.steps, status, now, width)


def _needed(line: bytes) -> dict[str, Any]:
    """The part of a record that a frame shows."""
    record = parse_json(line)
    values = {name: float(x) for name, x in record["metrics"].items() if name in NEEDED}
    kept = {name: record[name] for name in ("step", "time", "tokens")}
    return {**kept, "metrics": values, "alerts": record.get("alerts")}


def watch(run_dir: str | Path, interval: float = 2.0, once: bool = False) -> None:
    """Draw the run every `interval` seconds until it has ended, or until Ctrl-C; the last frame stays.

    Where there is no terminal to draw in, every frame that has something new is printed below the one before.
    Raises: ConfigError if the directory holds no run, or a damaged one.
    """
    if not 0.05 <= interval < math.inf:
        raise ConfigError(f"--interval={interval}: must be a number of seconds, at least 0.05")
    followed = Followed(run_dir)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # bars, and names that are no text
    console = Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and not once
    try:
        followed.read()
        if live:
            _draw(followed, console, interval)
        else:
            _print(followed, console, interval, once)
    except KeyboardInterrupt:
        pass
    if live:
        console.print(followed.frame(console.width))


def _draw(followed: Followed, console: Console, interval: float) -> None:
    if followed.ended:
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not followed.ended:
            live.update(followed.frame(console.width), refresh=True)
            time.sleep(interval)
            followed.read()


def _print(followed: Followed, console: Console, interval: float, once: bool) -> None:
    console.print(followed.frame(console.width))
    while not (once or followed.ended):
        time.sleep(interval)
        if followed.read():
            console.print(Text(), followed.frame(console.width), sep="\n")
