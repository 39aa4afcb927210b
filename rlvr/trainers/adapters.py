"""The adapter of a run: LoRA and others by TRL's own fields, a mixture of LoRA experts by `mole`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rlvr.errors import ConfigError, unknown
from rlvr.mole.model import MoleConfig
from rlvr.trainers.surrogate_choice import parse


@dataclass
class AdapterFields:
    """A field of every configuration. Raises: ConfigError."""

    mole: str | None = field(
        default=None,
        metadata={
            "help": "Train a mixture of LoRA experts: {num_experts: 6, r: 24, router: dynmole, target_modules: ...}, "
            "fields of rlvr.mole.model.MoleConfig, or `default`; JSON on the CLI."
        },
    )

    @property
    def mole_config(self) -> MoleConfig | None:
        """What `mole` says."""
        spec = parse("mole", self.mole)
        if spec is None or spec == "none":
            return None
        given = {} if spec == "default" else spec
        if not isinstance(given, Mapping):
            raise ConfigError(f"mole={spec!r}: write `default`, or a mapping such as {{num_experts: 6, r: 24}}")
        known = {f.name for f in fields(MoleConfig)} - {f.name for f in fields(PeftConfig)}
        for name in given:
            if name not in known:
                raise unknown("mole option", str(name), known)
        return MoleConfig(**given, task_type="CAUSAL_LM")


def choose_adapter(args: AdapterFields, given: Any) -> Any:
    """The PeftConfig of a run, None to train all weights.

    given: as a trainer's argument.   Raises: ConfigError if `mole` is set beside it.
    """
    mole = args.mole_config
    if mole is not None and given is not None:
        raise ConfigError("mole and a PEFT configuration (use_peft) both say what is trained: remove one")
    return given if mole is None else mole


def policy_or_adapter(model_config: ModelConfig, args: Any) -> Any:
    """The model of a run as a trainer takes it: its name, or the loaded model where the name is of saved adapters,
    which are trained further.   args: with model_init_kwargs.   Raises: ConfigError for adapters upon adapters.
    """
    name = str(model_config.model_name_or_path)
    if not (Path(name) / "adapter_config.json").is_file():
        return name
    if args.mole_config is not None or model_config.use_peft:
        raise ConfigError(
            f"model_name_or_path={name!r} holds adapters, which are trained further: unset mole, use_peft"
        )
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(
        base, **{"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    )
    args.model_init_kwargs = None
    return PeftModel.from_pretrained(model, name, is_trainable=True)
