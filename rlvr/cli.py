"""The `rlvr` command: choose a checkpoint to start from; look at a run without a GPU, a network or an account."""

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

    metrics = commands.add_parser("metrics", help="print every metric with its unit and meaning")
    metrics.set_defaults(run=_metrics)

    # Its flags are fields of dataclasses that live beside torch, so it parses them itself: here, no word is a flag.
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


def _metrics(arguments: argparse.Namespace) -> None:
    from rlvr.monitor.metrics import format_metrics

    print(format_metrics())


def _select_checkpoint(arguments: argparse.Namespace) -> None:
    from rlvr.trainers.checkpoint_choice import select_checkpoint

    print(select_checkpoint(arguments.words))


if __name__ == "__main__":
    sys.exit(main())
