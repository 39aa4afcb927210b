"""What controls, thermostat and TRL's fields demand of each other, refused in one line before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest

import rlvr
from rlvr.errors import ConfigError

BAND = {"lever": "kl_cov.coef", "low": 0.3, "high": 0.5, "lowest": 0.0, "highest": 10.0}
KL_COV = {"controls": ["kl_cov"], "num_iterations": 2}
BUDGET = {"name": "token_budget", "tokens": 64}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mapping": ({**KL_COV, "thermostat": "warm"}, "thermostat='warm': write a mapping with lever"),
    "no band": ({**KL_COV, "thermostat": {"lever": "kl_cov.coef"}}, "thermostat: set low, high, lowest, highest"),
    "unknown option": ({**KL_COV, "thermostat": {**BAND, "gian": 1.0}}, "'gian' is not known; did you mean gain"),
    "text": ({**KL_COV, "thermostat": {**BAND, "low": "0.3"}}, "thermostat: low='0.3' is text; write a number"),
    "empty band": ({**KL_COV, "thermostat": {**BAND, "low": 0.6}}, "thermostat: low=0.6, high=0.5"),
    "no such lever": ({**KL_COV, "thermostat": {**BAND, "lever": "kl_cov.beta"}}, "did you mean kl_cov.coef"),
    "outside its range": ({**KL_COV, "thermostat": {**BAND, "highest": 0.5}}, "kl_cov.coef=1.0 lies outside"),
    "range that the control refuses": (
        {"controls": ["steer"], "thermostat": {**BAND, "lever": "steer.min_weight", "highest": 1.0}},
        "thermostat lever=steer.min_weight: min_weight=0.0: must lie in (0, 1]",
    ),
    "counted already": (
        {"controls": [{"name": "clip_b", "scope": "micro_batch"}]},
        "controls clip_b scope=micro_batch takes tokens out after loss_type=dapo has counted them",
    ),
    "half a sequence": ({"probe_sequences": 1.5}, "probe_sequences=1.5: must be a whole number"),
    "callback states": (
        {"restore_callback_states_from_checkpoint": True},
        "restore_callback_states_from_checkpoint=True is refused",
    ),
    "two controllers": (
        {"controls": ["kl_cov", "adaptive_entropy"], "num_iterations": 2, "thermostat": BAND},
        "adaptive_entropy and thermostat both steer",
    ),
    "surrogate on policy": (
        {"thermostat": {**BAND, "lever": "surrogate.high"}},
        "thermostat lever=surrogate.high does nothing with 1 update(s)",
    ),
    "idle": ({"controls": [{"name": "entropy_bonus", "coef": 0.0}]}, "entropy_bonus does nothing with coef=0.0"),
    "two references": ({"controls": ["reference_kl"], "beta": 0.1}, "beta=0.1 and controls reference_kl"),
    "no engine": ({"controls": ["tis"]}, "controls tis reads the log-probs of a separate engine"),
    "two corrections": (
        {"controls": ["icepop"], "use_vllm": True, "vllm_importance_sampling_clip_max": 2.0},
        "vllm_importance_sampling_clip_max=2.0 and controls icepop would correct twice",
    ),
    "two lower bounds": (
        {"controls": ["tis"], "use_vllm": True, "vllm_importance_sampling_clip_min": 0.5},
        "vllm_importance_sampling_clip_min=0.5 and controls tis would correct twice",
    ),
    "two caps": (
        {"controls": ["tis"], "use_vllm": True, "vllm_importance_sampling_cap": 2.0},
        "vllm_importance_sampling_cap=2.0 and controls tis would correct twice",
    ),
    "engine as anchor": (
        {
            "surrogate": {"name": "dppo", "anchor": "rollout"},
            "use_vllm": True,
            "vllm_importance_sampling_mode": "token_mask",
        },
        "vllm_importance_sampling_mode=token_mask and surrogate anchor=rollout would correct twice",
    ),
    "two weights": ({"controls": ["tis", "icepop"], "use_vllm": True}, "controls tis and controls icepop each weigh"),
    "two bonuses": ({"controls": ["adaptive_entropy", "entropy_bonus"]}, "would add two bonuses"),
    "two denominators": ({"controls": [BUDGET], "loss_type": "grpo"}, "loss_type=grpo and controls token_budget"),
    "budget too large": (
        {"controls": [{**BUDGET, "tokens": 129}]},
        "tokens=129: a step has at most 128 (16 completions of max_completion_length=8)",
    ),
    "part of a step": (
        {"controls": [BUDGET], "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        "gradient_accumulation_steps=4 must divide steps_per_generation=2",
    ),
    "negative z-loss": ({"router_z_loss_coef": -1.0}, "router_z_loss_coef=-1.0"),
    "probe": ({"probe_every": 0}, "probe_every=0"),
}


def config(out: Path, **settings: Any) -> rlvr.GRPOConfig:
    defaults = {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8, "bf16": False}
    return rlvr.GRPOConfig(output_dir=str(out), report_to="none", **{**defaults, **settings})


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    settings, said = REFUSED[case]
    with pytest.raises(ConfigError) as raised:
        config(tmp_path, **settings)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_controls_take_the_place_of_trls_fields(tmp_path: Path) -> None:
    args = config(tmp_path, controls=[{"name": "reference_kl", "coef": 0.01}, BUDGET])
    assert args.beta == 0.01 and args.aggregation == "token_budget"
    args = config(tmp_path, controls=["tis"], use_vllm=True)
    assert not args.vllm_importance_sampling_correction
    args = config(tmp_path, controls=["off_policy_mask"], use_vllm=True)
    assert args.vllm_importance_sampling_correction  # it masks, and corrects nothing


def test_an_idle_control_is_accepted_where_a_thermostat_moves_it(tmp_path: Path) -> None:
    bonus = {"name": "entropy_bonus", "coef": 0.0}
    args = config(tmp_path, controls=[bonus], thermostat={**BAND, "lever": "entropy_bonus.coef"})
    assert args.thermostat_config is not None and args.thermostat_config.lever == "entropy_bonus.coef"
