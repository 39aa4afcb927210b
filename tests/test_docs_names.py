"""What the documentation names exists and is complete: metrics, views, methods, fields of TRL and verl, numbers."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from docs_cases import GENERATED, PAGES, ROOT, docstrings, methods, name_of, text_of
from test_recipes import eight_processes
from transformers import TrainingArguments
from trl import GRPOConfig as StockConfig
from trl import ModelConfig

import rlvr
from rlvr.advantages import group_relative, leave_one_out
from rlvr.alarm import KINDS
from rlvr.controls import CONTROLS
from rlvr.errors import ConfigError
from rlvr.mole.routers import ROUTERS
from rlvr.monitor.metrics import METRICS
from rlvr.planning.settings import Settings
from rlvr.surrogates import SURROGATES
from rlvr.tasks import TaskConfig
from rlvr.thermostat import Thermostat
from rlvr.trainers.checkpoint_choice import ChoiceConfig
from rlvr.trainers.launch import parse_arguments
from rlvr.trainers.sft import SFTConfig
from rlvr.trainers.trl_bridge import METRIC_NAMES, REPLACED_METRICS

OF_VERL = {("from-verl.md", "critic/vf_explained_var")}


@pytest.mark.parametrize("page", [*PAGES, *GENERATED], ids=name_of)
def test_metrics_that_are_named_exist(page: Path) -> None:
    areas = {name.partition("/")[0] for name in METRICS}
    for area, name in re.findall(r"`([a-z_]+)/([a-z_0-9]+)`", text_of(page)):
        if area in areas and name != "effect" and (page.name, f"{area}/{name}") not in OF_VERL:
            assert f"{area}/{name}" in METRICS, f"{name_of(page)}: {area}/{name}"


def test_monitoring_has_every_view_and_every_alert() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    views = ROOT / "rlvr" / "monitor" / "dashboard" / "static" / "views"
    titles = {re.search(r'^  title: "(\w+)",$', path.read_text(), re.MULTILINE)[1] for path in views.glob("*.js")}  # type: ignore[index]
    assert titles == set(re.findall(r"^- \*\*(\w+)\.\*\*", text, re.MULTILINE))
    assert set(KINDS) == set(re.findall(r"^\| `(\w+)` \|", text.partition("## Every alert")[2], re.MULTILINE))


def test_reference_of_the_command_line_has_every_command_and_flag() -> None:
    pytest.importorskip("mkdocs")
    import hooks

    text = hooks._commands()
    for name in ("report", "summary", "watch", "dashboard", "metrics", "serve", "plan", "select-checkpoint"):
        assert f"## rlvr {name}\n" in text
    assert "--kv_cache_gib" in text and "--interval" in text
    assert all(f"--{f.name}" in text for of in (Settings, ChoiceConfig, TaskConfig) for f in fields(of))


def test_reference_has_every_metric() -> None:
    pytest.importorskip("mkdocs")
    import hooks

    assert hooks.METRICS in (ROOT / "docs" / "api" / "monitor.md").read_text()
    rows = hooks._metrics().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [*METRICS, "<control>/effect"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_reference_escapes_nothing_inside_code() -> None:
    codes = re.findall(r"`([^`\n]+)`", docstrings.fields(ROOT, "rlvr.tasks.config.TaskConfig"))
    assert "chain_sum" in codes and not any("\\_" in code for code in codes)


# ----------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("document", methods.TABLES)
def test_table_of_methods_is_that_of_the_data(document: str) -> None:
    assert methods.standing(document) == methods.table(document), "run python scripts/docsite/methods.py"


def test_every_control_surrogate_router_and_estimator_has_a_page() -> None:
    named = {path.rpartition(".")[2] for method in methods.read_methods() for path in method.classes}
    assert {cls.__name__ for cls in [*CONTROLS.values(), *SURROGATES.values(), *ROUTERS.values()]} <= named
    assert {group_relative.__name__, leave_one_out.__name__} <= named
    assert len({method.slug for method in methods.read_methods()}) == len(methods.read_methods())


@pytest.mark.parametrize("method", methods.read_methods(), ids=lambda method: method.slug)
def test_method_is_documented_as_it_is(method: Any) -> None:
    for path in method.classes:
        module, _, name = path.rpartition(".")
        real = getattr(importlib.import_module(module), name)
        if isinstance(real, type):
            shown = docstrings.options(ROOT, path)
            names = {f.name for f in fields(real) if f.init}
            if name.endswith("Config"):  # of a configuration its own: what it inherits is TRL's or PEFT's
                names &= real.__annotations__.keys()
            assert {option for option, _, _ in shown} == names, path
            assert all(meaning for _, _, meaning in shown), f"{path}: an option has no meaning in the docstring"
    for name, (default, _) in method.fields.items():
        assert next(f for f in fields(rlvr.GRPOConfig) if f.name == name).default == default, name
    assert re.search(r"^\| `\w+` \| `\w+` \| ", methods.page(method), re.MULTILINE), "no options"
    assert not re.match(r"the same|of |there ", method.does)


@pytest.mark.parametrize("method", methods.read_methods(), ids=lambda method: method.slug)
def test_setting_of_a_method_makes_a_configuration(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its page says to put into a recipe is accepted there, and is what the page is of."""
    recipe, given = ROOT / "recipes" / f"{method.into}.yaml", yaml.safe_load(method.yaml)
    path = tmp_path / recipe.name
    path.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **given, "output_dir": str(tmp_path)}))
    script = re.search(r"launched with `recipes/(\w+)\.py`", methods.page(method))
    assert script
    config_class: Any = {"ppo": rlvr.PPOConfig, "mole_sft": SFTConfig, "grpo": rlvr.GRPOConfig}[script[1]]
    if script[1] == "mole_sft" or method.into == "quickstart":
        monkeypatch.setattr(TrainingArguments, "world_size", 1)
    else:
        eight_processes(monkeypatch)
    flags = ["--use_cpu", "true"] if config_class is SFTConfig and not torch.accelerator.is_available() else []
    _, args, _ = parse_arguments(config_class, ["--config", str(path), *flags])
    classes = {path.rpartition(".")[2] for path in method.classes}
    assert ("PPOConfig" in classes) is (config_class is rlvr.PPOConfig)
    if "mole" in given:
        assert type(args.mole_config.built_router).__name__ in classes
        return
    made = {type(part).__name__ for part in (*args.control_list, args.surrogate_fn, args.thermostat_config)}
    parts = {cls.__name__ for cls in [*CONTROLS.values(), *SURROGATES.values(), Thermostat]}
    assert classes & parts <= made, f"{sorted(made)} of the setting"
    for name in {
        "loss_type",
        "scale_rewards",
        "advantage_estimator",
        "critic",
        "lam",
        "num_generations",
    } & given.keys():
        assert getattr(args, name) == given[name]


@pytest.mark.parametrize("slug", ["clip_higher", "dapo"])
def test_setting_of_a_baseline_makes_its_recipe(slug: str) -> None:
    method = next(method for method in methods.read_methods() if method.slug == slug)
    wanted, made = (yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text()) for name in (slug, method.into))
    made |= yaml.safe_load(method.yaml) | {"output_dir": wanted["output_dir"]}
    if made.get("controls") == "none":
        made.pop("controls")
    assert made == wanted


def test_recipes_too_large_for_unsharded_weights_are_launched_with_sharded_ones() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        if "size does not fit" in (text := path.read_text()) or re.search("(14|30|32)B", text.partition("task:")[0]):
            assert "zero3" in methods.launch_line(path.stem), path.stem


# ------------------------------------------------------------------------------------------------ coming from others


def codes(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)(?:: [^`]*)?`", text))


def test_from_trl_names_every_field_of_both() -> None:
    text = (ROOT / "docs" / "from-trl.md").read_text()
    stock, ours = ({f.name for f in fields(of)} for of in (StockConfig, rlvr.GRPOConfig))
    general = {f.name for f in fields(TrainingArguments)}
    named = codes(text)
    assert stock - general <= named, sorted(stock - general - named)
    assert ours - stock <= named, sorted(ours - stock - named)
    assert {f.name for f in fields(rlvr.PPOConfig)} - ours <= named
    for block in re.findall(r"^\| (`.*?`) \| ", text, re.MULTILINE):
        assert codes(block) <= stock | ours, block
    passed = text.partition("## Same name, same meaning")[2].partition("Of these")[0]
    assert codes(passed) <= stock
    for name in codes(passed):
        ours_default, theirs = (
            next(f for f in fields(of) if f.name == name).default for of in (rlvr.GRPOConfig, StockConfig)
        )
        assert ours_default == theirs, name


def metric_rows(page: str) -> list[list[list[str]]]:
    """The names in each cell of a page's table of metrics; those of one cell may share their beginning."""
    text = (ROOT / "docs" / page).read_text().partition("## Names of metrics")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


def test_names_of_metrics_are_those_of_both() -> None:
    trl = (Path(str(importlib.util.find_spec("trl").origin)).parent / "trainer" / "grpo_trainer.py").read_text()  # type: ignore[union-attr]
    for ours, theirs in metric_rows("from-trl.md"):
        assert set(ours) <= METRICS.keys() and all(f'"{name}"' in trl for name in theirs), (ours, theirs)
        for mine, name in zip(ours, theirs, strict=False):
            assert METRIC_NAMES.get(name, mine) == mine
    gone = {name for _, theirs in metric_rows("from-trl.md") for name in theirs}
    assert {*METRIC_NAMES, *REPLACED_METRICS} <= gone
    verl = set((ROOT / "tests" / "data" / "verl-0.9.1-metrics.txt").read_text().split())
    for ours, theirs, *_ in metric_rows("from-verl.md"):
        assert set(ours) <= METRICS.keys(), ours
        assert {name for name in theirs if not name.startswith("val-core/")} <= verl, theirs


REFUSED = {
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "top_entropy_quantile": 0.2,
    "off_policy_mask_threshold": 0.5,
    "use_liger_kernel": True,
    "restore_callback_states_from_checkpoint": True,
}


def test_from_trl_refusals_are_those_of_the_code(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "from-trl.md").read_text().partition("## Refused")[2].partition("Fields that belong")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == REFUSED.keys()
    for name, value in REFUSED.items():
        with pytest.raises(ConfigError, match=name):
            rlvr.GRPOConfig(output_dir=str(tmp_path), report_to="none", **{name: value})


def test_from_verl_names_settings_of_both() -> None:
    text = (ROOT / "docs" / "from-verl.md").read_text()
    settings = set((ROOT / "tests" / "data" / "verl-0.9.1-settings.txt").read_text().split())
    named = set(re.findall(r"`((?:data|actor_rollout_ref|algorithm|trainer|critic|reward)\.[\w.]+)", text))
    sections = {"actor_rollout_ref.actor.policy_loss.loss_mode"}
    assert named - sections <= settings, sorted(named - settings)
    if spec := importlib.util.find_spec("verl"):
        config = Path(str(spec.origin)).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"
        assert settings <= set(leaves(yaml.safe_load(config.read_text())))
    ours = {f.name for of in (rlvr.GRPOConfig, rlvr.PPOConfig, TaskConfig, ModelConfig) for f in fields(of)}
    options = {f.name for of in [*CONTROLS.values(), *SURROGATES.values()] for f in fields(of)}
    rows = re.findall(r"^\| .*?`.*? \| (.*?) \|", text, re.MULTILINE)
    words = {word for row in rows for word in codes(row)} - {"rlvr_kernels"}
    assert words <= ours | options | CONTROLS.keys() | SURROGATES.keys(), sorted(words - ours - options)


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"
