"""What a run is, checked before any model is loaded: each class owns its own fields' validation."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import trl

from rlvr.alarm import EntropyAlarm
from rlvr.controls import Control, build_controls
from rlvr.errors import ConfigError
from rlvr.objective import Aggregation
from rlvr.rollout.cpu_engine import require_vllm
from rlvr.surrogates import Surrogate
from rlvr.thermostat import Thermostat
from rlvr.trainers.adapters import AdapterFields
from rlvr.trainers.alert_fields import AlertFields
from rlvr.trainers.batches import check_batches, check_resolved_batches
from rlvr.trainers.best_checkpoint import choose_best
from rlvr.trainers.control_choice import check_controls, check_updates, choose_alarm, choose_thermostat
from rlvr.trainers.launch_modes import check_deepspeed, check_launch, check_precision
from rlvr.trainers.sinks import check_report_to
from rlvr.trainers.surrogate_choice import choose_surrogate, parse_list, trl_default

# TRL's loss_type names a surrogate and an aggregation at once; these are the ones we keep, with their aggregation.
LOSS_TYPES: dict[str, Aggregation] = {
    "grpo": "seq_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "dr_grpo",
    "dapo": "token_mean",
    "cispo": "token_mean",
}
# Fields of TRL that would say the same thing twice, with what says it here.
SAID_BY_A_CONTROL = {
    "entropy_coef": "write controls: [{name: entropy_bonus, coef: ...}]",
    "use_adaptive_entropy": "write controls: [{name: adaptive_entropy, target: ...}]",
    "top_entropy_quantile": "write controls: [{name: high_entropy, fraction: ...}]",
    "off_policy_mask_threshold": "write controls: [{name: off_policy_mask, delta: ...}]",
}


@dataclass
class PolicyConfig(AlertFields, AdapterFields, trl.GRPOConfig):
    """TRL's GRPOConfig plus the entropy controls: what GRPOConfig and PPOConfig share. Every field is a key of a
    recipe's YAML and a command-line flag.

    Raises: ConfigError (a ValueError), one line naming field, value and fix, for anything that can be seen before a
    model is loaded.
    """

    smallest_group: ClassVar[int] = 2  # completions per prompt

    controls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Entropy controls: names, or mappings such as {name: kl_cov, fraction: 0.002}; JSON on the CLI."
        },
    )
    surrogate: str | None = field(
        default=None,
        metadata={
            "help": "ppo_clip, unclipped, gpg, sapo, cispo, dppo, gspo, gmpo, or e.g. {name: ppo_clip, high: 0.28}. "
            "Default: what the control's paper uses, else the PPO clip of epsilon, epsilon_high and delta (dual clip)."
        },
    )
    thermostat: str | None = field(
        default=None,
        metadata={
            "help": "Hold entropy in a band by moving a control's hyper-parameter: {lever: entropy_bonus.coef, "
            "low: 0.3, high: 0.5, lowest: 0.0, highest: 0.02}; JSON on the CLI."
        },
    )
    entropy_alarm: str | None = field(
        default=None,
        metadata={
            "help": "When entropy has collapsed or exploded, as {low: 0.01, high: 3.0, patience: 10, action: warn}; "
            "action: warn, stop, or thermostat, which waits for the alarm. Default: a warning below 0.01 nats."
        },
    )
    max_skipped_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps whose loss or gradient is not finite are skipped and their batches saved; stop "
            "after this many in a row."
        },
    )
    router_z_loss_coef: float = field(
        default=0.0,
        metadata={"help": "z-loss on the routers of a mixture of experts; load balancing is router_aux_loss_coef."},
    )
    mismatch_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Stop when engine and trainer log-probs differ by more than this, in nats, mean over a step's "
            "tokens. Default: by the dtypes of the two."
        },
    )
    pass_reward: float = field(
        default=1.0, metadata={"help": "The least reward of a completion that counts as correct in pass@k."}
    )
    diagnostics: bool = field(
        default=True,
        metadata={"help": "Record how covariance and entropy are spread over tokens and positions, every step."},
    )
    probe_sequences: int = field(
        default=0,
        metadata={
            "help": "Sequences per process on which each watched step's entropy change is predicted and measured, by "
            "two more forward passes over them; 0: none."
        },
    )
    probe_every: int = field(default=1, metadata={"help": "Watch every this many optimizer steps."})
    record_sequences: int = field(
        default=16,
        metadata={
            "help": "Sequences of each rollout written with their tokens to the run directory; 0: none, and no texts "
            "of prompts."
        },
    )
    stop: str | None = field(
        default=None,
        metadata={"help": "A single token that ends a completion, such as a newline after a few-shot answer."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "TRL's field, on by default here: with dropout (LoRA's default is 0.05) log-probs are random, so "
            "old and new policy differ without an update and the engine samples from another policy than is trained."
        },
    )
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": "Compute a prompt once for all its completions in a micro-batch. Pays when completions are short "
            "beside their prompt; needs sdpa attention. Log-probs agree with the plain forward up to rounding."
        },
    )
    skip_idle_sequences: bool = field(
        default=True,
        metadata={
            "help": "Do not train on sequences without any gradient, such as all-correct or all-wrong groups. They "
            "are measured by the pass that recomputes the rollout's log-probs, or else by one without gradient."
        },
    )
    use_trl_head: bool = field(
        default=False,
        metadata={
            "help": "Compute log-probs and entropy with TRL's head instead of rlvr_kernels: slower, without moments, "
            "but without controls every weight is stock TRL's, bit for bit."
        },
    )
    vllm_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of vLLM on a CPU, which a server must have: float32 or bfloat16. Default: what the trainer "
            "computes in: bfloat16 with bf16: true or bfloat16 weights, else float32."
        },
    )

    def __post_init__(self) -> None:
        self._check_fields()
        if self.num_generations is None or self.num_generations < self.smallest_group:
            least = f"at least {self.smallest_group} completion(s) per prompt"
            raise ConfigError(f"num_generations={self.num_generations}: must be {least}")
        check_batches(self)
        choose_best(self)
        self.control_list: tuple[Control, ...] = build_controls(parse_list("controls", self.controls))
        self.surrogate_fn: Surrogate = choose_surrogate(self)
        self.thermostat_config: Thermostat | None = choose_thermostat(self)
        self.alarm: EntropyAlarm = choose_alarm(self)
        check_controls(self)
        # Without an accelerator there is one place to run; transformers would refuse bf16 instead of saying so.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        self._resolve()
        check_resolved_batches(self)
        check_updates(self)

    @property
    def aggregation(self) -> Aggregation:
        if any(control.name == "token_budget" for control in self.control_list):
            return "token_budget"
        return LOSS_TYPES[self.loss_type]

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps taken on one batch of rollouts; below 1 when several rollouts make one step."""
        return self.num_iterations * self.steps_per_generation / self.gradient_accumulation_steps

    def _resolve(self) -> None:
        """TRL's own checks, which fill in the batch sizes."""
        super().__post_init__()
        check_precision(self)
        check_deepspeed(self)
        check_report_to(self)

    def check_data(self, columns: Sequence[str], rows: int) -> None:
        """Refuse training data with which TRL would train nothing. Raises: ConfigError."""
        if "prompt" not in columns:
            raise ConfigError(f"train_dataset has no column 'prompt'; it has {', '.join(columns)}")
        prompts = self.generation_batch_size // self.num_generations
        if rows < prompts:
            raise ConfigError(
                f"train_dataset has {rows} rows, a rollout takes {prompts} prompts: give more rows (train_size), or "
                "lower per_device_train_batch_size or steps_per_generation"
            )

    def _check_fields(self) -> None:
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length={self.max_completion_length}: must be at least 1 token")
        if self.max_steps == 0:
            raise ConfigError("max_steps=0: must be at least 1, or -1 to count epochs")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature={self.temperature}: must be positive; entropy is that of softmax(z / temperature)"
            )
        for name, why in SAID_BY_A_CONTROL.items():
            if getattr(self, name) != trl_default(name):
                raise ConfigError(f"{name}={getattr(self, name)} is refused: {why}")
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type={self.loss_type!r}: rlvr keeps {', '.join(LOSS_TYPES)} of TRL's loss types")
        check_launch(os.environ, torch.accelerator.is_available())
        if self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel=True is refused: it replaces the forward that measures entropy; unset it"
            )
        if self.use_trl_head and self.share_prompts:
            raise ConfigError("share_prompts=True needs the statistics of rlvr_kernels: set use_trl_head: false")
        for name, least in {
            "record_sequences": 0,
            "probe_sequences": 0,
            "probe_every": 1,
            "max_skipped_steps": 1,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value}: must be a whole number >= {least}")
        if not math.isfinite(self.pass_reward):
            raise ConfigError(f"pass_reward={self.pass_reward}: must be a finite reward")
        if self.restore_callback_states_from_checkpoint:
            raise ConfigError(
                "restore_callback_states_from_checkpoint=True is refused: rlvr restores its own state; unset it"
            )
        if self.vllm_dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"vllm_dtype={self.vllm_dtype!r}: must be float32 or bfloat16")
        _ = self.mole_config  # which checks itself
        self.check_alerts()
        if self.use_vllm:
            require_vllm()
        self._warn_of_truncated_sampling()
        if not 0 <= self.router_z_loss_coef < math.inf:
            raise ConfigError(f"router_z_loss_coef={self.router_z_loss_coef}: must be a number >= 0")
        if self.mismatch_tolerance is not None and not self.mismatch_tolerance > 0:
            raise ConfigError(f"mismatch_tolerance={self.mismatch_tolerance}: must be positive, in nats")

    def _warn_of_truncated_sampling(self) -> None:
        neutral = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                warnings.warn(
                    f"{name}={getattr(self, name)}: completions come from a changed distribution that entropy and "
                    "log-probs do not know; ratios are biased, and with vLLM the mismatch check may stop the run",
                    stacklevel=4,
                )


@dataclass
class GRPOConfig(PolicyConfig):
    """PolicyConfig, with what makes advantages of the rewards of a group."""

    advantage_estimator: str = field(
        default="group_relative", metadata={"help": "group_relative (with scale_rewards) or leave_one_out."}
    )

    @property
    def advantages_line(self) -> str:
        """Where advantages come from, for the header."""
        if self.advantage_estimator == "leave_one_out":
            return "leave-one-out"
        return f"group-relative, scale {self.scale_rewards}"

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.advantage_estimator not in ("group_relative", "leave_one_out"):
            raise ConfigError(
                f"advantage_estimator={self.advantage_estimator!r}: must be group_relative or leave_one_out"
            )
        if self.scale_rewards not in ("group", "batch", "none", True, False):
            raise ConfigError(f"scale_rewards={self.scale_rewards!r}: must be group, batch or none")
        if self.advantage_estimator == "leave_one_out" and self.scale_rewards == "batch":
            raise ConfigError(
                "scale_rewards=batch has no effect on advantage_estimator=leave_one_out: unset one of them"
            )
