"""A run as one HTML file: the page of `rlvr dashboard` with its numbers inside, which opens anywhere, offline."""

import sys
import time
from pathlib import Path
from typing import Any

from rlvr.errors import ConfigError, RunError
from rlvr.monitor import files
from rlvr.monitor.dashboard.page import report_page
from rlvr.monitor.downsample import spread
from rlvr.monitor.payloads.curves import agreement_payload, law_payload, series_payload
from rlvr.monitor.payloads.details import histograms_payload, positions_payload, router_payload
from rlvr.monitor.payloads.numbers import to_json
from rlvr.monitor.payloads.prompts import prompts_payload
from rlvr.monitor.payloads.runs import metrics_payload, run_payload, run_row, runs_payload
from rlvr.monitor.payloads.tokens import SHORT, forks_payload, steps_payload, tokens_payload
from rlvr.monitor.payloads.view import View
from rlvr.monitor.records import RUN, STEPS, holds_run
from rlvr.monitor.watched import Watched

SAMPLES = 5  # steps whose sampled completions are part of a report
SAMPLE_BYTES = 1_500_000  # of all of them
SIZES = ((8, 1000), (8, 500), (4, 500), (4, 250), (2, 250), (2, 100))  # completions of a step, tokens of each
PROMPT_LENGTH = 2000  # characters


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page, by default RUN_DIR/report.html. Returns its path.

    Raises: ConfigError if the directory holds no run, or a damaged one, or if the page cannot be written.
    """
    if not holds_run(run_dir):
        raise ConfigError(f"RUN_DIR={str(run_dir)!r} holds no run (neither {RUN} nor {STEPS}); give its output_dir")
    page = Path(output) if output is not None else Path(run_dir) / "report.html"
    content = report_page(report_data(run_dir)).encode("utf-8")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        files.replace(page, content)
    except (OSError, RunError) as error:
        raise ConfigError(
            f"{page} cannot be written ({error.__cause__ or error}); name another file with -o"
        ) from error
    return page


def report_data(run_dir: str | Path) -> dict[str, Any]:
    """What a dashboard would answer of this run, by what it would be asked."""
    name = Path(run_dir).resolve().name
    run = Watched(name, name, run_dir, eager=sys.maxsize)
    with run.history.lock:
        view = run.look()
        return {
            "metrics": metrics_payload(),
            "runs": runs_payload([run_row(view)], [], time.time()),
            f"run?run={name}": run_payload(view),
            f"series?run={name}": series_payload(view),
            f"law?run={name}": law_payload(view),
            f"agreement?run={name}": agreement_payload(view),
            f"histograms?run={name}": histograms_payload(view),
            f"positions?run={name}": positions_payload(view),
            f"router?run={name}": router_payload(view),
            f"prompts?run={name}": prompts_payload(run.prompts(), view.table),
            **_samples(view),
        }


def _samples(view: View) -> dict[str, Any]:
    """Completions of a few steps over the training, as many and as long as SAMPLE_BYTES allow."""
    steps = [view.token_steps[at] for at in spread(len(view.token_steps), SAMPLES)]
    samples: dict[str, Any] = {}
    for rows, length in SIZES:
        samples = {
            f"tokens?run={view.id}&step={step}": tokens_payload(view.run_dir, step, length, rows, PROMPT_LENGTH, SHORT)
            for step in steps
        }
        if len(to_json(samples)) <= SAMPLE_BYTES:
            break
    forks = {f"forks?run={view.id}&step={step}": forks_payload(view.run_dir, step) for step in steps}
    return {f"tokens?run={view.id}": steps_payload(steps, len(view.token_steps)), **samples, **forks}
