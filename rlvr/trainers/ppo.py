"""PPO: the advantage of a token is what its completion earned beyond what a critic expected."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlvr.advantages import at_last_token, gae, length_adaptive_lam, whiten
from rlvr.controls.base import Scope
from rlvr.errors import ConfigError
from rlvr.objective import value_loss
from rlvr.trainers import trl_bridge as bridge
from rlvr.trainers.critic import FOLDER, OwnCritic, SharedCritic
from rlvr.trainers.critic_model import HUB, adapted, check_critic, copy_critic, load_critic, with_float32_head
from rlvr.trainers.forward import VALUE, Statistics
from rlvr.trainers.head import shards_parameters
from rlvr.trainers.header import describe, rounding_warning
from rlvr.trainers.instruments import global_mean, value_means
from rlvr.trainers.policy import PolicyTrainer
from rlvr.trainers.ppo_config import OWN_COPY, SHARED, PPOConfig
from rlvr.types import Mean, Metrics


class PPOTrainer(PolicyTrainer):
    """PPO with a critic under entropy controls. GRPOTrainer's arguments, with `args` a `rlvr.PPOConfig`.

    Everything but the source of the advantages is GRPOTrainer's: controls, surrogates, thermostat, engines, records.
    The critic is saved in the folder `critic` of every checkpoint. Metrics: critic/*, advantage/*.
    Raises: ConfigError for what can be seen before a model is loaded, such as a critic with another tokenizer.
    Ref: Schulman et al. 2017, arXiv 1707.06347; VC-PPO, arXiv 2503.01491; VAPO, arXiv 2504.05118.
    """

    config_class = PPOConfig
    args: PPOConfig
    # Of the model card.
    _name, _tag_names = "PPO", ["rlvr", "ppo"]
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}  # noqa: RUF012
    critic: OwnCritic | SharedCritic
    _finite = PolicyTrainer._finite | {"critic/loss", "critic/grad_norm"}

    def _construct(self, model: Any, reward_funcs: Any, args: Any, *others: Any, **trl_arguments: Any) -> None:
        self._check_critic(model, args, trl_arguments)
        by_name, peft_config = isinstance(model, str), trl_arguments.get("peft_config")
        critic = copy_critic(model) if args.critic == OWN_COPY and not by_name else None  # before adapters are put in
        with _reference_policy(args):
            super()._construct(model, reward_funcs, args, *others, **trl_arguments)
        if self._is_vlm:
            raise ConfigError("PPO takes no images: use a text model")
        if args.critic == SHARED:
            return
        if critic is None:
            critic = self._load_critic(model, trl_arguments.get("quantization_config"))
        if not self.is_deepspeed_enabled:  # it has float32 copies, and wants one type of weights
            critic = with_float32_head(critic)
        if args.critic_lora is not False and peft_config is not None:
            uniform = shards_parameters(self) and not getattr(critic, "is_quantized", False)
            critic = adapted(critic, peft_config, autocast_adapter_dtype=not uniform)
        self.critic = OwnCritic(critic, self)

    @staticmethod
    def _check_critic(model: Any, args: PPOConfig, options: Mapping[str, Any]) -> None:
        if args.critic_lora and options.get("peft_config") is None:
            raise ConfigError("critic_lora=True takes the policy's LoRA settings, which has none: set use_peft: true")
        if args.critic in (OWN_COPY, SHARED):
            return
        tokenizer = options.get("processing_class")
        if tokenizer is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            given = args.model_init_kwargs or {}
            hub = {"trust_remote_code": args.trust_remote_code, **{key: given[key] for key in HUB if key in given}}
            tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        check_critic(args.critic, tokenizer)

    def _load_critic(self, model: str, quantization: Any) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        alike = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
        if self.args.critic != OWN_COPY:
            return load_critic(self.args.critic, **alike)
        given = {**(self.args.model_init_kwargs or {})}
        for name in (*alike, "quantization_config", "device_map"):
            given.pop(name, None)
        hub = {key: given.pop(key) for key in HUB if key in given}
        quantized = {} if quantization is None else {"quantization_config": quantization}
        return load_critic(model, given, **alike, **quantized, **hub)

    def _value_head(self, policy: Any) -> Callable[[Tensor], Tensor] | None:
        if self.args.critic != SHARED:
            return None
        self.critic = SharedCritic(policy.config.get_text_config().hidden_size, self)
        return self.critic.head

    # ---------------------------------------------------------------------------------------------- rollouts

    def _wanted(self, scope: Scope) -> tuple[str, ...]:
        return (*super()._wanted(scope), VALUE) if self.args.critic == SHARED else super()._wanted(scope)

    @torch.no_grad()
    def _set_advantages(self, batch: dict[str, Any]) -> None:
        """GAE over the completion's own tokens. What could not be scored teaches nothing: its advantages are 0 and it
        enters no mean.
        """
        args, mask = self.args, bridge.valued_mask(batch)
        values = self._rollout_values(batch)
        rewards = at_last_token(torch.where(batch[bridge.REWARD].isnan(), 0.0, batch[bridge.REWARD]), mask)
        told: dict[str, float] = {}
        if args.kl_reward_coef:
            apart = self._measure_rollout(batch)["logps"] - batch["ref_per_token_logps"]
            rewards = rewards - args.kl_reward_coef * apart
            told["critic/kl_penalty"] = global_mean(apart[mask], self.reduce)
        alpha = args.length_adaptive_alpha
        lam = args.lam if alpha is None else length_adaptive_lam(mask, alpha)
        critic_lam = args.lam if args.critic_lam is None else args.critic_lam
        advantages, _ = gae(rewards, values, mask, gamma=args.gamma, lam=lam)
        _, returns = gae(rewards, values, mask, gamma=args.gamma, lam=critic_lam)
        earned = returns if critic_lam == 1 else gae(rewards, values, mask, gamma=args.gamma, lam=1.0)[1]
        told |= value_means(values[mask], earned[mask], advantages[mask], self.reduce)
        self.meter.start_rollout(self._rollout_step, told)
        batch["advantages"] = whiten(advantages, mask, reduce=self.reduce) if args.whiten_advantages else advantages
        bridge.attach_values(batch, values, returns, self.reduce)
        bridge.tell_advantages(self._logs, self.reduce.gather(advantages.sum(1) / mask.sum(1).clamp(min=1)))

    def _rollout_values(self, batch: dict[str, Any]) -> Tensor:
        if isinstance(self.critic, SharedCritic):
            return self._measure_rollout(batch)[VALUE].float()
        with self.clock.phase("critic"):
            return self.critic.values(batch, self.args.per_device_train_batch_size)

    # ---------------------------------------------------------------------------------------------- loss

    @property
    def _warming_up(self) -> bool:
        return self.state.global_step < self.args.critic_warmup_steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; during the critic's warm-up the policy is left out: without gradients its optimizer does nothing."""
        if not self._warming_up:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        loss = self._learn_values(self._prepare_inputs(inputs))
        self._step += 1
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if isinstance(self.critic, OwnCritic):
            self._learn_values(inputs)  # its graph is gone when the policy's is made
        return super()._compute_loss(model, inputs)

    def _learn_values(self, inputs: dict[str, Any]) -> Tensor:
        """One micro-batch; returns the loss."""
        assert isinstance(self.critic, OwnCritic)
        losses: list[Tensor] = []

        def loss_of(values: Tensor) -> Tensor:
            loss, metrics = self._value_loss(inputs, values)
            self.meter.add(metrics)
            losses.append(loss.detach())
            return loss

        with self.clock.phase("critic"):
            self.critic.learn(inputs, loss_of)
        return losses[0]

    def _value_loss(self, inputs: dict[str, Any], values: Tensor) -> tuple[Tensor, Metrics]:
        """Mean over the rollout's valued tokens, as it enters a micro-batch. values: (B, T)."""
        mask = bridge.valued_mask(inputs)
        old, returns = bridge.values_of(inputs)
        clip = self.args.cliprange_value or None
        each = value_loss(values[mask], old[mask], returns[mask], cliprange=clip)
        loss = each.loss.sum() / self._share(inputs[bridge.NUM_VALUED])
        return loss, {"critic/loss": Mean.of(each.loss), "critic/clipped": Mean.of(each.clipped)}

    def _other_terms(
        self, inputs: dict[str, Any], statistics: Statistics, skipped: Tensor, aux_loss: Tensor | None
    ) -> Iterator[tuple[Tensor, Metrics]]:
        yield from super()._other_terms(inputs, statistics, skipped, aux_loss)
        if VALUE in statistics:
            assert self.args.vf_coef is not None
            loss, metrics = self._value_loss(inputs, statistics[VALUE])
            yield self.args.vf_coef * loss, metrics

    @property
    def _may_skip(self) -> bool:
        return self.args.critic != SHARED and super()._may_skip

    def close_step(self) -> None:
        super().close_step()
        if self._warming_up:
            for name in ("optim/grad_norm", "optim/learning_rate"):  # of the policy, which does not step
                self.step_metrics.pop(name, None)
        self.step_metrics |= self.critic.step(skip=self._skips)

    def _other_gradients(self) -> dict[str, float]:
        return {"critic/grad_norm": self.critic.clip()}

    # ---------------------------------------------------------------------------------------------- running

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The policy's schedule begins when its training does."""
        waits = self.args.critic_warmup_steps
        if waits >= num_training_steps:
            raise ConfigError(f"critic_warmup_steps={waits} leaves none of {num_training_steps} steps to the policy")
        scheduler = super().create_scheduler(num_training_steps - waits, optimizer)
        if waits:
            scheduler.lr_lambdas = [partial(_delayed, rate, waits) for rate in scheduler.lr_lambdas]
        return scheduler

    def start(self) -> None:
        super().start()
        self.critic.prepare(self.state.max_steps)
        if self._checkpoint is not None:
            self.critic.resume(f"{self._checkpoint}/{FOLDER}")

    def header_rows(self) -> list[tuple[str, str]]:
        args = self.args
        what = f"a value head on the policy's backbone, weight {args.vf_coef}"
        if isinstance(self.critic, OwnCritic):
            what = describe(self.critic.module, args)
        alone = f", trained alone for {args.critic_warmup_steps} steps" if args.critic_warmup_steps else ""
        rows = [("critic", f"{what}, learning rate {args.critic_learning_rate:g}{alone}")]
        if args.kl_reward_coef:
            rows.append(("reward KL", f"coefficient {args.kl_reward_coef:g}"))
        if isinstance(self.critic, OwnCritic) and not self.is_deepspeed_enabled:
            rows += rounding_warning(self.critic.module, "critic_learning_rate", args.critic_learning_rate)
        return rows

    def _check_checkpoint(self, checkpoint: str) -> None:
        super()._check_checkpoint(checkpoint)
        if not Path(checkpoint, FOLDER).is_dir():
            raise ConfigError(f"resume_from_checkpoint={checkpoint!r} holds no critic: it is of a run without one")
        if not self.critic.saved(f"{checkpoint}/{FOLDER}"):
            raise ConfigError(
                f"resume_from_checkpoint={checkpoint!r} holds another critic than that of critic={self.args.critic}, "
                f"critic_lora={self.args.critic_lora}: resume with the run's own settings"
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.critic.load(f"{self.state.best_model_checkpoint}/{FOLDER}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as ever, and the critic in the folder `critic` beside it."""
        super().save_model(output_dir, _internal_call)
        self.critic.save(f"{output_dir or self.args.output_dir}/{FOLDER}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.critic.save_state(f"{output_dir}/{FOLDER}")


def _delayed(rate: Callable[[int], float], waits: int, step: int) -> float:
    return rate(max(0, step - waits))


@contextmanager
def _reference_policy(args: PPOConfig) -> Iterator[None]:
    """Let TRL keep a reference policy and its log-probs for the rewards, without a term in the loss."""
    beta = args.beta
    args.beta = beta or args.kl_reward_coef
    try:
        yield
    finally:
        args.beta = beta
