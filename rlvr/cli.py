"""The `rlvr` command: choose a checkpoint, serve rollouts; look at a run without a GPU, a network or an account."""

import argparse
import os
import sys
from collections.abc import Sequence

from rlvr import __version__
from rlvr.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 0, or 2 after one line on stderr for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"rlvr: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `rlvr metrics | head`: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr", description=__doc__)
    parser.add_argument("--version", action="version", version=f"rlvr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="write a run as one self-contained HTML page")
    report.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of the run")
    report.add_argument("-o", "--output", metavar="FILE", help="where to write it (default: RUN_DIR/report.html)")
    report.set_defaults(run=_report)

    summary = commands.add_parser("summary", help="print what a run did: reward, entropy, controls, time")
    summary.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of the run")
    summary.set_defaults(run=_summary)

    watch = commands.add_parser("watch", help="follow a run in the terminal until it has ended, or Ctrl-C")
    watch.add_argument("run_dir", metavar="RUN_DIR", help="the output_dir of the run")
    watch.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between looks (%(default)s)")
    watch.add_argument("--once", action="store_true", help="print how it stands now, and exit")
    watch.set_defaults(run=_watch)

    dashboard = commands.add_parser("dashboard", help="show the plots of all runs in a browser, while they train")
    dashboard.add_argument(
        "runs_dir", metavar="RUNS_DIR", help="a folder with the output_dirs of runs, or one of them"
    )
    dashboard.add_argument("--host", default="127.0.0.1", help="who can reach it can read completions (%(default)s)")
    dashboard.add_argument("--port", type=int, default=7860, help="0 takes a free one (%(default)s)")
    dashboard.set_defaults(run=_dashboard)

    metrics = commands.add_parser("metrics", help="print every metric with its unit and meaning")
    metrics.set_defaults(run=_metrics)

    serve = commands.add_parser("serve", help="start a vLLM server on the CPU for `vllm_mode: server`")
    serve.add_argument("--model", required=True, metavar="MODEL", help="what is trained: a directory or a hub name")
    serve.add_argument("--host", default="127.0.0.1", help="who can reach it can run code here (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="%(default)s")
    serve.add_argument("--dtype", default="float32", help="float32 or bfloat16, as the trainer computes (%(default)s)")
    serve.add_argument("--max_model_len", type=int, default=1024, help="prompt and completion, tokens (%(default)s)")
    serve.add_argument("--kv_cache_gib", type=float, default=1.0, help="memory for keys and values (%(default)s)")
    serve.add_argument("--block_size", type=int, default=32, help="tokens per cache block (%(default)s)")
    serve.set_defaults(run=_serve)

    # Their flags are fields of dataclasses, and they parse them themselves: here, no word is a flag.
    plan = commands.add_parser(
        "plan", help="say how much GPU memory a run takes, and how to launch it", prefix_chars="\0", add_help=False
    )
    plan.add_argument("words", nargs="*")
    plan.set_defaults(run=_plan)
    select = commands.add_parser(
        "select-checkpoint",
        help="rank SFT checkpoints by entropy and pass@k on a task, before RL starts from one",
        prefix_chars="\0",
        add_help=False,
    )
    select.add_argument("words", nargs="*")
    select.set_defaults(run=_select_checkpoint)
    return parser


def _report(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.report import write_report

    print(write_report(arguments.run_dir, arguments.output))


def _summary(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.summary import format_summary, summarize

    print(format_summary(summarize(arguments.run_dir)))


def _watch(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.watch import watch

    watch(arguments.run_dir, arguments.interval, arguments.once)


def _dashboard(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.dashboard.server import dashboard

    dashboard(arguments.runs_dir, arguments.host, arguments.port)


def _metrics(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.metrics import format_metrics

    print(format_metrics())


def _serve(arguments: argparse.Namespace) -> None:
    from rlvr.rollout.cpu_engine import EngineOptions
    from rlvr.rollout.serve import serve

    given = {name: getattr(arguments, name) for name in ("dtype", "max_model_len", "kv_cache_gib", "block_size")}
    serve(arguments.model, arguments.host, arguments.port, EngineOptions(**given))


def _plan(arguments: argparse.Namespace) -> None:
    from rlvr.trainers.planner import plan

    print(plan(arguments.words))


def _select_checkpoint(arguments: argparse.Namespace) -> None:
    from rlvr.trainers.checkpoint_choice import select_checkpoint

    print(select_checkpoint(arguments.words))


if __name__ == "__main__":
    sys.exit(main())
