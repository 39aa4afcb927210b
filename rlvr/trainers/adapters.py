"""The adapter of a run: LoRA and others by TRL's own fields, a mixture of LoRA experts by `mole`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig
from trl import ModelConfig, get_peft_config

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


def choose_adapter(args: AdapterFields, model_config: ModelConfig) -> Any:
    """The run's PeftConfig, None to train all weights. Raises: ConfigError if there are two."""
    mole = args.mole_config
    if mole is None:
        return get_peft_config(model_config)
    if model_config.use_peft:
        raise ConfigError("use_peft=True and mole both say what is trained: remove one")
    return mole
