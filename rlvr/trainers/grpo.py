"""GRPO on TRL's trainer: TRL generates, scores and steps; the objective, its controls and its measurements are
ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState

from rlvr.advantages import leave_one_out
from rlvr.controls import apply
from rlvr.errors import ConfigError
from rlvr.monitor.recorder import check_run_dir
from rlvr.objective import policy_loss
from rlvr.rollout.cpu_engine import CpuEngine
from rlvr.rollout.parity import check_parity, measure_mismatch
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.callbacks import RunCallback, use_own_progress_bar
from rlvr.trainers.clock import PhaseClock
from rlvr.trainers.config import GRPOConfig
from rlvr.trainers.distributed import AcceleratorReduce
from rlvr.trainers.engine import attach_cpu_engine, engine_tolerance, needs_cpu_engine, without_trl_engine
from rlvr.trainers.heldout import HeldOutTrainer
from rlvr.trainers.instruments import StepMeter, step_means
from rlvr.trainers.resume import checkpoint_step, resolve_checkpoint
from rlvr.trainers.shared_prompts import require_full_attention, token_statistics
from rlvr.trainers.stopping import add_stop_token
from rlvr.types import Coefficients, LocalReduce, Mean, Tokens


class GRPOTrainer(HeldOutTrainer):
    """TRL's GRPOTrainer under entropy controls. Same arguments, with `args` a `rlvr.GRPOConfig`.

    task_description: a line for the header.   run_config: settings that belong into run.json beside `args`.

    With no controls its weights equal stock TRL's exactly. Rollout-scope coefficients are computed once per generation
    batch over all ranks and ride along in it, so the loss does not depend on how it is cut into micro-batches.
    Differs from TRL: sequences that are masked out whole leave the mean over sequences.
    Raises: ConfigError for what can be seen before the model is loaded; EngineMismatchError when engine and trainer
    disagree about the log-probs of the completions.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        task_description: str = "",
        run_config: Mapping[str, Any] | None = None,
        **trl_arguments: Any,
    ) -> None:
        if not isinstance(args, GRPOConfig):
            raise ConfigError(f"args is a {type(args).__name__}: pass a rlvr.GRPOConfig")
        if not isinstance(train_dataset, Dataset):
            raise ConfigError(f"train_dataset is a {type(train_dataset).__name__}: pass a datasets.Dataset")
        args.check_data(train_dataset.column_names, len(train_dataset))
        own_engine = needs_cpu_engine(args)
        with without_trl_engine(args, own_engine):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, **trl_arguments)
        if args.share_prompts:
            require_full_attention(self.accelerator.unwrap_model(self.model))
            if self.aux_loss_enabled or self._is_vlm:
                raise ConfigError("share_prompts=True takes no images and no router auxiliary loss: set it to false")
        self.task_description, self.run_config = task_description, dict(run_config or {})
        self.clock = PhaseClock()
        self.meter = StepMeter(self.accelerator)
        self._reduce = AcceleratorReduce(self.accelerator)
        self._rollout_step = self._rollout_number = -1
        self._parity_checked = False
        self._rewards: Tensor | None = None
        self._grad_norm = float("nan")
        self._rollout_controls = [c for c in args.control_list if c.scope == "rollout"]
        self._micro_controls = [c for c in args.control_list if c.scope == "micro_batch"]
        if args.stop is not None:
            add_stop_token(self, args.stop)
        if own_engine:
            attach_cpu_engine(self)
        if self.use_vllm:
            self.vllm_generation.sync_weights = self.clock.timed("sync_weights", self.vllm_generation.sync_weights)
        self.step_metrics: dict[str, float] = {}
        self.progress = use_own_progress_bar(self)
        self.run_callback = RunCallback(self)
        self.add_callback(self.run_callback)

    # ---------------------------------------------------------------------------------------------- rollouts

    def _generate(self, prompts: list[Any]) -> Any:
        with self.clock.phase("rollout"):
            return super()._generate(prompts)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.phase("verify"):
            rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)  # (B * ranks,), NaN: not scored
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.phase("old_logps"):  # what remains when generation and rewards are taken out
            batch = super()._generate_and_score_completions(inputs)
            self._rollout_step = self.state.global_step
            self._rollout_number = self._step // (self.args.steps_per_generation * self.num_iterations)
            self.run_callback.start_rollout(self._rollout_step)
            self.meter.start_rollout(self._rollout_step, bridge.take_rollout_metrics(self._metrics["train"]))
            bridge.number_sequences(batch, self.accelerator.process_index)
            self._set_rewards(batch)
            if self._rollout_controls or (self.use_vllm and not self._parity_checked):
                self._apply_rollout_controls(batch)
            sizes = bridge.count_trained(batch, self._reduce)
            self.meter.start_rollout(self._rollout_step, sizes)
        return batch

    def _set_rewards(self, batch: dict[str, Any]) -> None:
        assert self._rewards is not None
        rows = batch["completion_ids"].size(0)
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        batch[bridge.REWARD] = self._rewards[mine]
        groups = self._rewards.view(-1, self.num_generations)
        constant = groups.nan_to_num(-torch.inf).amax(dim=1) <= groups.nan_to_num(torch.inf).amin(dim=1)
        self.meter.start_rollout(self._rollout_step, {"reward/zero_variance_groups": float(constant.float().mean())})
        if self.args.advantage_estimator == "leave_one_out":
            group = torch.arange(self._rewards.numel(), device=self._rewards.device) // self.num_generations
            batch["advantages"] = leave_one_out(self._rewards, group)[mine]

    @torch.no_grad()
    def _apply_rollout_controls(self, batch: dict[str, Any]) -> None:
        """Coefficients of the whole rollout, from the statistics of the policy that made it."""
        needs = {name for control in self._rollout_controls for name in control.needs}
        old, entropy = batch.get("old_per_token_logps"), None
        if old is None or "entropy" in needs:
            arguments = bridge.forward_arguments(batch)
            old, entropy, _ = self._get_per_token_logps_and_entropies(
                self.model, **arguments, batch_size=self.args.per_device_train_batch_size, compute_entropy=True
            )
        tokens = self._tokens(batch, old, old, entropy)
        if self.use_vllm and not self._parity_checked:
            self._check_engine(tokens)
        clipped = self.args.surrogate_fn.clipped(self.args.surrogate_fn.ratio(tokens), tokens)
        coefficients, metrics = apply(self._rollout_controls, tokens, clipped, self._reduce)
        bridge.attach(batch, coefficients)
        self.meter.add_rollout(metrics)

    # ---------------------------------------------------------------------------------------------- loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's forward, or the one that computes a prompt once for all its completions."""
        if not self.args.share_prompts:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options
            )
        with self.accelerator.autocast():
            logps, entropy = token_statistics(model, input_ids, attention_mask, logits_to_keep, batch_size)
        return logps, entropy, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        arguments = bridge.forward_arguments(inputs)
        logps, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model, **arguments, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        tokens = self._tokens(inputs, logps, self._old_logps(inputs, logps), entropy)
        with torch.no_grad():
            ratio = self.args.surrogate_fn.ratio(tokens)
            clipped = self.args.surrogate_fn.clipped(ratio, tokens)
        micro, metrics = apply(self._micro_controls, tokens, clipped, LocalReduce())
        coefficients = bridge.attached(inputs).combine(micro).combine(bridge.engine_correction(inputs))
        if self.beta:
            reference = Coefficients(reference=torch.full_like(tokens.old_logps, self.beta))
            coefficients = coefficients.combine(reference)

        denominator, accumulation = self._denominator(inputs)
        loss = policy_loss(
            tokens,
            self.args.surrogate_fn,
            coefficients,
            mode=self.args.aggregation,
            denominator=denominator,
            corrected_kl=self.args.use_bias_correction_kl,
        )
        loss = loss / accumulation
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
            metrics = {**metrics, "policy/router_aux_loss": Mean.of(torch.as_tensor(aux_loss))}
        self.meter.add({**step_means(tokens, ratio, clipped, coefficients), **metrics}, loss)
        if tokens.rollout_logps is not None:
            self.meter.add_mismatch(measure_mismatch(tokens.old_logps, tokens.rollout_logps))
        self.run_callback.sample_tokens(inputs, tokens, coefficients)
        return loss

    def _tokens(self, batch: Mapping[str, Any], logps: Tensor, old: Tensor, entropy: Tensor | None) -> Tokens:
        return bridge.tokens_of(batch, logps, old, entropy, seed=self.args.seed, step=self._rollout_number)

    def _old_logps(self, inputs: Mapping[str, Any], logps: Tensor) -> Tensor:
        """Log-probs of the policy that made the rollout (B, T).

        On the first update that policy is the current one. A control sees exactly that: a recomputed log-prob differs
        by rounding, and the sign function in KL-Cov's penalty would turn noise of 1e-6 into a gradient.
        """
        old: Tensor | None = inputs.get("old_per_token_logps")
        first_update = self.state.global_step == self._rollout_step
        if old is None or (first_update and self.args.control_list):
            return logps.detach()
        return old

    def _denominator(self, inputs: Mapping[str, Any]) -> tuple[Tensor | float | None, float]:
        """(what the sum over a micro-batch is divided by, what is divided by afterwards).

        The counts span the rollout; they are scaled to one accumulation window as TRL does, and multiplied by the
        ranks
        over which the gradients are averaged. The order of the divisions is TRL's, so that results are equal exactly.
        """
        ranks, per_rollout = self.accelerator.num_processes, self.args.steps_per_generation
        accumulation = self.current_gradient_accumulation_steps
        match self.loss_type:
            case "dapo" | "cispo":
                return inputs[bridge.NUM_TOKENS].clamp(min=1.0) / ranks * accumulation / per_rollout, 1
            case "grpo":
                return inputs[bridge.NUM_SEQUENCES].clamp(min=1.0) / ranks / per_rollout, accumulation
            case "dr_grpo":
                return inputs["completion_ids"].size(0) * self.max_completion_length, accumulation
            case _:  # bnpo: the micro-batch's own tokens
                return None, accumulation

    # ---------------------------------------------------------------------------------------------- measurement

    def _check_engine(self, tokens: Tokens) -> None:
        """The start-up probe: engine and trainer must agree on the first completions before anything is trained."""
        assert tokens.rollout_logps is not None
        mismatch = measure_mismatch(tokens.old_logps, tokens.rollout_logps).reduced(self._reduce)
        check_parity(mismatch, engine_tolerance(self), self.state.global_step)
        self._parity_checked = True

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        self._grad_norm = float(grad_norm) if grad_norm is not None else float("nan")
        return grad_norm

    def close_step(self) -> None:
        """Reduce the step's measurements, once; runs before the optimizer moves the weights, so an alarm
        prevents it.
        """
        step = self.meter.close()
        self.step_metrics = {
            **step.metrics,
            "optim/grad_norm": self._grad_norm,
            "optim/learning_rate": self._get_learning_rate(),
        }
        self.progress.show(self.step_metrics)
        if step.mismatch is not None:
            check_parity(step.mismatch, engine_tolerance(self), self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            bridge.rename_metrics(self._metrics["train"])
        super().log(logs, start_time)

    # ---------------------------------------------------------------------------------------------- running

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's `train`; `resume_from_checkpoint` defaults to the config's, True or "latest" means the newest one.

        A run that had already taken its last step is not trained further: its weights are loaded.
        """
        requested = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = resolve_checkpoint(str(self.args.output_dir), requested)
        if self.is_world_process_zero() and not self.run_callback.is_open:
            check_run_dir(str(self.args.output_dir), resume=checkpoint is not None)
            self.run_callback.open(None if checkpoint is None else checkpoint_step(checkpoint))
        try:
            if checkpoint is not None and 0 < self.args.max_steps <= checkpoint_step(checkpoint):
                self._load_from_checkpoint(checkpoint)
                self.state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
                return self.run_callback.finish("finished")
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except BaseException as error:
            self.run_callback.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    def close(self) -> None:
        """Free the in-process engine; the trainer cannot sample afterwards."""
        if isinstance(getattr(self, "vllm_generation", None), CpuEngine):
            self.vllm_generation.close()
