"""The records of a run and what can be read from them; needs no torch."""

from rlvr.monitor.metrics import METRICS, Metric, metric
from rlvr.monitor.recorder import Recorder, check_run_dir
from rlvr.monitor.records import read_evals, read_run, read_steps, read_tokens, token_steps
from rlvr.monitor.report import write_report
from rlvr.monitor.summary import Summary, format_summary, summarize

__all__ = [
    "METRICS",
    "Metric",
    "Recorder",
    "Summary",
    "check_run_dir",
    "format_summary",
    "metric",
    "read_evals",
    "read_run",
    "read_steps",
    "read_tokens",
    "summarize",
    "token_steps",
    "write_report",
]
