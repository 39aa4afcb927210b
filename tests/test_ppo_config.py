"""What PPOConfig accepts, what it refuses in one line, and its fields as keys and flags."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from rlvr import GRPOConfig, PPOConfig
from rlvr.errors import ConfigError
from rlvr.trainers.config import PolicyConfig
from rlvr.trainers.launch import parse_arguments

Make = Callable[..., PPOConfig]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """PPOConfig on one process without an accelerator: 8 completions of as many prompts, one update on them."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}

    def config(**settings: Any) -> PPOConfig:
        return PPOConfig(**{**fixed, "per_device_train_batch_size": 8, **settings})

    return config


SHARED = {"critic": "shared"}
NUMBERS = {
    **dict.fromkeys(("gamma", "lam"), ((-0.1, 1.1, math.nan, None, "0.95"), "in [0, 1]")),
    "critic_lam": ((-0.1, 2, math.nan, "1"), "in [0, 1]"),
    "length_adaptive_alpha": ((0, -1.0, math.inf, math.nan, "0.05"), "a number > 0"),
    "kl_reward_coef": ((-0.1, math.inf, math.nan, None, "0"), "a number >= 0"),
    "cliprange_value": ((-0.1, math.inf, math.nan, "0.5"), "a number >= 0"),
    "critic_learning_rate": ((0, -1e-5, math.inf, math.nan, None, "1e-5"), "a number > 0"),
}
# Settings, and what the one line must hold: field, value and fix.
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    f"{name}={value!r}": ({name: value}, (f"{name}={value!r}", fix))
    for name, (values, fix) in NUMBERS.items()
    for value in values
} | {
    "vf_coef -1": ({**SHARED, "vf_coef": -1}, ("vf_coef=-1", "a number >= 0")),
    "vf_coef nan": ({**SHARED, "vf_coef": math.nan}, ("vf_coef=nan", "a number >= 0")),
    "vf_coef of an own critic": ({"vf_coef": 0.1}, ("vf_coef=0.1", "critic_learning_rate", "critic: shared")),
    "lambda twice": ({"length_adaptive_alpha": 0.05, "lam": 0.95}, ("lam=0.95", "alpha=0.05", "unset one")),
    "critic without a name": ({"critic": None}, ("critic=None", "copy, shared")),
    "warm-up of a shared critic": (
        {**SHARED, "critic_warmup_steps": 2},
        ("critic_warmup_steps=2", "critic=shared", "use critic: copy, or 0"),
    ),
    "adapters of a shared critic": ({**SHARED, "critic_lora": False}, ("critic_lora=False", "unset it")),
    "shared critic on TRL's head": ({**SHARED, "use_trl_head": True}, ("critic=shared", "use_trl_head: false")),
    "warm-up of part of a rollout": (
        {"critic_warmup_steps": 3, "num_iterations": 2},
        ("critic_warmup_steps=3", "2 optimizer step(s)", "a multiple"),
    ),
    "warm-up of part of its minibatches": (
        {"critic_warmup_steps": 6, "steps_per_generation": 4},
        ("critic_warmup_steps=6", "4 optimizer step(s)", "a multiple"),
    ),
    "negative warm-up": ({"critic_warmup_steps": -1}, ("critic_warmup_steps=-1",)),
    "half a warm-up": ({"critic_warmup_steps": 0.5}, ("critic_warmup_steps=0.5",)),
    "nothing but warm-up": (
        {"critic_warmup_steps": 10, "max_steps": 10},
        ("critic_warmup_steps=10", "max_steps=10", "to the policy"),
    ),
    "scale of groups": ({"scale_rewards": "none"}, ("scale_rewards=none", "critic", "unset it")),
    "aggregation of groups": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        ("multi_objective_aggregation=normalize_then_sum", "unset it"),
    ),
    **{
        f"{kind} schedule": ({"lr_scheduler_type": kind}, (f"lr_scheduler_type={kind}", "choose another"))
        for kind in ("reduce_lr_on_plateau", "greedy")
    },
    "fp16": ({"fp16": True}, ("fp16=True", "use bf16")),
    "one completion in all": ({"per_device_train_batch_size": 1}, ("per_device_train_batch_size=1", "at least 2")),
    "no completion": ({"num_generations": 0}, ("num_generations=0", "at least 1")),
    "part of a group": ({"num_generations": 3}, ("num_generations=3", "nearest are 6 and 9")),
    "part of a minibatch": ({"generation_batch_size": 12}, ("generation_batch_size=12", "nearest are 8 and 16")),
    "part of an update": (
        {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
        ("gradient_accumulation_steps=4", "6", "one must divide the other"),
    ),
    "control that does nothing": ({"controls": ["kl_cov"]}, ("kl_cov", "1 update(s)", "num_iterations >= 2")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses_in_one_line(case: str, make: Make) -> None:
    settings, parts = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        make(**settings)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_critic_sharded_by_fsdp_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"critic is not sharded by FSDP: use DeepSpeed \(recipes/accelerate/zero2"):
        make()


def test_a_warm_up_as_long_as_the_stages_is_refused_with_the_data(make: Make) -> None:
    config = make(critic_warmup_steps=4)
    config.max_steps = 4  # as stages set it
    with pytest.raises(ConfigError, match=r"critic_warmup_steps=4 leaves none of max_steps=4 to the policy"):
        config.check_data(["prompt"], 100)


# ------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize(
    ("settings", "completions", "updates"),
    [
        ({}, 8, 1),
        ({"per_device_train_batch_size": 7}, 7, 1),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 15, 1),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 3}, 3, 3),
        ({"per_device_train_batch_size": 5, "generation_batch_size": 35, "num_iterations": 2}, 35, 14),  # 2 * 35 / 5
        ({"num_generations": 4, "steps_per_generation": 3}, 24, 3),
    ],
)
def test_without_groups_any_batch_size_will_do(
    settings: dict[str, Any], completions: int, updates: int, make: Make
) -> None:
    config = make(**settings)
    assert (config.generation_batch_size, config.updates_per_rollout) == (completions, updates)
    assert config.num_generations == config.num_generations_eval == settings.get("num_generations", 1)


def test_eight_processes_share_a_rollout_without_groups(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    config = make(per_device_train_batch_size=1, gradient_accumulation_steps=3)
    assert (config.generation_batch_size, config.num_generations, config.updates_per_rollout) == (24, 1, 1)


def test_completions_of_a_held_out_prompt_are_chosen_apart(make: Make) -> None:
    config = make(num_generations_eval=4)
    assert (config.num_generations, config.num_generations_eval) == (1, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0, "lam": 0, "critic_lam": 1},
        {"cliprange_value": None},
        {"cliprange_value": 0},
        {"length_adaptive_alpha": 0.05, "critic_lam": 1.0},
        {"critic_warmup_steps": 6, "num_iterations": 3, "max_steps": 7},
        {"critic_warmup_steps": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 1},
        {"beta": 0.04, "kl_reward_coef": 0.1},
        {"controls": ["clip_cov", "entropy_bonus"], "surrogate": {"name": "ppo_clip", "high": 0.28}},
        {"surrogate": "gspo", "loss_type": "grpo"},
    ],
    ids=str,
)
def test_what_works_is_accepted(settings: dict[str, Any], make: Make) -> None:
    config = make(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_the_value_losss_weight_is_a_tenth_where_it_is_read(make: Make) -> None:
    assert make(**SHARED).vf_coef == 0.1
    assert make(**SHARED, vf_coef=0.0).vf_coef == 0.0
    assert make().vf_coef is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "GAE, gamma 1, lambda 1"),
        ({"gamma": 0.99, "lam": 0.95, "critic_lam": 1.0}, "GAE, gamma 0.99, lambda 0.95, critic's lambda 1"),
        ({"length_adaptive_alpha": 0.05}, "GAE, gamma 1, lambda 1 - 1 / (0.05 l)"),
    ],
)
def test_the_header_says_where_advantages_come_from(settings: dict[str, Any], line: str, make: Make) -> None:
    assert make(**settings).advantages_line == line


# ------------------------------------------------------------------------------------------------ keys and flags


OWN = {f.name for f in dataclasses.fields(PPOConfig)} - {f.name for f in dataclasses.fields(PolicyConfig)}
GIVEN: dict[str, Any] = {
    "critic": "some/model",
    "critic_lora": True,
    "critic_learning_rate": 3e-6,
    "critic_warmup_steps": 4,
    "gamma": 0.99,
    "lam": 0.9,
    "critic_lam": 0.97,
    "whiten_advantages": False,
    "kl_reward_coef": 0.01,
    "cliprange_value": 0.2,
    "num_generations": 2,
}
ELSE: dict[str, Any] = {"critic": "shared", "vf_coef": 0.5, "length_adaptive_alpha": 0.05}


def parse(folder: Path, recipe: dict[str, Any], *flags: str, config_class: Any = PPOConfig) -> Any:
    """As a recipe does: a YAML file, then flags."""
    base = {
        "task": "gsm8k",
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "num_iterations": 2,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**base, "per_device_train_batch_size": 8, **recipe}))
    return parse_arguments(config_class, ["--config", str(path), *flags])[1]


def test_every_field_is_a_key_and_a_flag(tmp_path: Path) -> None:
    assert GIVEN.keys() | ELSE.keys() >= OWN
    for given in (GIVEN, ELSE):
        flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        by_key, by_flag = parse(tmp_path, given), parse(tmp_path, {}, *flags)
        for name, value in given.items():
            assert getattr(by_key, name) == getattr(by_flag, name) == value


def test_null_and_0_mean_no_limit_of_values(tmp_path: Path) -> None:
    assert parse(tmp_path, {"cliprange_value": None}).cliprange_value is None
    assert parse(tmp_path, {}, "--cliprange_value", "0").cliprange_value == 0


def test_1e_5_is_text_to_yaml_and_a_number_to_the_parser(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-5") == "1e-5"
    assert parse(tmp_path, {"critic_learning_rate": "1e-5"}).critic_learning_rate == 1e-5


def test_grpo_does_not_know_ppos_fields_nor_ppo_grpos(tmp_path: Path) -> None:
    assert not (OWN - {"num_generations"}) & {f.name for f in dataclasses.fields(GRPOConfig)}
    with pytest.raises(ConfigError, match="setting='critic_lam' is not known"):
        parse(tmp_path, {"critic_lam": 1.0}, config_class=GRPOConfig)
    with pytest.raises(ConfigError, match="setting='advantage_estimator' is not known"):
        parse(tmp_path, {"advantage_estimator": "leave_one_out"})
