"""What a run is, checked before any model is loaded: `GRPOConfig` extends TRL's and owns its own fields'
validation.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
import trl

from rlvr.controls import Control, build, build_controls
from rlvr.errors import ConfigError
from rlvr.objective import Aggregation
from rlvr.rollout.cpu_engine import require_vllm
from rlvr.surrogates import SURROGATES, Cispo, Gspo, PpoClip, Surrogate

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
    "entropy_coef": "it changes the entropy behind the controls' back; rlvr has clip_cov and kl_cov under `controls`",
    "use_adaptive_entropy": "it moves a coefficient behind the controls' back; choose a control under `controls`",
    "top_entropy_quantile": "it masks tokens behind the controls' back; choose a control under `controls`",
    "off_policy_mask_threshold": "it masks sequences behind the controls' back; leave it unset",
}
# Fields of TRL that describe the default surrogate; an explicit `surrogate` carries its own.
SURROGATE_FIELDS = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")


@dataclass
class GRPOConfig(trl.GRPOConfig):
    """TRL's GRPOConfig plus the entropy controls. Every field is a key of a recipe's YAML and a command-line flag.

    Raises: ConfigError (a ValueError), one line naming field, value and fix, for anything that can be seen before a
    model is loaded.
    """

    controls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Entropy controls: names, or mappings such as {name: kl_cov, fraction: 0.002}; JSON on the CLI."
        },
    )
    surrogate: str | None = field(
        default=None,
        metadata={
            "help": "ppo_clip, unclipped, cispo or gspo, or a mapping such as {name: ppo_clip, high: 0.28}. Default: "
            "what the control's paper uses, else the PPO clip of epsilon, epsilon_high and delta (dual clip)."
        },
    )
    advantage_estimator: str = field(
        default="group_relative", metadata={"help": "group_relative (with scale_rewards) or leave_one_out."}
    )
    mismatch_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Stop when engine and trainer log-probs differ by more than this, in nats, mean over a step's "
            "tokens. Default: by the dtypes of the two."
        },
    )
    record_sequences: int = field(
        default=16,
        metadata={"help": "Sequences of each rollout written with their tokens to the run directory; 0: none."},
    )
    stop: str | None = field(
        default=None,
        metadata={"help": "A single token that ends a completion, such as a newline after a few-shot answer."},
    )
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": "Compute a prompt once for all its completions in a micro-batch. Pays when completions are short "
            "beside their prompt; needs sdpa attention. Log-probs agree with the plain forward up to rounding."
        },
    )
    vllm_dtype: str | None = field(
        default=None,
        metadata={"help": "dtype of the in-process CPU engine: float32 or bfloat16. Default: the model's."},
    )

    def __post_init__(self) -> None:
        self._check_trl_fields()
        self._check_batches()
        self.control_list: tuple[Control, ...] = build_controls(_parse_list("controls", self.controls))
        self.surrogate_fn: Surrogate = self._build_surrogate()
        # Without an accelerator there is one place to run; transformers would refuse bf16 instead of saying so.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self._check_updates()

    @property
    def aggregation(self) -> Aggregation:
        return LOSS_TYPES[self.loss_type]

    @property
    def updates_per_rollout(self) -> float:
        """Optimizer steps taken on one batch of rollouts; below 1 when several rollouts make one step."""
        return self.num_iterations * self.steps_per_generation / self.gradient_accumulation_steps

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

    def _check_trl_fields(self) -> None:
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length={self.max_completion_length}: must be at least 1 token")
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature={self.temperature}: must be positive; entropy is that of softmax(z / temperature)"
            )
        for name, why in SAID_BY_A_CONTROL.items():
            if getattr(self, name) != _default(name):
                raise ConfigError(f"{name}={getattr(self, name)} is refused: {why}")
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type={self.loss_type!r}: rlvr keeps {', '.join(LOSS_TYPES)} of TRL's loss types")
        if self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel=True is refused: it replaces the forward that measures entropy; unset it"
            )
        if self.advantage_estimator not in ("group_relative", "leave_one_out"):
            raise ConfigError(
                f"advantage_estimator={self.advantage_estimator!r}: must be group_relative or leave_one_out"
            )
        if self.advantage_estimator == "leave_one_out" and self.scale_rewards == "batch":
            raise ConfigError(
                "scale_rewards=batch has no effect on advantage_estimator=leave_one_out: unset one of them"
            )
        if self.record_sequences < 0:
            raise ConfigError(f"record_sequences={self.record_sequences}: must be >= 0")
        if self.vllm_dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"vllm_dtype={self.vllm_dtype!r}: must be float32 or bfloat16")
        if self.use_vllm:
            require_vllm()
            self._warn_of_truncated_sampling()
        if self.mismatch_tolerance is not None and not self.mismatch_tolerance > 0:
            raise ConfigError(f"mismatch_tolerance={self.mismatch_tolerance}: must be positive, in nats")

    def _warn_of_truncated_sampling(self) -> None:
        neutral = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}
        for name, values in neutral.items():
            if getattr(self, name) not in values:
                warnings.warn(
                    f"{name}={getattr(self, name)}: the engine samples from a changed distribution that the trainer's "
                    "log-probs do not know; importance ratios are biased and the mismatch check may stop the run",
                    stacklevel=4,
                )

    def _check_batches(self) -> None:
        """TRL's divisibility rules, said with the nearest valid values. Processes are counted as launchers
        announce them.
        """
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_iterations",
            "generation_batch_size",
            "steps_per_generation",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        if self.num_generations is None or self.num_generations < 2:
            raise ConfigError(
                f"num_generations={self.num_generations}: a group needs at least 2 completions per prompt"
            )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ConfigError("generation_batch_size and steps_per_generation say the same thing twice: set one")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        one_forward = self.per_device_train_batch_size * processes
        if self.generation_batch_size is not None:
            unit = math.lcm(one_forward, self.num_generations)
            if self.generation_batch_size % unit:
                raise ConfigError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of {unit} (whole "
                    f"micro-batches of {one_forward} on {processes} process(es) and whole groups of num_generations="
                    f"{self.num_generations}): nearest are {_nearest(self.generation_batch_size, unit)}"
                )
            return
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        total = one_forward * micro_batches
        if total % self.num_generations:
            unit = self.num_generations // math.gcd(self.num_generations, processes * micro_batches)
            raise ConfigError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} gives {total} completions per "
                f"rollout ({processes} process(es), {micro_batches} micro-batches), no whole groups of num_generations"
                f"={self.num_generations}: nearest are {_nearest(self.per_device_train_batch_size, unit)}"
            )

    def _check_updates(self) -> None:
        """After TRL has resolved the batch sizes."""
        updates, micro_batches = self.updates_per_rollout, self.num_iterations * self.steps_per_generation
        if micro_batches % self.gradient_accumulation_steps and self.gradient_accumulation_steps % micro_batches:
            raise ConfigError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} and micro-batches per rollout "
                f"{micro_batches} (steps_per_generation * num_iterations): one must divide the other"
            )
        for control in self.control_list:
            if control.off_policy_only and updates <= 1:
                raise ConfigError(
                    f"controls {control.name} does nothing with {updates:g} update(s) per rollout, since old and "
                    "current policy are equal: set num_iterations >= 2 or steps_per_generation >= "
                    f"{2 * self.gradient_accumulation_steps}"
                )

    def _build_surrogate(self) -> Surrogate:
        spec = _parse("surrogate", self.surrogate) if self.surrogate is not None else self._surrogate_of_controls()
        if spec is None:
            surrogate = self._surrogate_of_trl()
        else:
            surrogate = build("surrogate", SURROGATES, spec)
            name = spec if isinstance(spec, str) else spec["name"]
            for said in SURROGATE_FIELDS:
                if getattr(self, said) != _default(said):
                    raise ConfigError(
                        f"{said}={getattr(self, said)} and surrogate={name} say the same thing twice: put the bounds "
                        "into the surrogate, e.g. surrogate: {name: ppo_clip, low: 0.2, high: 0.28}"
                    )
            if self.loss_type == "cispo" and name != "cispo":
                raise ConfigError(f"loss_type=cispo and surrogate={name} name two surrogates: use loss_type: dapo")
        if isinstance(surrogate, Gspo) and self.loss_type != "grpo":
            raise ConfigError(
                f"loss_type={self.loss_type} would weight a sequence's ratio by its length: use loss_type: grpo"
            )
        return surrogate

    def _surrogate_of_controls(self) -> str | None:
        wanted = {c.name: c.surrogate for c in self.control_list if c.surrogate is not None}
        if len(set(wanted.values())) > 1:
            raise ConfigError(f"controls {', '.join(wanted)} come with different surrogates: set `surrogate` yourself")
        return next(iter(wanted.values()), None)

    def _surrogate_of_trl(self) -> Surrogate:
        low, high = self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
        sequence_level = self.importance_sampling_level == "sequence"
        if self.delta is not None and (sequence_level or self.loss_type == "cispo"):
            name = "loss_type=cispo" if self.loss_type == "cispo" else "importance_sampling_level=sequence"
            raise ConfigError(f"delta={self.delta} does nothing with {name}, which has no dual clip: unset it")
        if sequence_level and self.loss_type == "cispo":
            raise ConfigError("importance_sampling_level=sequence and loss_type=cispo name two surrogates: unset one")
        try:
            if self.loss_type == "cispo":
                if self.epsilon_high is None:
                    raise ConfigError("epsilon_high=None: with loss_type=cispo it caps the ratio itself, e.g. 5")
                return Cispo(ratio_high=high)
            if sequence_level:
                return Gspo(low=low, high=high)
            if self.importance_sampling_level != "token":
                raise ValueError("importance_sampling_level must be token or sequence")
            return PpoClip(low=low, high=high, dual_clip=self.delta)
        except ValueError as error:
            raise ConfigError(f"epsilon={low}, epsilon_high={high}, delta={self.delta}: {error}") from error


def _nearest(value: int, unit: int) -> str:
    """The multiples of unit around value, as text."""
    below = value // unit * unit
    return f"{below} and {below + unit}" if below else str(unit)


def _parse(field_name: str, spec: Any) -> Any:
    """A mapping from its JSON text; names and mappings pass through."""
    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        try:
            return dict(json.loads(spec))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{field_name}={spec!r} is not valid JSON: {error}") from error
    return spec


def _parse_list(field_name: str, specs: Any) -> list[Any]:
    """A list of names and mappings; one alone, as YAML and JSON easily give it, is a list of one."""
    alone = isinstance(specs, str | Mapping)
    return [_parse(field_name, spec) for spec in ([specs] if alone else specs or [])]


def _default(name: str) -> Any:
    found = next(f for f in fields(trl.GRPOConfig) if f.name == name)
    return found.default if found.default is not MISSING else None
