"""What every trainer here shares, on TRL's: TRL generates, scores and steps; the objective, its controls and its
measurements are ours. A trainer says where advantages come from.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from rlvr.alarm import Alert
from rlvr.errors import ConfigError
from rlvr.mole.model import MoleConfig, expert_layers
from rlvr.mole.tracker import RouterTracker
from rlvr.rollout.cpu_engine import CpuEngine
from rlvr.rollout.parity import check_parity
from rlvr.rollout.server_engine import ServerEngine
from rlvr.tasks.schedule import Stage
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.adapters import choose_adapter
from rlvr.trainers.callbacks import RunCallback, use_own_progress_bar
from rlvr.trainers.clock import PhaseClock
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.distributed import AcceleratorReduce
from rlvr.trainers.dynamics import EntropyProbe
from rlvr.trainers.engine import (
    attach_cpu_engine,
    engine_tolerance,
    needs_cpu_engine,
    require_engine_of_experts,
    without_trl_engine,
)
from rlvr.trainers.guard import StepGuard
from rlvr.trainers.head import add_token_stats, check_token_stats, require_own_passes, shards_parameters
from rlvr.trainers.heldout import pass_rates
from rlvr.trainers.instruments import StepMeter, TokenDiagnostics
from rlvr.trainers.resuming import ResumingTrainer
from rlvr.trainers.router import RouterZLoss
from rlvr.trainers.shared_prompts import require_full_attention
from rlvr.trainers.staged import Stages
from rlvr.trainers.steering import Steering
from rlvr.trainers.stopping import add_stop_token
from rlvr.trainers.tokenizer_checks import check_tokens

logger = logging.getLogger(__name__)


class PolicyTrainer(ResumingTrainer):
    """The trainer of which GRPOTrainer and PPOTrainer are made; TRL's arguments, with `args` of its own config class.

    run_config: settings that belong into run.json beside `args`; its `task_description` is a line of the header.
    schedule: stages of a task (`Task.schedule`), each optimizer step on the prompts of its stage; then train_dataset
    has the columns `stage` and `domain`, and args.max_steps is unset or the steps of all stages together.
    Raises: ConfigError for what can be seen before the model is loaded; EngineMismatchError when engine and trainer
    disagree about the log-probs of the completions.
    """

    config_class: ClassVar[type[PolicyConfig]]
    _finite: ClassVar[frozenset[str]] = frozenset({"policy/loss", "optim/grad_norm"})  # else a step is skipped

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        run_config: Mapping[str, Any] | None = None,
        schedule: Sequence[Stage] = (),
        **trl_arguments: Any,
    ) -> None:
        if not isinstance(args, self.config_class):
            raise ConfigError(f"args is a {type(args).__name__}: pass a rlvr.{self.config_class.__name__}")
        if args.n_gpu > 1:
            raise ConfigError(f"one process for {args.n_gpu} GPUs: set CUDA_VISIBLE_DEVICES=0, or launch one for each")
        if not isinstance(train_dataset, Dataset):
            raise ConfigError(f"train_dataset is a {type(train_dataset).__name__}: pass a datasets.Dataset")
        self._stages = Stages(schedule, args, train_dataset) if schedule else None
        args.check_data(train_dataset.column_names, len(train_dataset))
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_tokens(model, trl_arguments.get("processing_class"), args, datasets)
        own_engine = needs_cpu_engine(args)
        trl_arguments["peft_config"] = choose_adapter(args, trl_arguments.get("peft_config"))
        if isinstance(trl_arguments["peft_config"], MoleConfig):
            require_engine_of_experts(args, own_engine)
        with without_trl_engine(args, own_engine):
            self._construct(model, reward_funcs, args, train_dataset, eval_dataset, **trl_arguments)
        if args.share_prompts:
            require_full_attention(self.accelerator.unwrap_model(self.model))
            if self.aux_loss_enabled or args.router_z_loss_coef or self._is_vlm:
                raise ConfigError("share_prompts=True takes no images and no router losses: set it to false")
        self.routers = self._track_routers(own_engine)
        self._own_head = not (args.use_trl_head or self._is_vlm)
        if self._own_head:
            self._add_heads()
        self.run_config = dict(run_config or {})
        self.clock = PhaseClock()
        self._begin()
        self.reduce = AcceleratorReduce(self.accelerator)
        self._rewards: Tensor | None = None
        self._measured = self._tool_mask = self._routes = None
        self._grad_norm: float | None = None
        policy = self.accelerator.unwrap_model(self.model)
        self._z_loss = RouterZLoss(policy, args.router_z_loss_coef) if args.router_z_loss_coef else None
        self.probe = EntropyProbe(self, args.probe_sequences, args.probe_every)
        if args.probe_sequences or any("mean_discriminator" in control.needs for control in args.control_list):
            asks = "probe_sequences" if args.probe_sequences else "a control of mean_discriminator"
            require_own_passes(self, asks)
        if args.stop is not None:
            add_stop_token(self, args.stop)
        if own_engine:
            attach_cpu_engine(self)
        if self.use_vllm:
            self.vllm_generation.sync_weights = self.clock.timed("sync_weights", self.vllm_generation.sync_weights)
        self.router_details: dict[str, Any] = {}  # of the step's routers by layer and position
        self.progress = use_own_progress_bar(self)
        self.run_callback = RunCallback(self)
        self.add_callback(self.run_callback)

    def _begin(self) -> None:
        args = self.args
        self.meter = StepMeter(self.accelerator)
        self.guard = StepGuard(self, args.max_skipped_steps)
        self.diagnostics = TokenDiagnostics(args.diagnostics)
        alarms = (args.alarm, args.mismatch_limit)
        self.steering = Steering(args.control_list, args.surrogate_fn, args.thermostat_config, *alarms)
        self.step_metrics: dict[str, float] = {}
        self.alerts: list[Alert] = []  # of the step at hand
        self._rollout_step = self._rollout_number = self._saved_step = -1
        self._infinite = 0  # rewards of the step at hand that are
        self._parity_checked = False
        self._buffered_inputs = None

    def _construct(self, model: Any, reward_funcs: Any, args: Any, *others: Any, **trl_arguments: Any) -> None:
        """TRL's constructor, which loads the models."""
        super().__init__(model, reward_funcs, args, *others, **trl_arguments)

    def _track_routers(self, own_engine: bool) -> RouterTracker | None:
        """Where the policy is a mixture of LoRA experts."""
        policy = self.accelerator.unwrap_model(self.model)
        layers = expert_layers(policy)
        if not layers:
            return None
        require_engine_of_experts(self.args, own_engine)
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        return RouterTracker(base.base_model, layers)

    def _value_head(self, policy: Any) -> Callable[[Tensor], Tensor] | None:
        """What makes values of the policy's hidden states, for a critic that shares its backbone."""

    def _add_heads(self) -> None:
        """Our statistics beside TRL's on the policy and on the reference, if that is a model of its own."""
        for wrapped in (self.model, self.ref_model):
            if wrapped is not None:
                model = self.accelerator.unwrap_model(wrapped)
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                head = self._value_head(base) if wrapped is self.model else None
                precise = self.args.cast_lm_head_to_fp32
                add_token_stats(base, temperature=self.temperature, float32=precise, value_head=head)
        if not shards_parameters(self):
            check_token_stats(self.accelerator.unwrap_model(self.model), self.temperature)

    # ---------------------------------------------------------------------------------------------- rollouts

    def _generate(self, prompts: list[Any]) -> Any:
        with self.clock.phase("rollout"):
            generated = super()._generate(prompts)
        self._tool_mask = generated[2]
        return generated

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.phase("verify"):
            rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._infinite += int(rewards.isinf().sum()) * self.model.training  # an evaluation's alert nobody
        rewards = rewards.masked_fill(rewards.isinf(), torch.nan)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)  # (B * ranks,), NaN: not scored
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.phase("old_logps"):  # what remains when generation and rewards are taken out
            self._measured = None
            batch = super()._generate_and_score_completions(inputs)
            if batch.get("old_per_token_logps") is None:
                self._measured = None  # at most the reference was passed
            self._rollout_step = self.state.global_step
            self._rollout_number = self._step // (self.args.steps_per_generation * self.num_iterations)
            self.run_callback.samples.start_rollout(self._rollout_step)
            self.meter.start_rollout(self._rollout_step, bridge.take_rollout_metrics(self._metrics["train"]))
            bridge.number_sequences(batch, self.accelerator.process_index)
            self._set_rewards(batch)
            self._set_advantages(batch)
            decides = bool(self.steering.scoped("rollout")) and not self._warming_up
            if decides or (self.use_vllm and not self._parity_checked):
                self._apply_rollout_controls(batch)
            self._attach_measured(batch)
            sizes = bridge.count_trained(batch, self.reduce)
            self.meter.start_rollout(self._rollout_step, sizes)
        return batch

    def _set_rewards(self, batch: dict[str, Any]) -> None:
        assert self._rewards is not None
        batch[bridge.REWARD] = self._mine(self._rewards)
        self.run_callback.add_groups(bridge.rollout_prompts(self._logs, len(self._rewards)), self._rewards)
        groups = self._rewards.view(-1, self.num_generations)
        constant = groups.nan_to_num(-torch.inf).amax(dim=1) <= groups.nan_to_num(torch.inf).amin(dim=1)
        rates = pass_rates(self._rewards, self.num_generations, self.args.pass_reward)
        told = {f"reward/pass_at_{k}": x for k, x in rates.items()}
        if self.num_generations > 1:
            told["reward/zero_variance_groups"] = float(constant.float().mean())
        self.meter.start_rollout(self._rollout_step, told)

    def _mine(self, values: Tensor) -> Tensor:
        """Of one number for each completion of all ranks, those of this rank."""
        return values.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]

    @property
    def _warming_up(self) -> bool:
        """Whether the optimizer step at hand leaves the policy as it is."""
        return False

    @abstractmethod
    def _set_advantages(self, batch: dict[str, Any]) -> None:
        """Put `advantages`, (B,) or (B, T), into the rollout; TRL's, relative to the group, are there."""

    # ---------------------------------------------------------------------------------------------- measurement

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        self._grad_norm = None if grad_norm is None else float(grad_norm)
        return grad_norm

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        self._sampler = super()._get_train_sampler(dataset) if self._stages is None else self._stages.sampler(self)
        return self._sampler

    def close_step(self) -> None:
        """Reduce the step's measurements, once; runs before the optimizer moves the weights, so an alarm
        prevents it.
        """
        step = self.meter.close()
        self.step_metrics = {
            **step.metrics,
            **self.diagnostics.close(self.reduce),
            "optim/learning_rate": self._get_learning_rate(),
        }
        if self._grad_norm is not None:
            self.step_metrics["optim/grad_norm"] = self._grad_norm
        self.step_metrics |= self._other_gradients()
        if self._stages is not None:
            self.step_metrics["reward/stage"] = self._stages.at(self.state.global_step)
        if self.routers is not None:
            metrics, self.router_details = self.routers.close(self.reduce)
            self.step_metrics |= metrics
        skipped = self.guard.skips({k: x for k, x in self.step_metrics.items() if k in self._finite})
        self._skips = skipped is not None
        self.step_metrics["optim/skipped"] = float(self._skips)
        if skipped is not None:
            self.alert(Alert("skipped", skipped))
        entropy, mismatch = (step.metrics.get(name, math.nan) for name in ("entropy/mean", "mismatch/kl"))
        infinite, self._infinite = self._infinite, 0
        try:
            self.step_metrics |= self.steering.observe(entropy, mismatch, infinite)
        finally:
            for alert in self.steering.alerts:
                self.alert(alert)
        self.progress.show(self.step_metrics)
        if step.mismatch is not None:
            check_parity(step.mismatch, engine_tolerance(self), self.state.global_step)

    def _other_gradients(self) -> dict[str, float]:
        """Norms of gradients beside the policy's, which are clipped by it."""
        return {}

    def alert(self, alert: Alert) -> None:
        """A line of the log, of the step's record and, if there is one, to the webhook. Called on every rank."""
        self.alerts.append(alert)
        if self.is_world_process_zero():
            logger.warning("%s", alert.message)
            self.run_callback.tell(self.state.global_step + 1, alert)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            bridge.rename_metrics(self._metrics["train"])
        super().log(logs, start_time)

    def header_rows(self) -> list[tuple[str, str]]:
        """Rows of the header beside everybody's."""
        return []

    def close(self) -> None:
        """Free our engine; the trainer cannot sample afterwards."""
        if isinstance(getattr(self, "vllm_generation", None), CpuEngine | ServerEngine):
            self.vllm_generation.close()
