"""Which sequences are passed through the model, when, and what is computed of their tokens."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlvr.controls.base import Scope
from rlvr.mole.tracker import RouterTracker
from rlvr.objective import idle_sequences
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.forward import Statistics, completion_statistics
from rlvr.trainers.head import shards_parameters
from rlvr.trainers.heldout import HeldOutTrainer
from rlvr.trainers.router import RouterZLoss
from rlvr.trainers.steering import Steering, combined


class MeasuringTrainer(HeldOutTrainer):
    """TRL's trainer with statistics of tokens from `rlvr_kernels`, computed where somebody needs them."""

    args: PolicyConfig
    steering: Steering
    _rollout_step: int  # optimizer steps before this rollout
    _own_head: bool  # else TRL's computes log-probs and entropy
    _measured: Statistics | None  # of the rollout, by the policy that made it; each (B, T)
    _routes: Tensor | None  # which experts the rollout's sequences were sent to then, (B, K)
    _tool_mask: list[list[int]] | None  # of the rollout at hand, where there are tools: 0 for their output
    _z_loss: RouterZLoss | None
    routers: RouterTracker | None  # of a mixture of LoRA experts

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The passes that TRL asks for: the rollout's by the policy that made it and by the reference.

        The first one of a rollout is by the policy that made it; what its head knows is kept.
        """
        first = self._measured is None and not torch.is_grad_enabled()
        routes: Any = nullcontext([]) if self.routers is None or not first else self.routers.collected()
        with routes as loads:
            found, aux_loss = self._asked_pass(model, input_ids, attention_mask, logits_to_keep, batch_size, **options)
        if first:
            self._measured = found
            self._routes = torch.cat(loads) if loads and not self.args.share_prompts else None
        return found["logps"], found.get("entropy"), aux_loss

    def _asked_pass(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        **options: Any,
    ) -> tuple[Statistics, Tensor | None]:
        """By our head or by TRL's."""
        if self._own_head:
            trained = attention_mask[:, -logits_to_keep:].bool()
            if self._tool_mask is not None:
                trained = trained & bridge.padded_mask(self._tool_mask, trained)
            want = ("logps",) if model is self.ref_model or self._measured is not None else self._wanted("rollout")
            return self._pass(model, input_ids, attention_mask, trained, want, batch_size)
        options["compute_entropy"] = model is not self.ref_model
        logps, entropy, aux_loss = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, batch_size, **options
        )
        return {"logps": logps} if entropy is None else {"logps": logps, "entropy": entropy}, aux_loss

    @torch.no_grad()
    def _measure_rollout(self, batch: Mapping[str, Any]) -> Statistics:
        """Of the policy that made the rollout, by a pass where none has been made."""
        if self._measured is None:
            self._get_per_token_logps_and_entropies(
                self.model, **bridge.forward_arguments(batch), batch_size=self.args.per_device_train_batch_size
            )
        assert self._measured is not None
        return self._measured

    def _attach_measured(self, batch: dict[str, Any]) -> None:
        """Let what is known of the rollout's policy ride along in the batch."""
        if self._measured is not None:
            bridge.attach_measured(batch, self._measured)
            if self._routes is not None:
                batch[bridge.ROUTES] = self._routes

    def _wanted(self, scope: Scope) -> tuple[str, ...]:
        """What the head has to compute for the controls of a scope; moments only if one of them reads them."""
        moments = ("sum_p2", "sum_p2_logp") if "mean_discriminator" in self.steering.needs(scope) else ()
        return ("logps", "entropy", *moments)

    def _pass(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        trained: Tensor,
        want: Collection[str],
        batch_size: int | None = None,
    ) -> tuple[Statistics, Tensor | None]:
        """Statistics of the trained tokens, each (B, T), and the routers' loss where the run has one."""
        with self.accelerator.autocast():
            return completion_statistics(
                model,
                input_ids,
                attention_mask,
                trained,
                want,
                batch_size=batch_size,
                share_prompts=self.args.share_prompts,
                router_loss=self.aux_loss_enabled and torch.is_grad_enabled(),
                watch=None if self.routers is None else self.routers.expect,
            )

    def _batch_pass(
        self, model: Any, batch: Mapping[str, Any], want: Collection[str], batch_size: int | None = None
    ) -> tuple[Statistics, Tensor | None]:
        """`_pass` over TRL's batch."""
        arguments = bridge.forward_arguments(batch)
        ids, mask = arguments["input_ids"], arguments["attention_mask"]
        return self._pass(model, ids, mask, bridge.trained_mask(batch), want, batch_size)

    def _current_statistics(self, model: Any, batch: dict[str, Any]) -> tuple[Statistics, Tensor | None, Tensor]:
        """Of the policy that is trained, with gradient for the sequences that have one; the routers' loss; and which
        sequences (B,) were skipped.
        """
        idle = self._idle(batch)
        if not self._own_head:
            logps, entropy, aux_loss = self._get_per_token_logps_and_entropies(
                model, **bridge.forward_arguments(batch), compute_aux_loss=self.aux_loss_enabled
            )
            assert entropy is not None
            return {"logps": logps, "entropy": entropy}, aux_loss, idle
        want = self._wanted("micro_batch")
        if not idle.any():
            return *self._batch_pass(model, batch, want), idle
        active, rest = (~idle).nonzero().squeeze(1), idle.nonzero().squeeze(1)
        known = bridge.measured(batch, rest) or self.moments(bridge.take(batch, rest), want)
        if not len(active):
            return self._connected(model, batch, known), None, idle
        trained, aux_loss = self._batch_pass(model, bridge.take(batch, active), want)
        order = torch.cat([active, rest]).argsort()
        both = {name: torch.cat([x, known[name].to(x.dtype)])[order] for name, x in trained.items()}
        return both, aux_loss, idle

    def _connected(self, model: Any, batch: dict[str, Any], known: Statistics) -> Statistics:
        """What is known of a micro-batch, with a gradient of zeros through the shortest of its sequences: there has to
        be a graph, and other ranks may wait for a pass.
        """
        shortest = bridge.trained_mask(batch).sum(1).argmin().unsqueeze(0)
        passed, _ = self._batch_pass(model, bridge.take(batch, shortest), tuple(known))
        finite = {name: x.masked_fill(~x.isfinite(), 0.0) for name, x in passed.items()}
        return {name: known[name] + (x - x.detach()).sum() for name, x in finite.items()}

    @property
    def _may_skip(self) -> bool:
        """Whether sequences that are not pushed may be left out of the pass at hand; the same on all ranks."""
        routed = self.routers is not None and self.routers.router.penalizes
        routed = routed or self.aux_loss_enabled or self._z_loss is not None
        pushed = self.args.beta or routed or self.steering.surrogate.penalizes
        decided_later = self.steering.scoped("micro_batch")  # from statistics of all tokens
        steered = self.steering.observes and self._later_update  # by the entropy of this very policy
        return self.args.skip_idle_sequences and not (pushed or decided_later or steered)

    @property
    def _later_update(self) -> bool:
        """Whether the policy has been updated since it made the rollout."""
        return self.state.global_step != self._rollout_step

    def _idle(self, batch: dict[str, Any]) -> Tensor:
        """Which sequences (B,) of a micro-batch are not trained on, because exactly nothing would come of it."""
        mask = bridge.trained_mask(batch)
        none = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        if not self._own_head or not self._may_skip:
            return none
        if bridge.measured(batch, none) is None and shards_parameters(self):
            return none  # to measure them would be a pass that other ranks do not make
        sequence = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(mask)[mask]
        advantages = batch["advantages"].view(len(mask), -1).expand_as(mask)[mask]
        coefficients = combined(bridge.attached(batch) | bridge.engine_correction(batch))
        return idle_sequences(advantages, coefficients, sequence, len(mask))

    @torch.no_grad()
    def moments(self, batch: Mapping[str, Any], want: Collection[str]) -> Statistics:
        """Statistics (B, T) of the current policy, by a forward pass without gradient; names as in TokenStats."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            return self._batch_pass(model, batch, want, self.args.per_device_train_batch_size)[0]
        finally:
            model.train(training)
