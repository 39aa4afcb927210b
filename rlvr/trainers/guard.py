"""Optimizer steps whose loss or gradient is not finite: skipped, counted, kept for inspection, in the end fatal."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlvr.errors import RunError
from rlvr.trainers.batch_files import write_batches

if TYPE_CHECKING:
    from rlvr.trainers.policy import PolicyTrainer

FOLDER = "skipped"  # in the output_dir; `batch_files.read_batches` reads what lies there


class NonFiniteError(RunError):
    """Too many optimizer steps in a row had a loss or gradient that is not finite."""


class StepGuard:
    """Keeps a NaN out of the weights.   limit: steps in a row after which the run stops."""

    def __init__(self, trainer: "PolicyTrainer", limit: int) -> None:
        self._trainer, self._limit = trainer, limit
        self._window: list[Mapping[str, Any]] = []
        self.in_a_row = 0

    def watch(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch of the step at hand."""
        self._window.append(inputs)

    def skips(self, numbers: Mapping[str, float]) -> str | None:
        """Why the step is not taken, if it is not; asked once per step, before the optimizer moves the weights.

        numbers: its losses and gradient norms, the same on all ranks.
        Raises: NonFiniteError.
        """
        window, self._window = self._window, []
        bad = {name: x for name, x in numbers.items() if not math.isfinite(x)}
        if self._trainer.accelerator.mixed_precision == "fp16":  # gradients that overflow are its scaler's
            bad = {name: x for name, x in bad.items() if not name.endswith("grad_norm")}
        if not bad:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        trainer, step = self._trainer, self._trainer.state.global_step + 1
        rank = trainer.accelerator.process_index
        path = f"{trainer.args.output_dir}/{FOLDER}/step-{step:06d}-rank-{rank}.safetensors"
        try:
            write_batches(path, window, {"step": step, "rank": rank, **{name: str(x) for name, x in bad.items()}})
            where = f"is in {path!r}"
        except Exception as error:  # a full disk is safetensors' own error
            where = f"could not be saved ({' '.join(str(error).split())})"
        told = f"step {step}: {', '.join(f'{name} is {x}' for name, x in bad.items())}; its batch {where}"
        if self.in_a_row >= self._limit:
            raise NonFiniteError(
                f"{told}. These are {self.in_a_row} such steps in a row (max_skipped_steps={self._limit}): look at "
                "its rewards and log-probs, lower learning_rate, or set dtype: float32"
            )
        if trainer.accelerator.scaler is None:  # which wants to see the gradient
            trainer.optimizer.zero_grad(set_to_none=True)
        return f"{told}. The step is skipped ({self.in_a_row} in a row)"
