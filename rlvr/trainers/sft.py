"""Supervised fine-tuning on the solved rows of a task, with the auxiliary losses of a mixture of LoRA experts."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor

from rlvr.errors import ConfigError
from rlvr.mole.model import expert_layers
from rlvr.mole.tracker import RouterTracker
from rlvr.tasks.load import Task
from rlvr.trainers.adapters import AdapterFields, choose_adapter
from rlvr.trainers.distributed import AcceleratorReduce, reduce_means
from rlvr.trainers.launch_modes import check_deepspeed, check_launch, check_precision
from rlvr.trainers.sinks import Sinks, check_report_to
from rlvr.types import Mean


@dataclass
class SFTConfig(AdapterFields, trl.SFTConfig):
    """TRL's SFTConfig and the adapter. Raises: ConfigError."""

    def __post_init__(self) -> None:
        _ = self.mole_config  # which checks itself
        check_launch(os.environ, torch.accelerator.is_available())
        # Without an accelerator there is one place to run; transformers would refuse bf16 instead of saying so.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        check_precision(self)
        check_deepspeed(self)
        check_report_to(self)


class SFTTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer; where the model is a mixture of LoRA experts, its routers' losses are added and told.

    Without one it is TRL's, bit for bit. The auxiliary loss is a mean over a micro-batch's tokens, as TRL's of a
    mixture-of-experts model. Metrics: router/* of `rlvr.monitor.metrics`, logged beside TRL's.
    """

    args: SFTConfig

    def __init__(self, model: Any, args: SFTConfig, *, peft_config: Any = None, **options: Any) -> None:
        super().__init__(model, args, peft_config=choose_adapter(args, peft_config), **options)
        unwrapped = self.accelerator.unwrap_model(self.model)
        base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        layers = expert_layers(unwrapped)
        self.routers = RouterTracker(base.base_model, layers) if layers else None
        self._terms: dict[str, Mean] = {}
        Sinks(self)  # so that they know our names

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.routers is None or not self.model.training:
            return found
        extra = self._router_loss(num_items_in_batch)
        return (found[0] + extra, found[1]) if return_outputs else found + extra

    def _router_loss(self, num_items_in_batch: Any) -> Tensor:
        assert self.routers is not None
        auxiliary, terms = self.routers.take()
        for name, mean in terms.items():
            self._terms[name] = self._terms[name] + mean if name in self._terms else mean
        # With num_items_in_batch transformers leaves gradient accumulation to the loss.
        return auxiliary / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.routers is not None and self.model.training:
            metrics, _ = self.routers.close(AcceleratorReduce(self.accelerator))
            terms, self._terms = reduce_means(self._terms, self.accelerator), {}
            for name, value in {**metrics, **{name: mean.value() for name, mean in terms.items()}}.items():
                self._metrics["train"][name].append(value)
        super().log(logs, start_time)


def demonstrations(rows: Dataset, answer_template: str = " {answer}") -> Dataset:
    """Prompts with their reference answers as completions, for SFTTrainer.

    rows: `Task.train`, of prompts as text or as messages.   answer_template: of a completion, with {answer}.
    Raises: ConfigError for rows without a reference answer.
    """

    def solved(row: dict[str, Any]) -> dict[str, Any]:
        text = answer_template.format(answer=row["answer"])
        if isinstance(row["prompt"], str):
            return {"prompt": row["prompt"], "completion": text}
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text.strip()}]}

    if unanswered := sum(not answer for answer in rows["answer"]):
        raise ConfigError(
            f"{unanswered} of {len(rows)} rows have no reference answer to learn from: choose a task with"
        )
    return rows.map(solved, remove_columns=[name for name in rows.column_names if name != "prompt"])


def solved_rows(task: Task, answer_template: str | None) -> tuple[Dataset, Dataset | None]:
    """Training and held-out demonstrations of a task."""
    template = answer_template or " {answer}"
    heldout = None if task.heldout is None else demonstrations(task.heldout, template)
    return demonstrations(task.train, template), heldout
