"""What a plan takes into account of a run: keys of a recipe, by the same names and defaults, and the machines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rlvr.errors import ConfigError

# By the optimizer's name in transformers: numbers that it keeps for each weight, and their bytes; None: the weight's.
OPTIMIZERS: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_8bit": (2, 1),
    "adamw_bnb_8bit": (2, 1),
    "sgd": (0, None),
}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
MODES = ("colocate", "server")
# Fields of PPOConfig alone: a recipe with one of them has a critic.
OF_PPO = frozenset(
    {
        *("critic", "critic_lora", "critic_learning_rate", "critic_warmup_steps", "critic_lam", "gamma", "lam"),
        *("cliprange_value", "length_adaptive_alpha", "whiten_advantages", "kl_reward_coef", "vf_coef"),
    }
)
UNKNOWN_HERE = {
    "mole": "mixtures of LoRA experts are not planned: use_peft with lora_r = num_experts * r is near",
    "use_trl_head": "TRL's head, which holds logits, is not planned: unset it",
    "lora_modules_to_save": "modules that are trained whole beside adapters are not planned: unset it",
    "use_dora": "DoRA is not planned: unset it",
    "load_in_4bit": "quantized weights are not planned: unset it",
    "load_in_8bit": "quantized weights are not planned: unset it",
}
HELP = {
    "model_name_or_path": "hub name or directory; only its configuration is read",
    "gpus": "GPUs of all machines that train",
    "nodes": "machines",
    "gpu_memory": "GiB of one GPU",
    "prompt_length": "tokens of the longest prompt",
    "max_completion_length": "tokens of the longest completion",
    "per_device_train_batch_size": "sequences of a micro-batch",
    "steps_per_generation": "micro-batches of a rollout",
    "gradient_accumulation_steps": "micro-batches of an optimizer step",
    "generation_batch_size": "completions of a rollout",
    "gradient_checkpointing": "keep layers' inputs alone and compute the rest twice",
    "dtype": "of the weights: float32 or bfloat16",
    "bf16": "compute in bfloat16; default: yes",
    "optim": f"optimizer: {', '.join(OPTIMIZERS)}",
    "use_peft": "train LoRA adapters alone",
    "lora_r": "their rank",
    "lora_target_modules": "where they are, such as all-linear; default: PEFT's",
    "beta": "not 0: a reference model",
    "critic": "PPO: copy, shared or a model; GRPO: none",
    "critic_lora": "train adapters of the critic; default: with use_peft",
    "use_vllm": "rollouts by vLLM",
    "vllm_mode": "colocate: on the GPUs that train; server: on others",
    "vllm_gpu_memory_utilization": "share of each GPU for a colocated engine",
    "vllm_tensor_parallel_size": "GPUs of one engine",
    "vllm_enable_sleep_mode": "a colocated engine gives its memory back while training",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`HELP` has the meanings. Raises: ConfigError for a value out of range."""

    model_name_or_path: str = ""
    gpus: int = 1
    nodes: int = 1
    gpu_memory: float = 80.0
    prompt_length: int = 512
    max_completion_length: int = 512
    per_device_train_batch_size: int = 8
    steps_per_generation: int | None = None
    gradient_accumulation_steps: int = 1
    generation_batch_size: int | None = None
    gradient_checkpointing: bool = True
    dtype: str = "float32"
    bf16: bool | None = None
    optim: str = "adamw_torch_fused"
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: Any = None
    beta: float = 0.0
    critic: str = "none"
    critic_lora: bool | None = None
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise ConfigError("model is not set: give --model NAME_OR_DIR, or --config with a recipe that names one")
        for name in (
            *("gpus", "nodes", "prompt_length", "max_completion_length", "per_device_train_batch_size", "lora_r"),
            *("gradient_accumulation_steps", "vllm_tensor_parallel_size"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.gpus % self.nodes:
            raise ConfigError(f"gpus={self.gpus}: must be a multiple of nodes={self.nodes}, equally many on each")
        if not 0 < self.gpu_memory < math.inf:
            raise ConfigError(f"gpu_memory={self.gpu_memory}: must be positive, in GiB")
        if not 0 < self.vllm_gpu_memory_utilization < 1:
            raise ConfigError(f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization}: must be within (0, 1)")
        for name, known in {"dtype": tuple(DTYPES), "optim": tuple(OPTIMIZERS), "vllm_mode": MODES}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: a plan knows {', '.join(known)}")
        if self.gpus % self.vllm_tensor_parallel_size and self.colocated:
            raise ConfigError(
                f"vllm_tensor_parallel_size={self.vllm_tensor_parallel_size}: must divide gpus={self.gpus}"
            )

    @property
    def colocated(self) -> bool:
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def computes_in_bf16(self) -> bool:
        return self.bf16 is not False or self.dtype != "float32"

    @property
    def length(self) -> int:
        return self.prompt_length + self.max_completion_length

    @property
    def rollout_size(self) -> int:
        """Completions that one process generates at once."""
        if self.generation_batch_size:
            return max(1, self.generation_batch_size // self.gpus)
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)


def settings_from(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> Settings:
    """A recipe's keys, flags before them; keys that no plan needs are left out. Raises: ConfigError."""
    given = {**recipe, **flags}
    for name, why in UNKNOWN_HERE.items():
        if given.get(name) not in (None, False, "none"):
            raise ConfigError(f"{name}={given[name]!r}: {why}")
    if "critic" not in given and OF_PPO & given.keys():
        given["critic"] = "copy"
    if "reference_kl" in str(given.get("controls")):
        given["beta"] = 1.0
    types = {f.name: f.type for f in fields(Settings)}
    return Settings(**{name: _checked(name, given[name], types[name]) for name in given if name in types})


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A value of a YAML file in a field's type. Raises: ConfigError."""
    if kind is Any or (value is None and "None" in str(kind)):
        return value
    want = next(t for t in (bool, int, float, str) if kind in (t, t | None))
    if want is float and type(value) in (int, float, str):
        try:
            return float(value)  # YAML reads 1e-6 as text
        except ValueError:
            pass
    if type(value) is not want:
        raise ConfigError(
            f"{name}={value!r}: must be {'true or false' if want is bool else f'of type {want.__name__}'}"
        )
    return value
