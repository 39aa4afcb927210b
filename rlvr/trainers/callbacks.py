"""What happens around the training loop: run records, token samples, the progress bar."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from rlvr.alarm import Alert
from rlvr.errors import RunError
from rlvr.law import fit_law
from rlvr.monitor.groups import Groups
from rlvr.monitor.lookout import Lookout
from rlvr.monitor.recorder import Recorder
from rlvr.monitor.records import read_evals, read_steps, rollout_points, series
from rlvr.trainers.dynamics import Loss
from rlvr.trainers.header import header
from rlvr.trainers.sampling import TokenSampler, groups_of
from rlvr.trainers.sinks import Sinks
from rlvr.types import Coefficients, Tokens

if TYPE_CHECKING:
    from rlvr.trainers.policy import PolicyTrainer

logger = logging.getLogger(__name__)

LAW_EVERY = 10  # optimizer steps
LAW_NUMBERS = ("a", "b", "ceiling", "ceiling_low", "ceiling_high", "r2", "r2_linear")
PHASES = ("rollout", "sync_weights", "verify", "old_logps", "critic")


class NothingLeft(Exception):
    """The run to be resumed had taken its last step; all is loaded."""


class RunCallback(TrainerCallback, ExportableState):
    """Writes the run directory, on the main process; takes part in the reductions on all of them."""

    def __init__(self, trainer: "PolicyTrainer") -> None:
        self._trainer = trainer
        self._recorder: Recorder | None = None
        self._lookout: Lookout | None = None
        self._in_step = False
        self._evaluated_step = -1
        self.samples = TokenSampler(trainer)
        self._groups: list[Groups] = []  # of the rollouts that the step at hand is the first to train on
        self._sinks = Sinks(trainer)
        self._points: list[tuple[float, float]] = []  # entropy and reward of each rollout

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in its trainer_state.json; read again by `resume.saved_state`."""
        trainer = self._trainer
        reached = {**trainer.steering.state_dict(), "skipped_in_a_row": trainer.guard.in_a_row}
        made = {"layout": trainer.layout, "only_model": trainer.args.save_only_model}
        return {"args": {}, "attributes": {**reached, **made}}

    def open(self, resume_step: int | None) -> None:
        """Start the records of a run, or continue them after the checkpoint of `resume_step`."""
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        config = {
            **trainer.args.to_dict(),
            **trainer.run_config,
            "model": trainer.model.config._name_or_path,
        }
        output_dir = str(trainer.args.output_dir)
        self._sinks.open(output_dir, resume_step)
        seconds: Sequence[float] = ()  # of the steps so far
        if resume_step is None:
            self._recorder = Recorder(output_dir, config)
        else:
            self._recorder = Recorder.resume(output_dir, resume_step, config)
            kept = read_steps(output_dir)
            self._points, seconds = rollout_points(kept), series(kept, "time/step")[1]
        args = trainer.args
        self._lookout = Lookout(
            output_dir, stall_after=args.stall_seconds, webhook=args.alert_webhook, doing=self._doing
        )
        self._lookout.start(resume_step or 0, seconds)

    def _doing(self) -> tuple[str, float]:
        """What the run is at, "" where that is not known, and since when."""
        phase, since = self._trainer.clock.doing
        return phase or ("update" if self._in_step else ""), since

    def tell(self, step: int, alert: Alert) -> None:
        """Let an alert be known outside of the run's records."""
        if self._lookout is not None:
            self._lookout.tell(step, alert)

    @property
    def is_open(self) -> bool:
        return self._recorder is not None

    def start_eval(self) -> None:
        self._sinks.ready()

    def record_eval(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> None:
        step, name = self._trainer.state.global_step, details.get("name")
        evaluated = [(r["step"], r.get("name")) for r in read_evals(str(self._trainer.args.output_dir))]
        if self._recorder is not None and (step, name) in evaluated:
            logger.warning("an evaluation after step %d is already recorded: this one is not", step)
        elif self._recorder is not None:
            self._recorder.record_eval(step, metrics, details)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint that this callback did not write lacks its entry, which saving the next one looks up.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self._lookout is not None:
            self._lookout.start(state.global_step)
        self.samples.clear()
        self._groups = []
        self._trainer.start()
        if state.global_step >= state.max_steps:  # transformers would take one step more
            raise NothingLeft
        if self._trainer.is_world_process_zero():
            print(header(self._trainer), flush=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.clock.take()
        self._step_began, self._in_step = time.perf_counter(), True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.close_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_step = False
        measured = self._trainer.probe.measure()
        metrics = {**self._trainer.step_metrics, **measured, **self._times()}
        metrics |= self._law(state.global_step, metrics)
        for name, value in metrics.items():
            self._trainer._metrics["train"][name].append(value)
        if self._recorder is not None:
            trainer = self._trainer
            if self._lookout is not None:
                trainer.alerts += self._lookout.step_done(state.global_step)
            details = {**trainer.diagnostics.details, "routers": trainer.router_details, "alerts": trainer.alerts}
            self._recorder.record_step(state.global_step, metrics, **details)
            if rows := self.samples.take(trainer.diagnostics.means):
                self._recorder.record_tokens(state.global_step, {k: [row[k] for row in rows] for k in rows[0]})
            for groups in self._groups:
                self._recorder.record_groups(state.global_step, groups, texts=args.record_sequences > 0)
            self._sinks.log_histograms(trainer.diagnostics.details.get("histograms", {}))
            self._sinks.log_samples(state.global_step, rows)
            self._sinks.log_alerts(state.global_step, trainer.alerts)
        self._groups, self._trainer.alerts = [], []
        if args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer():
            control.should_evaluate = True  # now: a checkpoint of this very step is to be saved after it

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated_step = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_evaluate and self._evaluated_step != state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish("finished" if state.global_step >= state.max_steps else "interrupted")

    def _law(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """R = -a exp(H) + b over the rollouts so far, each at the policy that made it; now and then."""
        self._points += rollout_points([{"metrics": metrics}])
        if step % LAW_EVERY or len(self._points) < 3:
            return {}
        fit = fit_law(*zip(*self._points, strict=True))
        numbers = {f"law/{name}": getattr(fit, name) for name in LAW_NUMBERS}
        numbers["law/holds"] = {"holds": 1.0, "not yet": 0.0, "does not hold here": -1.0}[fit.verdict]
        return {name: value for name, value in numbers.items() if value == value}

    def finish(self, status: str, error: str | None = None) -> None:
        """Say in the run's records how it ended."""
        if self._recorder is None:
            return
        try:
            self._recorder.finish(status, error)
        finally:
            if self._lookout is not None:
                self._lookout.stop(self._trainer.state.global_step, error if status == "failed" else None)

    def fail(self, error: BaseException) -> None:
        """The same of a run that was stopped; what stopped it may stop this, too."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        try:
            self.finish(status, " ".join(f"{type(error).__name__}: {error}".split()))
        except RunError as also:
            logger.warning("%s", also)

    def _times(self) -> dict[str, float]:
        """Seconds of the step by phase, and the rates that follow. What no phase claims is the optimizer: the
        update's.
        """
        seconds = self._trainer.clock.take()
        whole = time.perf_counter() - self._step_began
        times = {f"time/{phase}": seconds.get(phase, 0.0) for phase in PHASES[: None if "critic" in seconds else -1]}
        times["time/update"] = whole - sum(times.values())
        times["time/step"] = whole
        metrics = self._trainer.step_metrics
        if times["time/rollout"] > 0 and "rollout/tokens" in metrics:
            times["time/rollout_tokens_per_s"] = metrics["rollout/tokens"] / times["time/rollout"]
        if "policy/tokens" in metrics:
            times["time/update_tokens_per_s"] = metrics["policy/tokens"] / times["time/update"]
        return times

    def add_groups(self, prompts: Sequence[Any], rewards: Tensor) -> None:
        """A rollout was made.   prompts, rewards: of its completions, over all ranks."""
        if self._recorder is not None:
            trainer = self._trainer
            self._groups.append(groups_of(prompts, rewards, trainer.num_generations, trainer.args.pass_reward))

    def sample_tokens(
        self, inputs: Mapping[str, Any], tokens: Tokens, by_control: Mapping[str, Coefficients], loss: Loss
    ) -> None:
        """A micro-batch is trained on; arguments as in `TokenSampler.add`."""
        if self._recorder is not None and self._trainer.model.training:
            self.samples.add(inputs, tokens, by_control, loss)


class EntropyProgress(ProgressCallback):
    """The training bar, with the step's reward and entropy on it instead of a dump of every metric."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        return

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.set_postfix_str(self._postfix, refresh=True)

    _postfix = ""

    def show(self, metrics: Mapping[str, float]) -> None:
        """What stands on the bar after this step."""
        shown = {"reward": "reward/mean", "entropy": "entropy/mean", "length": "rollout/completion_length"}
        parts = [f"{label} {metrics[name]:.3f}" for label, name in shown.items() if name in metrics]
        self._postfix = " · ".join(parts)


def use_own_progress_bar(trainer: "PolicyTrainer") -> EntropyProgress:
    """Replace the library's bar, which prints every metric of every log."""
    had_bar = trainer.pop_callback(ProgressCallback) is not None
    trainer.remove_callback(PrinterCallback)
    bar = EntropyProgress()
    if had_bar:
        trainer.add_callback(bar)
    return bar
