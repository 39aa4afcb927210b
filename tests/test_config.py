"""What GRPOConfig accepts and what it refuses in one line."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlvr import GRPOConfig
from rlvr.errors import ConfigError
from rlvr.surrogates import Cispo, Dppo, Gmpo, Gpg, Gspo, PpoClip, Sapo, Unclipped

Make = Callable[..., GRPOConfig]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """GRPOConfig on one process without an accelerator: 8 completions per micro-batch, groups of 8."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}

    def config(**settings: Any) -> GRPOConfig:
        return GRPOConfig(**{**fixed, "per_device_train_batch_size": 8, "num_generations": 8, **settings})

    return config


def refusal(make: Make, settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        make(**settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


OFF_POLICY = {"num_iterations": 2}
KL_COV = {"controls": ["kl_cov"], **OFF_POLICY}

# Settings, and what the one line must hold: field, value and fix.
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown control": ({"controls": ["kl_cof"]}, ("controls", "'kl_cof'", "did you mean kl_cov")),
    "control far from any name": ({"controls": ["zzz"]}, ("controls", "'zzz'", "clip_cov, clip_v")),
    "unknown option": (
        {"controls": [{"name": "clip_cov", "fractoin": 0.1}]},
        ("controls clip_cov", "'fractoin'", "did you mean fraction"),
    ),
    "text for a number": (
        {"controls": [{"name": "clip_cov", "fraction": "1e-3"}]},
        ("controls clip_cov", "fraction='1e-3'", "1.0e-3"),
    ),
    "nothing for a number": (
        {"controls": [{"name": "clip_cov", "low": None}]},
        ("controls clip_cov", "low=None", "write a number"),
    ),
    "true for a number": (
        {"controls": [{"name": "clip_cov", "fraction": True}]},
        ("controls clip_cov", "fraction=True", "write a number"),
    ),
    "text for true or false": (
        {"controls": [{"name": "clip_cov", "exclude_clipped": "no"}]},
        ("controls clip_cov", "exclude_clipped='no'", "true or false"),
    ),
    "number for a name": ({"controls": [{"name": "clip_cov", "scope": 1}]}, ("scope=1", "such as rollout")),
    "bad value": ({"controls": [{"name": "clip_cov", "fraction": 2}]}, ("clip_cov", "fraction=2", "[0, 1]")),
    "bad scope": ({"controls": [{"name": "clip_cov", "scope": "batch"}]}, ("scope='batch'", "'micro_batch'")),
    "control without a name": ({"controls": [{"fraction": 0.1}]}, ("controls=", "fraction", "give a name")),
    "control keyed by its name": ({"controls": {"kl_cov": {"coef": 2.0}}}, ("controls=", "kl_cov", "give a name")),
    "control that is no name": ({"controls": [3]}, ("controls=3", "give a name")),
    "control twice": ({"controls": ["clip_cov", "clip_cov"]}, ("controls", "clip_cov 2 times", "list it once")),
    "control that is no JSON": ({"controls": ["{name: clip_cov}"]}, ("controls='{name: clip_cov}'", "JSON")),
    "surrogate that is no JSON": ({"surrogate": "{"}, ("surrogate='{'", "JSON")),
    "kl_cov on-policy": (
        {"controls": ["kl_cov"], "gradient_accumulation_steps": 3},
        ("kl_cov", "1 update(s)", "num_iterations >= 2", "steps_per_generation >= 6"),
    ),
    "kl_cov with fewer than one update": (
        {"controls": ["kl_cov"], "gradient_accumulation_steps": 4, "steps_per_generation": 1},
        ("kl_cov", "0.25 update(s)", "steps_per_generation >= 8"),
    ),
    "kl_cov with a clip": ({**KL_COV, "epsilon": 0.3}, ("epsilon=0.3", "surrogate=unclipped", "put the bounds")),
    "kl_cov with cispo": ({**KL_COV, "loss_type": "cispo"}, ("loss_type=cispo", "unclipped", "loss_type: dapo")),
    "entropy_coef": ({"entropy_coef": 0.01}, ("entropy_coef=0.01", "controls")),
    "use_adaptive_entropy": ({"use_adaptive_entropy": True}, ("use_adaptive_entropy=True", "controls")),
    "top_entropy_quantile": ({"top_entropy_quantile": 0.2}, ("top_entropy_quantile=0.2", "controls")),
    "off_policy_mask_threshold": ({"off_policy_mask_threshold": 0.5}, ("off_policy_mask_threshold=0.5", "controls")),
    "use_liger_kernel": ({"use_liger_kernel": True}, ("use_liger_kernel=True", "unset it")),
    "no completion length": ({"max_completion_length": None}, ("max_completion_length=None", "at least 1")),
    "completion length 0": ({"max_completion_length": 0}, ("max_completion_length=0", "at least 1")),
    "temperature 0": ({"temperature": 0.0}, ("temperature=0.0", "positive")),
    "negative temperature": ({"temperature": -1.0}, ("temperature=-1.0", "positive")),
    "temperature nan": ({"temperature": math.nan}, ("temperature=nan", "positive")),
    "loss_type": ({"loss_type": "luspo"}, ("loss_type='luspo'", "grpo, bnpo, dr_grpo, dapo, cispo")),
    "advantage_estimator": ({"advantage_estimator": "gae"}, ("advantage_estimator='gae'", "leave_one_out")),
    "record_sequences": ({"record_sequences": -1}, ("record_sequences=-1", ">= 0")),
    "mismatch_tolerance": ({"mismatch_tolerance": 0.0}, ("mismatch_tolerance=0.0", "positive")),
    "vllm_dtype": ({"vllm_dtype": "fp8"}, ("vllm_dtype='fp8'", "float32 or bfloat16")),
    "unknown surrogate": ({"surrogate": "ppo_klip"}, ("surrogate", "'ppo_klip'", "ppo_clip")),
    "surrogate without a name": ({"surrogate": {"low": 0.1}}, ("surrogate=", "low", "give a name")),
    "surrogate option": ({"surrogate": {"name": "gspo", "hi": 1.0}}, ("surrogate gspo", "'hi'", "did you mean")),
    "surrogate value": ({"surrogate": {"name": "ppo_clip", "low": -1.0}}, ("surrogate ppo_clip", "low=-1.0", ">= 0")),
    "surrogate and epsilon_high": (
        {"surrogate": "ppo_clip", "epsilon_high": 0.28},
        ("epsilon_high=0.28", "surrogate=ppo_clip", "has no effect", "high: 0.28"),
    ),
    "surrogate and delta": (
        {"surrogate": "ppo_clip", "delta": 3.0},
        ("delta=3.0", "surrogate=ppo_clip", "has no effect"),
    ),
    "surrogate and loss_type": (
        {"surrogate": "ppo_clip", "loss_type": "cispo"},
        ("loss_type=cispo", "surrogate=ppo_clip", "loss_type: dapo"),
    ),
    "gspo over tokens": ({"surrogate": "gspo", "loss_type": "dapo"}, ("loss_type=dapo", "loss_type: grpo")),
    "gmpo over tokens": ({"surrogate": {"name": "gmpo", "low": 0.1}}, ("loss_type=dapo", "loss_type: grpo")),
    "gmpo over a constant": ({"surrogate": "gmpo", "loss_type": "dr_grpo"}, ("loss_type=dr_grpo", "loss_type: grpo")),
    "dppo without its engine": (
        {"surrogate": {"name": "dppo", "anchor": "rollout"}},
        ("surrogate", "anchor=rollout", "use_vllm: true"),
    ),
    "dppo with an unknown anchor": (
        {"surrogate": {"name": "dppo", "anchor": "engine"}},
        ("surrogate dppo", "anchor='engine'", "old or rollout"),
    ),
    "dppo with a number for an anchor": (
        {"surrogate": {"name": "dppo", "anchor": 0}},
        ("surrogate dppo", "anchor=0", "such as old"),
    ),
    "sapo without a temperature": (
        {"surrogate": {"name": "sapo", "tau_neg": 0}},
        ("surrogate sapo", "tau_neg=0", "positive"),
    ),
    "sapo and epsilon": ({"surrogate": "sapo", "epsilon": 0.1}, ("epsilon=0.1", "surrogate=sapo", "has no effect")),
    "sequence level over tokens": (
        {"importance_sampling_level": "sequence", "loss_type": "bnpo"},
        ("loss_type=bnpo", "loss_type: grpo"),
    ),
    "sequence level and cispo": (
        {"importance_sampling_level": "sequence", "loss_type": "cispo"},
        ("importance_sampling_level=sequence", "loss_type=cispo", "unset one"),
    ),
    "sequence level and delta": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "delta": 3.0},
        ("delta=3.0", "importance_sampling_level=sequence", "unset it"),
    ),
    "importance_sampling_level": (
        {"importance_sampling_level": "word"},
        ("importance_sampling_level", "token or sequence"),
    ),
    "delta below the clip": ({"delta": 1.1}, ("delta=1.1", "above 1 + high")),
    "delta and cispo": ({"delta": 3.0, "loss_type": "cispo"}, ("delta=3.0", "loss_type=cispo", "unset it")),
    "negative epsilon": ({"epsilon": -0.1}, ("epsilon=-0.1", ">= 0")),
    "one completion per prompt": ({"num_generations": 1}, ("num_generations=1", "at least 2")),
    "batch of 0": ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size=0", "at least 1")),
    "no accumulation": ({"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps=0", "at least 1")),
    "no iteration": ({"num_iterations": 0}, ("num_iterations=0", "at least 1")),
    "no micro-batch": ({"steps_per_generation": 0}, ("steps_per_generation=0", "at least 1")),
    "no completion": ({"generation_batch_size": 0}, ("generation_batch_size=0", "at least 1")),
    "rollout size twice": (
        {"generation_batch_size": 16, "steps_per_generation": 2},
        ("generation_batch_size", "steps_per_generation", "set one"),
    ),
    "part of a rollout": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
        ("gradient_accumulation_steps=4", "6", "one must divide the other"),
    ),
    "best by the loss": (
        {"metric_for_best_model": "eval_loss"},
        ("='eval_loss'", "with no loss", "use one of heldout/reward"),
    ),
    "best by TRL's reward": (
        {"metric_for_best_model": "reward"},
        ("metric_for_best_model='reward'", "heldout/reward"),
    ),
    "best by more samples than there are": (
        {"metric_for_best_model": "heldout/pass_at_16"},
        ("heldout/pass_at_16", "heldout/pass_at_8"),
    ),
    "worst as the best": (
        {"load_best_model_at_end": True, "greater_is_better": False},
        ("greater_is_better=False", "heldout/reward", "unset it"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses_in_one_line(case: str, make: Make) -> None:
    settings, parts = REFUSED[case]
    message = refusal(make, settings)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 5, "num_generations": 6, "steps_per_generation": 2},
        {"generation_batch_size": 20, "per_device_train_batch_size": 4},
        {"generation_batch_size": 4, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_nearest_batch_sizes_are_accepted(settings: dict[str, Any], make: Make) -> None:
    """What the refusal offers works."""
    message = refusal(make, settings)
    field, value = message.split("=")[0], settings[message.split("=")[0]]
    offered = [int(n) for n in re.findall(r"\d+", message.split("nearest are ")[1])]
    assert offered and f"{field}={value}" in message
    for n in offered:
        assert getattr(make(**{**settings, field: n}), field) == n
    assert len(offered) == 1 or offered[0] < value < offered[1]


def test_batch_sizes_count_processes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 process(es)" in refusal(make, {"per_device_train_batch_size": 4})
    assert "multiple of 24 " in refusal(make, {"generation_batch_size": 16})


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({}, 1),
        ({"num_iterations": 4}, 4),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 8, "num_iterations": 3}, 12),  # 3 * 8 / 2
        ({"generation_batch_size": 64, "gradient_accumulation_steps": 2}, 4),  # 64 / 8 / 2
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, 0.25),
        ({"gradient_accumulation_steps": 49, "steps_per_generation": 1}, 1 / 49),  # 1 / (1 / 49) is not 49 in floats
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "num_iterations": 2}, 1),
    ],
)
def test_updates_per_rollout(settings: dict[str, Any], updates: float, make: Make) -> None:
    assert make(**settings).updates_per_rollout == updates


@pytest.mark.parametrize(
    ("settings", "surrogate"),
    [
        ({}, PpoClip(low=0.2, high=0.2)),
        ({"epsilon": 0.1, "epsilon_high": 0.28, "delta": 3.0}, PpoClip(low=0.1, high=0.28, dual_clip=3.0)),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, Cispo(ratio_high=5.0)),
        (
            {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 3e-4, "epsilon_high": 4e-4},
            Gspo(low=3e-4, high=4e-4),
        ),
        ({"surrogate": {"name": "ppo_clip", "high": 0.28, "dual_clip": None}}, PpoClip(high=0.28)),
        ({"surrogate": '{"name": "cispo", "ratio_low": 0.8}'}, Cispo(ratio_low=0.8)),
        ({"surrogate": "gspo", "loss_type": "grpo"}, Gspo()),
        ({"surrogate": {"name": "gmpo", "high": 0.2}, "loss_type": "grpo"}, Gmpo(high=0.2)),
        ({"surrogate": {"name": "sapo", "tau_neg": 2}, "loss_type": "dr_grpo"}, Sapo(tau_neg=2)),
        ({"surrogate": "gpg"}, Gpg()),
        ({"surrogate": '{"name": "dppo", "anchor": "old", "kl_coef": 0.0}'}, Dppo(kl_coef=0.0)),
        ({"controls": ["clip_cov"]}, PpoClip()),
        (KL_COV, Unclipped()),
        ({"controls": ["clip_cov", "kl_cov"], **OFF_POLICY}, Unclipped()),
        ({**KL_COV, "surrogate": "ppo_clip"}, PpoClip()),
    ],
    ids=str,
)
def test_surrogate_of_the_settings(settings: dict[str, Any], surrogate: Any, make: Make) -> None:
    assert make(**settings).surrogate_fn == surrogate


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [("grpo", "seq_mean_token_mean"), ("bnpo", "token_mean"), ("dr_grpo", "dr_grpo"), ("dapo", "token_mean")],
)
def test_aggregation_of_the_loss_type(loss_type: str, aggregation: str, make: Make) -> None:
    assert make(loss_type=loss_type).aggregation == aggregation


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def test_best_checkpoint_is_by_default_that_of_the_largest_heldout_reward(make: Make) -> None:
    for settings in (BEST, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}):
        assert make(**settings).metric_for_best_model == "heldout/reward"
        assert make(**settings).greater_is_better is True
    assert make().metric_for_best_model is None


@pytest.mark.parametrize("name", ["heldout/pass_at_4", "eval_heldout/pass_at_8", "eval_sums_heldout/reward"])
def test_best_checkpoint_may_be_by_what_an_evaluation_measures(name: str, make: Make) -> None:
    assert make(**BEST, metric_for_best_model=name).metric_for_best_model == name
