"""Every recipe parses, names real fields, and is what its comments say."""

from pathlib import Path

import pytest
from trl import ModelConfig, TrlParser

import rlvr
from rlvr.tasks import TaskConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def parse(path: Path, *flags: str) -> tuple[TaskConfig, rlvr.GRPOConfig, ModelConfig]:
    return TrlParser((TaskConfig, rlvr.GRPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(path), "--report_to", "none", *flags]
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path: Path) -> None:
    _, args, model = parse(path)
    assert model.model_name_or_path
    assert args.updates_per_rollout >= 1


@pytest.mark.parametrize("name", ["kl_cov", "clip_cov", "grpo"])
def test_paper_recipes_take_eight_updates_of_256_per_rollout_on_eight_processes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(p for p in RECIPES if p.stem == name)
    _, args, _ = parse(path)
    per_update = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert per_update == 256
    assert args.generation_batch_size / per_update == 8
    assert args.save_steps % 8 == 0


def test_any_field_is_a_flag() -> None:
    path = next(p for p in RECIPES if p.stem == "kl_cov")
    _, args, _ = parse(path, "--learning_rate", "3e-6", "--controls", '{"name": "kl_cov", "fraction": 0.01}')
    assert args.learning_rate == 3e-6
    assert args.control_list[0].fraction == 0.01
