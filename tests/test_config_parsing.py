"""How a recipe's YAML and the command line become a GRPOConfig."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import TrlParser

from rlvr import GRPOConfig
from rlvr.controls import ClipCov, KlCov
from rlvr.errors import ConfigError
from rlvr.surrogates import PpoClip


def parse(tmp_path: Path, recipe: dict[str, Any], *flags: str) -> GRPOConfig:
    """As a recipe does: a YAML file, then flags."""
    base = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False, "num_iterations": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**base, "per_device_train_batch_size": 8, **recipe}))
    (config,) = TrlParser((GRPOConfig,)).parse_args_and_config(["--config", str(path), *flags])
    return config


TWO_CONTROLS = (ClipCov(fraction=0.01, low=0.5), KlCov(scope="micro_batch"))


def test_controls_are_a_list_of_mappings_in_yaml(tmp_path: Path) -> None:
    controls = [{"name": "clip_cov", "fraction": 0.01, "low": 0.5}, {"name": "kl_cov", "scope": "micro_batch"}]
    config = parse(tmp_path, {"controls": controls, "surrogate": {"name": "ppo_clip", "low": 0.1, "high": 0.28}})
    assert config.control_list == TWO_CONTROLS
    assert config.surrogate_fn == PpoClip(low=0.1, high=0.28)


def test_a_single_control_in_yaml_needs_no_list(tmp_path: Path) -> None:
    assert parse(tmp_path, {"controls": "kl_cov"}).control_list == (KlCov(),)
    assert parse(tmp_path, {"controls": {"name": "kl_cov", "coef": 0.5}}).control_list == (KlCov(coef=0.5),)
    assert parse(tmp_path, {"controls": []}).control_list == parse(tmp_path, {}).control_list == ()


def test_controls_are_json_or_names_on_the_command_line(tmp_path: Path) -> None:
    flags = ('{"name": "clip_cov", "fraction": 0.01, "low": 0.5}', '{"name": "kl_cov", "scope": "micro_batch"}')
    assert parse(tmp_path, {}, "--controls", *flags).control_list == TWO_CONTROLS
    assert parse(tmp_path, {}, "--controls", "clip_cov", "kl_cov").control_list == (ClipCov(), KlCov())
    assert parse(tmp_path, {"controls": ["kl_cov"]}, "--controls", "clip_cov").control_list == (ClipCov(),)
    surrogate = parse(tmp_path, {}, "--surrogate", '{"name": "ppo_clip", "high": 0.28}').surrogate_fn
    assert surrogate == PpoClip(high=0.28)


def test_yaml_reads_1e_3_as_text_and_is_told_so(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    with pytest.raises(ConfigError, match=r"fraction='1e-3' is text"):
        parse(tmp_path, {"controls": [{"name": "kl_cov", "fraction": "1e-3"}]})


def test_controls_on_the_command_line_may_be_none_or_a_json_list(tmp_path: Path) -> None:
    base = {"output_dir": str(tmp_path), "bf16": False, "num_iterations": 2, "report_to": "none"}
    assert GRPOConfig(controls=["none"], **base).control_list == ()
    several = GRPOConfig(controls=['[{"name": "kl_cov", "fraction": 0.1}, "clip_cov"]'], **base).control_list
    assert [control.name for control in several] == ["kl_cov", "clip_cov"]
