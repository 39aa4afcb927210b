"""The mixture of LoRA experts as a method of PEFT, of type MOLE.

PEFT finds the layers, saves and loads adapters beside their base model, turns them off for the reference policy, and
is known to transformers and TRL. A custom module in LoRA's own type would not do: PEFT does not keep it in the
configuration, so that a saved adapter would load as something else, and LoRA's merging would apply to it.
Importing this file is enough for `PeftModel.from_pretrained` to read such adapters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import NoMatchingPeftModuleError, PeftType, register_peft_method
from torch import Tensor, nn

from rlvr.errors import ConfigError
from rlvr.mole.experts import Experts
from rlvr.mole.routers import Router, build_router, options


def _peft_type(name: str) -> PeftType:
    """A new member of PEFT's list of methods: it registers methods of others, but only under names of its list."""
    if name in PeftType._member_map_:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)  # from Python 3.12 on an attribute is looked for there alone
    return member


MOLE = _peft_type("MOLE")


@dataclass
class MoleConfig(PeftConfig):
    """A mixture of LoRA experts beside linear layers, each with a router of its own; defaults of DynMoLE's release.

    r: rank of each expert; that of a layer is num_experts * r in all.   lora_dropout: of the experts' input.
    lora_alpha: what experts add is scaled by lora_alpha / r.
    num_experts: a number, or one for each group of layers of equal size, first to last (MoLA: [2, 4, 6, 8]).
    router: a name or {name: ..., option: ...} of `rlvr.mole.routers.ROUTERS`.
    target_modules: names of layers, a pattern for the whole name, or "all-linear".   exclude_modules: likewise, not.
    modules_to_save: modules that are trained whole, and saved with the adapter.
    layers_to_transform: numbers of the layers that get experts; all by default.
    layers_pattern: the name of the list of layers in the model, where PEFT does not find it.
    Raises: ConfigError naming field, value and fix.
    """

    r: int = 24
    lora_alpha: float = 48
    lora_dropout: float = 0.05
    num_experts: int | list[int] = 6
    router: str | dict[str, Any] = "dynmole"
    target_modules: list[str] | str | None = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLE
        for name, value in (("r", self.r), *(("num_experts", number) for number in self.expert_counts)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: must be a whole number, at least 1")
        for name, limit, must_be in (("lora_alpha", math.inf, "> 0 and finite"), ("lora_dropout", 1, "in [0, 1)")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < limit or (value == 0 and name == "lora_alpha"):
                raise ConfigError(f"{name}={value!r}: must be a number {must_be}")
        names = self.target_modules
        listed = isinstance(names, list | tuple | set) and names and all(isinstance(name, str) for name in names)
        if not listed and not (isinstance(names, str) and names):
            raise ConfigError(f"target_modules={names!r}: must be names of layers, a pattern, or all-linear")
        router = build_router(self.router)
        fewest = min(self.expert_counts)
        if fewest < router.fewest:
            raise ConfigError(f"num_experts={self.num_experts!r}: {self.router!r} takes {router.fewest} at least")
        self.router = options(router)  # saved whole: defaults may change

    @property
    def expert_counts(self) -> Sequence[int]:
        """Experts of each group of layers."""
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        if not counts:
            raise ConfigError("num_experts=[]: give a number of experts, or one for each group of layers")
        return counts

    @property
    def built_router(self) -> Router:
        return build_router(self.router)


class MoleLinear(nn.Module, BaseTunerLayer):
    """A linear layer, frozen, and the experts beside it: base(x) + (alpha / r) sum_e w_e(x) B_e A_e x."""

    adapter_layer_names = ("mole_experts",)
    base_layer: nn.Linear
    mole_experts: nn.ModuleDict
    disable_adapters: bool
    active_adapters: list[str]
    merges = False  # an engine gets the base layer's weights, and the experts beside them

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mole_experts = nn.ModuleDict()

    def add(self, name: str, num_experts: int, config: MoleConfig, inference_mode: bool) -> None:
        """Put the experts of an adapter beside the layer."""
        base = self.base_layer
        self.mole_experts[name] = Experts(
            base.in_features,
            base.out_features,
            num_experts=num_experts,
            r=config.r,
            scaling=config.lora_alpha / config.r,
            router=config.built_router,
            dropout=config.lora_dropout,
        )
        tuner: BaseTunerLayer = self
        tuner._move_adapter_to_device_of_base_layer(name)
        tuner.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for experts in self.active_experts:
            result = result + experts(x).to(result.dtype)
        return result

    @property
    def active_experts(self) -> list[Experts]:
        """Those that are added to the layer's output: none while adapters are turned off."""
        names = [] if self.disable_adapters else self.active_adapters
        return [cast(Experts, self.mole_experts[name]) for name in names if name in self.mole_experts]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError("a mixture of LoRA experts does not merge: which experts act depends on the token")

    def unmerge(self) -> None:
        """Nothing was merged."""


class MoleModel(BaseTuner):
    """Puts `MoleLinear` where a MoleConfig says; used through `peft.get_peft_model`."""

    prefix = "mole_"
    tuner_layer_cls = MoleLinear
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            kind = type(model).__name__
            raise ConfigError(
                f"target_modules={config.target_modules!r}: no layer of {kind} has such a name"
            ) from error

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, which would leave out what does not fit, or tell of it in a hundred lines."""
        renamed: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        ours = {name: p for name, p in model.named_parameters() if cls.prefix in name}
        theirs = {name: x for name, x in renamed.items() if cls.prefix in name}
        mine = {name.removeprefix("base_model.model.") for name in ours if f".{adapter_name}." in name}
        given = {name.removeprefix("base_model.model.") for name in theirs}
        for lacks, of, lacking in (("model", "checkpoint", given - mine), ("checkpoint", "model", mine - given)):
            if lacking:
                raise ConfigError(
                    f"the {lacks} lacks {len(lacking)} of the {of}'s weights, first {min(lacking)}: the adapter is of "
                    "another architecture"
                )
        for name, x in theirs.items():
            p = ours.get(name, x)
            shape = tuple(getattr(p, "ds_shape", p.shape))
            if shape != tuple(x.shape):
                raise ConfigError(
                    f"{name} has shape {tuple(x.shape)} in the checkpoint, {shape} in the model: the adapter is of "
                    "another architecture"
                )
        return renamed

    def _create_and_replace(
        self,
        config: MoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        layer = target if isinstance(target, MoleLinear) else None
        if layer is None:
            if not isinstance(target, nn.Linear):
                kind = type(target).__name__
                raise ConfigError(f"target_modules names {current_key}, a {kind}: experts are for nn.Linear only")
            layer = MoleLinear(target)
        layer.add(adapter_name, self._count(config, current_key), config, inference_mode=config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _count(self, config: MoleConfig, key: str) -> int:
        """Experts of the layer of a module's name."""
        counts = config.expert_counts
        if len(counts) == 1:
            return counts[0]
        total = self.model.config.get_text_config().num_hidden_layers
        numbers = [int(part) for part in key.split(".") if part.isdecimal()]
        if not numbers or total % len(counts) or numbers[0] >= total:
            raise ConfigError(
                f"num_experts={config.num_experts}: {key} must lie in one of {total} layers, and their number be a "
                f"multiple of {len(counts)}; give one number for all"
            )
        return counts[numbers[0] * len(counts) // total]


if MOLE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="mole", config_cls=MoleConfig, model_cls=MoleModel)


def expert_layers(model: nn.Module) -> dict[str, Experts]:
    """The active experts of a model by the name of their linear layer in the base model; empty without any.

    Raises: ConfigError if several adapters are active.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MoleLinear) and (active := module.active_experts):
            if len(active) > 1:
                raise ConfigError(f"{name} has {len(active)} active adapters: choose one with set_adapter")
            found[name.removeprefix("base_model.model.")] = active[0]
    return found
