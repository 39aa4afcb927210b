"""Critics: what is trained beside the policy to predict the return, with an optimizer and a schedule of its own.

A critic on its own backbone is a second model with a second engine, not a part of the policy: its gradients are
clipped by themselves, only one of the two graphs is alive at a time, and the policy's checkpoints, weight syncs and
adapters are what they are without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, get_scheduler

from rlvr.errors import ConfigError
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.critic_model import ValueHead
from rlvr.trainers.forward import passes
from rlvr.trainers.head import positions
from rlvr.trainers.shared_prompts import require_full_attention

if TYPE_CHECKING:
    from rlvr.trainers.ppo import PPOTrainer

FOLDER = "critic"  # in a checkpoint
SAVES_WHOLE = "stage3_gather_16bit_weights_on_model_save"
OPTIMIZER, HEAD = "optimizer.pt", "value_head.safetensors"


class Critic(ABC):
    """module: what is trained.   trainer: of the policy."""

    def __init__(self, module: Any, trainer: "PPOTrainer") -> None:
        self.module, self._trainer = module, trainer
        self.optimizer: Any = None

    def prepare(self, total_steps: int) -> None:
        """Build optimizer and schedule, of the policy's kinds, for a run of that many optimizer steps."""
        args, trainer = self._trainer.args, self._trainer
        kind, options = trainer.get_optimizer_cls_and_kwargs(args, self.module)
        decayed = set(trainer.get_decay_parameter_names(self.module))
        trained = [(name in decayed, p) for name, p in self.module.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for decays, p in trained if decays is side], "weight_decay": args.weight_decay * side}
            for side in (True, False)
        ]
        self.optimizer = kind([g for g in groups if g["params"]], **{**options, "lr": args.critic_learning_rate})
        self._scheduler = get_scheduler(
            args.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=args.get_warmup_steps(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )

    @property
    def steps_itself(self) -> bool:
        return False

    @abstractmethod
    def clip(self) -> float:
        """Clip the gradients, once the last micro-batch of an optimizer step has been learned from; returns their norm
        before.
        """

    def step(self, skip: bool) -> dict[str, float]:
        """Move the weights; with `skip` drop the gradients instead. A DeepSpeed engine has done either by itself."""
        told = {"critic/learning_rate": float(self._scheduler.get_last_lr()[0])}
        if not skip and not self.steps_itself:
            self.optimizer.step()
        if not self.steps_itself:
            self.optimizer.zero_grad()
        self._scheduler.step()
        return told

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write the weights; on every rank."""

    def save_state(self, folder: str) -> None:
        """Write what `resume` needs beside the weights; on every rank."""
        if self._trainer.args.should_save:
            state = {"optimizer": self.optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}
            torch.save(state, Path(folder, OPTIMIZER))

    def resume(self, folder: str) -> None:
        """Go on from what `save` and `save_state` wrote; with `save_only_model`, that is the weights."""
        self.load(folder)
        if not Path(folder, OPTIMIZER).is_file():
            return
        state = torch.load(Path(folder, OPTIMIZER), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])

    @abstractmethod
    def saved(self, folder: str) -> bool:
        """Whether `save` of a critic of this kind wrote the folder."""

    @abstractmethod
    def load(self, folder: str) -> None:
        """Read the weights that `save` wrote."""

    def _clipped(self, parameters: list[nn.Parameter]) -> float:
        limit = self._trainer.args.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else torch.inf))


class OwnCritic(Critic):
    """A model for token classification with one label (`critic_model`), wrapped by DDP or DeepSpeed as the policy."""

    def __init__(self, module: Any, trainer: "PPOTrainer") -> None:
        super().__init__(module, trainer)
        self._accelerator = trainer.accelerator
        self._engine: Any = None  # DeepSpeed's
        args = trainer.args
        base = module.get_base_model() if hasattr(module, "get_base_model") else module
        if args.share_prompts:
            require_full_attention(base)
        self._takes_positions = "position_ids" in signature(type(base).forward).parameters
        if args.gradient_checkpointing:
            base.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        self._wrapped = module.to(self._accelerator.device)

    def prepare(self, total_steps: int) -> None:
        super().prepare(total_steps)
        if self._accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._wrapped = self._accelerator.prepare_model(self.module)
            return
        import deepspeed

        plugin = self._accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3 and not plugin.deepspeed_config["zero_optimization"].get(SAVES_WHOLE):
            raise ConfigError("zero3_save_16bit_model: false would leave checkpoints without a critic: set it to true")
        config = deepcopy(plugin.deepspeed_config)
        for section in ("optimizer", "scheduler"):
            config.pop(section, None)
        config["zero_force_ds_cpu_optimizer"] = False
        self._wrapped, self.optimizer, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=config
        )
        self._engine = DeepSpeedEngineWrapper(self._wrapped)

    @torch.no_grad()
    def values(self, batch: Mapping[str, Any], batch_size: int) -> Tensor:
        """(B, T), 0 where there is no trained token; the value of the text before it."""
        self._wrapped.eval()
        return self._pass(batch, batch_size)

    def learn(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Add the gradient of a loss of the values (B, T) of a micro-batch; under DeepSpeed the last one steps."""
        self._wrapped.train()
        whole = self._accelerator.sync_gradients
        with nullcontext() if whole or self._engine else self._accelerator.no_sync(self._wrapped):
            loss = loss_of(self._pass(batch, None))
            if self._engine is None:
                loss.backward()
            else:
                self._engine.backward(loss, sync_gradients=whole, scale_wrt_gas=False)

    def _pass(self, batch: Mapping[str, Any], batch_size: int | None) -> Tensor:
        arguments, trained = bridge.forward_arguments(batch), bridge.trained_mask(batch)
        ids, mask, shares = arguments["input_ids"], arguments["attention_mask"], self._trainer.args.share_prompts
        parts = []
        for passed in passes(ids, mask, trained, batch_size, shares):
            inputs = passed.inputs
            if self._takes_positions and "position_ids" not in inputs:
                inputs["position_ids"] = positions(inputs["attention_mask"])
            with self._accelerator.autocast():
                outputs = self._wrapped(**inputs, use_cache=False)
            parts.append(passed.padded(outputs.logits[passed.rows, passed.columns, 0].float()))
        return torch.cat(parts)

    @property
    def steps_itself(self) -> bool:
        return self._engine is not None

    def clip(self) -> float:
        if self._engine is not None:
            return float(self._engine.get_global_grad_norm() or 0.0)
        return self._clipped([p for p in self.module.parameters() if p.requires_grad])

    def save(self, folder: str) -> None:
        state = None if self._engine is None else self._accelerator.get_state_dict(self._wrapped)
        if self._trainer.args.should_save:
            self.module.save_pretrained(self._weights(folder), state_dict=state)
            self._trainer.processing_class.save_pretrained(folder)

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self.module, "peft_config")

    def _weights(self, folder: str) -> str:
        """Adapters lie deeper: transformers takes those in a folder of a checkpoint for the policy's."""
        return f"{folder}/adapter" if self._has_adapters else folder

    def save_state(self, folder: str) -> None:
        if self._engine is None:
            super().save_state(folder)
        else:
            state = {"scheduler": self._scheduler.state_dict()}
            self._wrapped.save_checkpoint(folder, client_state=state, exclude_frozen_parameters=self._has_adapters)

    def resume(self, folder: str) -> None:
        if self._engine is None:
            super().resume(folder)
            return
        if not any(Path(folder).glob("*/*_states.pt")):  # save_only_model
            self.load(folder)
            return
        found, client_state = self._wrapped.load_checkpoint(folder, load_module_strict=not self._has_adapters)
        if found is None:
            raise ConfigError(f"resume_from_checkpoint: {folder!r} holds no state of a critic under DeepSpeed")
        self._scheduler.load_state_dict(client_state["scheduler"])

    def saved(self, folder: str) -> bool:
        if self._has_adapters:
            return Path(self._weights(folder), "adapter_config.json").is_file()
        if not Path(folder, "config.json").is_file():
            return False
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        ours = self.module.config.get_text_config()
        shape = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
        return all(getattr(theirs, name, None) == getattr(ours, name, None) for name in shape)

    def load(self, folder: str) -> None:
        if self._has_adapters:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.module, load_peft_weights(self._weights(folder), device="cpu"))
        else:
            saved = type(self.module).from_pretrained(folder, dtype=torch.float32)  # the head is float32
            self.module.load_state_dict(saved.state_dict())


class SharedCritic(Critic):
    """A value head on the policy's backbone. Its loss is a term of the policy's; the head stays outside of the model,
    so that checkpoint, adapter and engine do not see it, and is the same on every rank.
    """

    module: ValueHead

    def __init__(self, hidden_size: int, trainer: "PPOTrainer") -> None:
        head = ValueHead(hidden_size, 1, device=trainer.accelerator.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        super().__init__(head, trainer)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] to values [N]."""
        value: Tensor = self.module(hidden.to(self.module.weight.device))[..., 0]
        return value

    def clip(self) -> float:
        parameters = list(self.module.parameters())
        for parameter in parameters:
            parameter.grad = self._trainer.accelerator.reduce(parameter.grad, "mean")
        return self._clipped(parameters)

    def save(self, folder: str) -> None:
        if self._trainer.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(self.module.state_dict(), Path(folder, HEAD))

    def saved(self, folder: str) -> bool:
        return Path(folder, HEAD).is_file()

    def load(self, folder: str) -> None:
        self.module.load_state_dict(load_file(Path(folder, HEAD)))
