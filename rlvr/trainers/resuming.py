"""Checkpoints that are whole, and runs that go on from one as if they had never been stopped."""

import math
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

from rlvr.errors import ConfigError, RunError
from rlvr.monitor.recorder import check_run_dir
from rlvr.monitor.records import holds_run
from rlvr.trainers.batch_files import read_batches, write_batches
from rlvr.trainers.callbacks import NothingLeft, RunCallback
from rlvr.trainers.checkpoints import ASIDE, STATE, clear, commit, complete_checkpoints, rotate
from rlvr.trainers.controlled import ControlledTrainer
from rlvr.trainers.resume import checkpoint_step, resolve_checkpoint, restarts, saved_state


class ResumingTrainer(ControlledTrainer):
    """TRL's trainer, which loses nothing that a checkpoint has seen.

    Beside what transformers saves (weights, optimizer, schedule, random numbers, the place in the data), a checkpoint
    holds what controls, thermostat and alarm have reached, and the rest of the rollout that it falls into.
    """

    run_callback: RunCallback
    _aside: str | None = None  # where a checkpoint is being written
    _saved_step = -1
    _checkpoint: str | None = None  # that the run goes on from
    _sampler: Any = None  # of the training prompts
    _began = False
    _buffered_inputs: Any  # TRL's: the micro-batches of the rollout at hand

    # ---------------------------------------------------------------------------------------------- writing

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else self._aside

    def _push_from_checkpoint(self, output_dir: str) -> None:
        if self._aside is None:  # else it is not there yet
            super()._push_from_checkpoint(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self._saved_step == step:
            return
        final = Path(super()._get_output_dir(trial), f"checkpoint-{step}")

        def write(folder: Path) -> None:
            self._aside = str(folder.parent)
            try:
                super(ResumingTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None
            if not self.args.save_only_model:
                self._save_rollout(folder)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / STATE))

        with self.clock.phase("checkpoint"):
            self._write_whole(final, final.parent / ASIDE, write)
        self._saved_step = step
        if self.args.should_save:
            rotate(final.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _finalize_training(self, *args: Any) -> Any:
        """Without the library's last rotation, which deletes the newest checkpoint where another is the best."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def export(self, folder: str) -> None:
        """`save_model`, of which a kill leaves all or nothing; it replaces the folder.

        Raises: ConfigError for a folder that holds a run, or more.
        """
        final, output_dir = Path(folder).resolve(), Path(self.args.output_dir).resolve()
        if final == output_dir or final in output_dir.parents or holds_run(final):
            raise ConfigError(f"folder={folder!r} holds a run, which would be replaced: export to a folder in it")
        self._write_whole(
            final, final.with_name(f"{ASIDE}-{final.name}"), lambda written: self.save_model(str(written))
        )

    def _write_whole(self, final: Path, aside: Path, write: Callable[[Path], None]) -> None:
        """Let every rank write into one folder aside, then give it its name. Raises: RunError if that cannot be."""
        try:
            written = aside / final.name
            if self.args.should_save:
                clear(aside)
            self.accelerator.wait_for_everyone()
            write(written)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit(written, final)
            self.accelerator.wait_for_everyone()
            # Of a machine with a disk of its own; a shared one may still show what the first process has renamed.
            if self.accelerator.is_local_main_process and written.exists() and not final.exists():
                commit(written, final)
        except Exception as error:
            complete = complete_checkpoints(self.args.output_dir)
            left = f"{complete[-1].name} is whole: resume from it" if complete else "there is no earlier one"
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise RunError(f"{str(final)!r} could not be written ({reason}); {left} once that is repaired") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------- the rollout

    @property
    def _micro_batches_per_rollout(self) -> int:
        return int(self.args.steps_per_generation * self.num_iterations)

    def _rollout_file(self, folder: str | Path) -> Path:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return Path(folder, f"rollout-{rank}-of-{ranks}.safetensors")

    def _save_rollout(self, folder: Path) -> None:
        """What is left to train on of the rollout at hand; images are not kept, such a rollout is made anew."""
        if self._step % self._micro_batches_per_rollout == 0 or self._buffered_inputs is None or self._is_vlm:
            return
        state = {
            "rollout_step": self._rollout_step,
            "rollout_number": self._rollout_number,
            "meter": self.meter.state_dict(),
            "sampled": self.run_callback.samples.sampled,
        }
        write_batches(self._rollout_file(folder), self._buffered_inputs, state)

    def _restore_rollout(self, checkpoint: str) -> None:
        if self._step % self._micro_batches_per_rollout == 0:
            return
        path = self._rollout_file(checkpoint)
        if not path.is_file() or self._changes(checkpoint):
            warnings.warn(
                f"{checkpoint!r} falls into a rollout that it does not hold for this run: it is made anew",
                stacklevel=2,
            )
            return
        batches, state = read_batches(path, self.accelerator.device)
        self._buffered_inputs = batches
        self._rollout_step, self._rollout_number = state["rollout_step"], state["rollout_number"]
        self.meter.load_state_dict(state["meter"])
        self.run_callback.samples.sampled = state["sampled"]

    # ---------------------------------------------------------------------------------------------- going on

    @property
    def layout(self) -> dict[str, Any]:
        """What has to be as it was for a resumed run to be the uninterrupted one."""
        names = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "steps_per_generation",
            "num_iterations",
        )
        return {name: getattr(self.args, name) for name in names} | {"processes": self.accelerator.num_processes}

    def _changes(self, checkpoint: str) -> dict[str, Any]:
        """What of the layout was otherwise when the checkpoint was written."""
        before = saved_state(checkpoint, RunCallback.__name__).get("layout", {})
        return {name: x for name, x in before.items() if self.layout.get(name) != x}

    def _warn_of_changes(self, checkpoint: str) -> None:
        if changed := self._changes(checkpoint):
            now = ", ".join(f"{name}={self.layout.get(name)} (was {x})" for name, x in changed.items())
            warnings.warn(f"resumed with {now}: training goes on, but not as it would have", stacklevel=3)
        if saved_state(checkpoint, RunCallback.__name__).get("only_model"):
            warnings.warn(
                f"{checkpoint!r} is of save_only_model: optimizer, schedule and random numbers start afresh",
                stacklevel=3,
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's `train`; `resume_from_checkpoint` defaults to the config's, True or "latest" means the newest one,
        "auto" the newest one if there is any.

        A run that had already taken its last step is not trained further: what it had reached is loaded.
        """
        output_dir = str(self.args.output_dir)
        requested = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = self._checkpoint = resolve_checkpoint(output_dir, requested)
        self.accelerator.wait_for_everyone()  # what the first process writes now must not be what another one finds
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            self._warn_of_changes(checkpoint)
            self.args.eval_on_start = False  # that was before the checkpoint
        if self._began:
            self._begin()  # what an interrupted call has left is of no use
        self._began = True
        if self.is_world_process_zero() and not (self.run_callback.is_open and checkpoint is None):
            again = restarts(requested) and holds_run(output_dir)
            check_run_dir(output_dir, resume=checkpoint is not None or again)
            self.run_callback.open(checkpoint_step(checkpoint) if checkpoint is not None else 0 if again else None)
        try:
            if checkpoint is not None:
                state = saved_state(checkpoint, RunCallback.__name__)
                self.steering.load_state_dict(state)
                self.guard.in_a_row = state.get("skipped_in_a_row", 0)
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except NothingLeft:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.run_callback.finish("finished")
            return TrainOutput(self.state.global_step, 0.0, {})
        except BaseException as error:
            self.run_callback.fail(error)
            raise

    @abstractmethod
    def _begin(self) -> None:
        """Make what a run adds up as it goes: meters, guard, controls."""

    def start(self) -> None:
        """Training begins: model and optimizer are wrapped, and are what `self._checkpoint` holds if there is one.

        TRL counts micro-batches from 0 in every process, and its sampler begins with the first epoch's order.
        """
        if self._checkpoint is None:
            return
        batches, accumulated = len(self.callback_handler.train_dataloader), self.args.gradient_accumulation_steps
        epochs, steps = divmod(self.state.global_step, max(1, math.ceil(batches / accumulated)))
        self._step = epochs * batches + steps * accumulated
        generator = getattr(self._sampler, "generator", None)
        for _ in range(epochs if generator is not None else 0):
            torch.randperm(len(self._sampler.data_source), generator=generator)
        self._restore_rollout(self._checkpoint)

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises: ConfigError if this trainer cannot go on from it."""
        if self.args.sync_ref_model:
            raise ConfigError(
                f"resume_from_checkpoint={checkpoint!r} does not hold the reference policy that sync_ref_model=true "
                "has moved: start a new run from the checkpoint's weights, or unset sync_ref_model"
            )
