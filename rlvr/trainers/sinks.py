"""What `report_to` sends to wandb, trackio and TensorBoard: rlvr's metrics under their own names, histograms of
tokens, sampled completions and alerts.

It goes into the run that transformers' own callback of the system opens, on the steps at which it logs; a resumed run
continues the run that it had there. Of a system that `report_to` does not name, nothing is imported.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    default_logdir,
    rewrite_logs,
)

from rlvr.alarm import Alert
from rlvr.errors import ConfigError, unknown
from rlvr.monitor.files import replace
from rlvr.trainers.sink_values import COLUMNS, finite_edges, inert, markdown, own_names, raw_histogram, sample_row

TRACKERS = "trackers.json"  # in the run directory: what each system calls the run
DIRECTORY = "directory"  # an entry of that file: a hash of where it was written
PROJECT = "huggingface"  # of wandb, where WANDB_PROJECT does not say: that of transformers
# Where transformers names the check for a package otherwise than the entry of report_to.
_CHECKS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}


def check_report_to(args: Any) -> None:
    """Refuse a system that transformers does not know, or whose package is not there. Raises: ConfigError."""
    for name in args.report_to:
        if not isinstance(name, str) or name in ("none", "all"):
            raise ConfigError(
                f"report_to={args.report_to}: write `none` alone, or names such as wandb and tensorboard"
            )
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("report_to", name, (*INTEGRATION_TO_CALLBACK, "none"))
        if not getattr(integration_utils, f"is_{_CHECKS.get(name, name)}_available")():
            raise ConfigError(f"report_to={name!r}: its package is not installed; pip install it, or leave it out")


class Sink(ABC):
    """Mixed into transformers' callback of a system: what waits for the next log, and what the run is called there."""

    name: ClassVar[str]

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.identity: str | None = None
        self.file: Path | None = None  # where the identity is kept
        self.takes_samples = not getattr(args, "log_completions", False)  # TRL sends its own
        self.counts: dict[str, list[int]] = {}
        self.rows: deque[list[Any]] = deque(maxlen=getattr(args, "record_sequences", 0))

    def resume(self, identity: str, step: int) -> None:
        """Continue after this step the run that is called so."""
        self.identity = identity

    def remember(self, identity: str) -> None:
        """What the run is called, once it is open."""
        self.identity = identity
        if self.file is not None and (known := _known(self.file)).get(self.name) != identity:
            told = known | {DIRECTORY: _directory(self.file), self.name: identity}
            replace(self.file, json.dumps(told, indent=2).encode() + b"\n")

    def take(self, ours: Mapping[str, float]) -> tuple[dict[str, list[int]], list[list[Any]]]:
        """Histograms and samples, where `ours` are of training steps; they begin anew."""
        if all(name.startswith("heldout/") for name in ours):
            return {}, []
        taken = self.counts, list(self.rows)
        self.counts = {}
        self.rows.clear()
        return taken

    @abstractmethod
    def log_alert(self, step: int, alert: Alert) -> None:
        """Tell of an alert of this step."""


class WandbSink(Sink, WandbCallback):
    """`wandb.Histogram`, `wandb.Table` and alerts; the steps are those of train/global_step."""

    name = "wandb"

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        main = state.is_world_process_zero
        if main and self.identity and self._wandb.run is None and "WANDB_RUN_ID" not in os.environ:
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            self._wandb.init(project=project, name=args.run_name, id=self.identity, resume="allow")
        super().setup(args, state, model, **kwargs)
        if main:
            self.remember(self._wandb.run.id)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        ours, theirs = own_names(logs)
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            self._wandb.log({**ours, **_rich(self._wandb, *self.take(ours))}, commit=False)
        super().on_log(args, state, control, model=model, logs=theirs, **kwargs)  # which commits

    def log_alert(self, step: int, alert: Alert) -> None:
        title = f"rlvr step {step}: {alert.kind}"  # of one title wandb sends one a minute
        self._wandb.run.alert(title=title, text=f"step {step}: {alert.message}", level="WARN")


class TrackioSink(Sink, TrackioCallback):
    """Trackio's Histogram, Table and alerts, on the optimizer's steps: transformers lets trackio count log calls."""

    name = "trackio"

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        given, args.run_name = args.run_name, self.identity or args.run_name
        try:
            super().setup(args, state, model, **kwargs)
        finally:
            args.run_name = given
        if state.is_world_process_zero:
            self.remember(self._run.name)

    @property
    def _run(self) -> Any:
        return self._trackio.context_vars.current_run.get()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        ours, theirs = own_names(logs)
        if not self._initialized:
            self.setup(args, state, model)
        if state.is_world_process_zero:
            # Without the summary of the whole training, which transformers keeps from trackio.
            theirs = {name: x for name, x in theirs.items() if not name.startswith("train_") and name != "total_flos"}
            sent = {**ours, **rewrite_logs(theirs), **_rich(self._trackio, *self.take(ours))}
            self._trackio.log({**sent, "train/global_step": state.global_step}, step=state.global_step)

    def log_alert(self, step: int, alert: Alert) -> None:
        level = self._trackio.AlertLevel.WARN
        self._run.alert(title=f"rlvr: {alert.kind}", text=f"step {step}: {alert.message}", level=level, step=step)


class TensorBoardSink(Sink, TensorBoardCallback):
    """Histograms with the bins they were counted in; samples and alerts as text."""

    name = "tensorboard"
    logging_dir: str | None
    tb_writer: Any

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.takes_samples = True  # TRL sends TensorBoard none
        self._output_dir = str(args.output_dir)
        self._is_told = self.logging_dir is not None  # by TENSORBOARD_LOGGING_DIR
        self.logging_dir = self.logging_dir or os.path.join(self._output_dir, default_logdir())
        self._purge_step: int | None = None

    def resume(self, identity: str, step: int) -> None:
        """Go on in its folder; what it says of later steps is hidden by what is to come."""
        super().resume(identity, step)
        if not self._is_told:
            self.logging_dir = os.path.join(self._output_dir, identity)
        self._purge_step = step + 1
        if self.tb_writer is not None:  # of an evaluation before
            self.tb_writer.close()
            self.tb_writer = None

    def _init_summary_writer(self, args: Any) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self._purge_step)
        self._purge_step = None
        self.remember(os.path.relpath(str(self.logging_dir), self._output_dir))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        ours, theirs = own_names(logs)
        super().on_log(args, state, control, logs=theirs, **kwargs)
        if not state.is_world_process_zero:
            return
        writer, step = self.tb_writer, state.global_step
        for name, value in ours.items():
            writer.add_scalar(name, value, step)
        counts, rows = self.take(ours)
        for name, bins in counts.items():
            writer.add_histogram_raw(f"histograms/{name}", **raw_histogram(bins, finite_edges(name)), global_step=step)
        if rows:
            writer.add_text("samples", markdown(rows), step)
        writer.flush()

    def log_alert(self, step: int, alert: Alert) -> None:
        self.tb_writer.add_text("alerts", inert(f"{alert.kind}: {alert.message}"), step)
        self.tb_writer.flush()


SINKS: dict[type, type[Any]] = {
    WandbCallback: WandbSink,
    TrackioCallback: TrackioSink,
    TensorBoardCallback: TensorBoardSink,
}


class Sinks:
    """The systems of a trainer's `report_to`, of those that take more than numbers."""

    def __init__(self, trainer: Any) -> None:
        """Put ours in place of transformers' callbacks."""
        self._trainer = trainer
        self._sinks: list[Any] = []
        for callback in list(trainer.callback_handler.callbacks):
            own = SINKS.get(type(callback))
            if own is not None and own.name in trainer.args.report_to:
                trainer.remove_callback(callback)
                self._sinks.append(own(trainer.args))
                trainer.add_callback(self._sinks[-1])

    def open(self, output_dir: str, resume_step: int | None) -> None:
        """On the main process, before training: keep in the run directory what the run is called in each system; of a
        run that goes on after `resume_step`, read it. Raises: ConfigError if that file is damaged.
        """
        file = Path(output_dir, TRACKERS)
        known = {} if resume_step is None else _known(file)
        if self._sinks and resume_step is None:
            file.unlink(missing_ok=True)
        for sink in self._sinks:
            sink.file = file
            if resume_step is not None and sink.name in known:
                sink.resume(known[sink.name], resume_step)
            elif sink.identity is not None:  # an evaluation has opened it
                sink.remember(sink.identity)

    def ready(self) -> None:
        """Before an evaluation outside of training: TRL times it, for which trackio, unlike wandb, must have a run."""
        trainer = self._trainer
        for sink in self._sinks:
            if isinstance(sink, TrackioSink) and not sink._initialized:
                sink.setup(trainer.args, trainer.state, trainer.model)

    def log_histograms(self, histograms: Mapping[str, Sequence[int]]) -> None:
        """Add a step's counts, by names of HISTOGRAMS; the sums of an interval go out with its means."""
        for sink in self._sinks:
            for name, counts in histograms.items():
                before = sink.counts.get(name, [0] * len(counts))
                sink.counts[name] = [a + int(b) for a, b in zip(before, counts, strict=True)]

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep sampled completions of a step, as `RunCallback` records them; the newest go out with the next log."""
        table = [sample_row(step, row) for row in rows]
        for sink in self._sinks:
            if sink.takes_samples:
                sink.rows.extend(table)

    def log_alerts(self, step: int, alerts: Iterable[Alert]) -> None:
        """Send what a person should know of a step."""
        for alert in alerts:
            for sink in self._sinks:
                sink.log_alert(step, alert)


def _known(file: Path) -> dict[str, str]:
    """What the run is called; {} in a copy of its directory, which is to be another run."""
    try:
        known = dict(json.loads(file.read_bytes())) if file.exists() else {}
        return known if known.get(DIRECTORY) in (None, _directory(file)) else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}): delete it, and the run opens new ones in report_to"
        ) from error


def _directory(file: Path) -> str:
    """Which directory a file is in: told apart by it, and not told."""
    return hashlib.sha256(os.fsencode(file.parent.resolve())).hexdigest()[:16]


def _rich(system: Any, counts: Mapping[str, list[int]], rows: Sequence[list[Any]]) -> dict[str, Any]:
    """Histograms and samples as objects of wandb or trackio, whose classes agree."""
    found = {f"histograms/{k}": system.Histogram(np_histogram=(c, finite_edges(k))) for k, c in counts.items()}
    return found | ({"samples": system.Table(columns=list(COLUMNS), data=list(rows))} if rows else {})
