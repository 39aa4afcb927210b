"""The controlled objective on TRL's batches: where coefficients are decided, and the loss that they enter."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rlvr.objective import policy_loss
from rlvr.rollout.parity import check_parity, measure_mismatch
from rlvr.surrogates import Clipped
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.distributed import AcceleratorReduce
from rlvr.trainers.dynamics import EntropyProbe
from rlvr.trainers.engine import engine_tolerance
from rlvr.trainers.forward import Statistics, mean_discriminator
from rlvr.trainers.guard import StepGuard
from rlvr.trainers.instruments import StepMeter, TokenDiagnostics, step_means
from rlvr.trainers.measuring import MeasuringTrainer
from rlvr.trainers.steering import coefficients_of, combined, metrics_of
from rlvr.types import Coefficients, LocalReduce, Mean, Metrics, Tokens


class ControlledTrainer(MeasuringTrainer):
    """TRL's trainer with our loss. Rollout-scope coefficients are computed once per generation batch over all ranks
    and ride along in it, so the loss does not depend on how it is cut into micro-batches.
    """

    args: PolicyConfig
    meter: StepMeter
    reduce: AcceleratorReduce
    _rollout_number: int
    _parity_checked: bool
    probe: EntropyProbe
    guard: StepGuard
    diagnostics: TokenDiagnostics

    # ---------------------------------------------------------------------------------------------- rollouts

    @torch.no_grad()
    def _apply_rollout_controls(self, batch: dict[str, Any]) -> None:
        """Coefficients of the whole rollout, from the statistics of the policy that made it."""
        measured = self._measure_rollout(batch)
        old, entropy, discriminator = measured["logps"], measured["entropy"], _discriminator(measured)
        tokens = self._tokens(batch, old, old, entropy, discriminator)
        if self.use_vllm and not self._parity_checked:
            self._check_engine(tokens)
        clipped = self.steering.surrogate.clipped(self.steering.surrogate.ratio(tokens), tokens)
        outcomes = self.steering.decide("rollout", tokens, clipped, self.reduce)
        bridge.attach(batch, coefficients_of(outcomes))
        self.meter.add_rollout(metrics_of(outcomes))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before and self.steering.scoped("optimizer_step"):
            self._apply_step_controls(self._buffered_inputs)
        if self.model.training:
            self.guard.watch(inputs)
        return inputs

    def _apply_step_controls(self, batches: list[dict[str, Any]]) -> None:
        """Coefficients of each optimizer step of the rollout, now that TRL has dealt its sequences out to them."""
        size = self.args.gradient_accumulation_steps
        for step in (batches[i : i + size] for i in range(0, len(batches), size)):
            tokens = bridge.step_tokens(step, seed=self.args.seed, step=self._rollout_number)
            none = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.sequence.device)
            for name, outcome in self.steering.decide(
                "optimizer_step", tokens, Clipped(none, none), self.reduce
            ).items():
                assert outcome.coefficients.keep is not None
                bridge.attach_step(step, name, outcome.coefficients.keep)
                self.meter.add_rollout(outcome.metrics)

    def _check_engine(self, tokens: Tokens) -> None:
        """The start-up probe: engine and trainer must agree on the first completions before anything is trained."""
        assert tokens.rollout_logps is not None
        mismatch = measure_mismatch(tokens.old_logps, tokens.rollout_logps).reduced(self.reduce)
        check_parity(mismatch, engine_tolerance(self), self.state.global_step)
        self._parity_checked = True

    # ---------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        statistics, aux_loss, skipped = self._current_statistics(model, inputs)
        logps, entropy, discriminator = statistics["logps"], statistics["entropy"], _discriminator(statistics)
        tokens = self._tokens(inputs, logps, self._old_logps(inputs, logps), entropy, discriminator)
        surrogate = self.steering.surrogate
        with torch.no_grad():
            ratio = surrogate.ratio(tokens)
            clipped = surrogate.clipped(ratio, tokens)
        micro = self.steering.decide("micro_batch", tokens, clipped, LocalReduce())
        by_control = bridge.attached(inputs) | coefficients_of(micro) | bridge.engine_correction(inputs)
        if self.args.beta and "reference_kl" not in by_control:
            by_control["reference_kl"] = Coefficients(reference=torch.full_like(tokens.old_logps, self.args.beta))
        coefficients = combined(by_control)

        denominator, accumulation = self._denominator(inputs)

        def objective(tokens: Tokens, coefficients: Coefficients) -> Tensor:
            mode, corrected = self.args.aggregation, self.args.use_bias_correction_kl
            loss = policy_loss(
                tokens, surrogate, coefficients, mode=mode, denominator=denominator, corrected_kl=corrected
            )
            return loss / accumulation

        loss = objective(tokens, coefficients)
        if self.probe.wants(self.state.global_step):
            self.probe.watch(self.state.global_step, inputs, tokens, objective, by_control)
        self.diagnostics.add(tokens, coefficients)
        metrics = {"policy/skipped": Mean.of(skipped), **metrics_of(micro)}
        for term, told in self._other_terms(inputs, statistics, skipped, aux_loss):
            loss, metrics = loss + term, {**metrics, **told}
        stale = skipped[tokens.sequence] if self._later_update else None
        self.meter.add({**step_means(tokens, ratio, clipped, coefficients, stale), **metrics}, loss)
        if tokens.rollout_logps is not None:
            self.meter.add_mismatch(measure_mismatch(tokens.old_logps, tokens.rollout_logps))
        self.run_callback.sample_tokens(inputs, tokens, by_control, objective)
        return loss

    def _other_terms(
        self, inputs: dict[str, Any], statistics: Statistics, skipped: Tensor, aux_loss: Tensor | None
    ) -> Iterator[tuple[Tensor, Metrics]]:
        """What is added to the policy's loss, as it enters a micro-batch's, with what there is to tell of it.

        skipped: which sequences (B,) were not passed.
        """
        if self.aux_loss_enabled:
            assert aux_loss is not None
            term = self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
            yield term, {"policy/router_aux_loss": Mean.of(aux_loss)}
        if self.routers is not None:
            passed = ~skipped if not skipped.all() else None  # of which rows the pass was
            before = None if passed is None else inputs.get(bridge.ROUTES)
            term, metrics = self.routers.take(None if before is None else before[passed])
            yield term / self.current_gradient_accumulation_steps, metrics
        if self._z_loss is not None:
            z_loss = self._z_loss.take()
            term = self._z_loss.coef * z_loss / self.current_gradient_accumulation_steps
            yield term, {"policy/router_z_loss": Mean.of(z_loss)}

    def _tokens(
        self,
        batch: Mapping[str, Any],
        logps: Tensor,
        old: Tensor,
        entropy: Tensor | None,
        discriminator: Tensor | None = None,
    ) -> Tokens:
        statistics = {"logps": logps, "old_logps": old, "entropy": entropy, "mean_discriminator": discriminator}
        return bridge.tokens_of(batch, statistics, seed=self.args.seed, step=self._rollout_number)

    def _old_logps(self, inputs: Mapping[str, Any], logps: Tensor) -> Tensor:
        """Log-probs of the policy that made the rollout (B, T).

        On the first update that policy is the current one. A control sees exactly that: a recomputed log-prob differs
        by rounding, and the sign function in KL-Cov's penalty would turn noise of 1e-6 into a gradient.
        """
        old: Tensor | None = inputs.get("old_per_token_logps")
        if old is None or (self.args.control_list and not self._later_update):
            return logps.detach()
        return old

    def _denominator(self, inputs: Mapping[str, Any]) -> tuple[Tensor | float | None, float]:
        """(what the sum over a micro-batch is divided by, what is divided by afterwards).

        The counts span the rollout; they are scaled to one accumulation window as TRL does, and multiplied by the
        ranks over which the gradients are averaged. The order of the divisions is TRL's, so that results are equal
        exactly.
        """
        ranks, per_rollout = self.accelerator.num_processes, self.args.steps_per_generation
        accumulation = self.current_gradient_accumulation_steps
        budget: Any = self.steering.controls.get("token_budget")
        if budget is not None:
            return budget.tokens / ranks, 1
        match self.loss_type:
            case "dapo" | "cispo":
                return self._share(inputs[bridge.NUM_TOKENS]), 1
            case "grpo":
                return inputs[bridge.NUM_SEQUENCES].clamp(min=1.0) / ranks / per_rollout, accumulation
            case "dr_grpo":
                return inputs["completion_ids"].size(0) * self.max_completion_length, accumulation
            case _:  # bnpo: the micro-batch's own tokens
                return None, accumulation

    def _share(self, count: Tensor) -> Tensor:
        """Of a rollout's tokens, what one accumulation window of one rank divides by."""
        ranks, per_rollout = self.accelerator.num_processes, self.args.steps_per_generation
        return count.clamp(min=1.0) / ranks * self.current_gradient_accumulation_steps / per_rollout

    @property
    def learning_rate(self) -> float:
        """Of the optimizer step at hand."""
        return float(self._get_learning_rate())


def _discriminator(statistics: Statistics) -> Tensor | None:
    """E_S (B, T), detached as everything is that controls read; None if nobody asked for its moments."""
    return mean_discriminator(statistics).detach() if "sum_p2_logp" in statistics else None
