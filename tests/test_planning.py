"""A plan's arithmetic by hand, its text, and that its names and defaults are the trainer's."""

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml

from rlvr.cli import main
from rlvr.errors import ConfigError
from rlvr.planning import ModelShape, Passes, Settings, describe, estimates
from rlvr.planning.memory import BUCKET, CONTEXT, GIB, SEVERAL, SINGLE, Weights, engine_sequences, held
from rlvr.planning.settings import HELP, OF_PPO, settings_from
from rlvr.trainers.config import GRPOConfig, PolicyConfig
from rlvr.trainers.planner import plan, read_recipe
from rlvr.trainers.ppo_config import PPOConfig

ROOT = Path(__file__).parents[1]
NONE = Passes(0, 0, 0)
SHAPE = ModelShape(
    parameters=8 * 10**9,
    adapters=0,
    layers=32,
    layer=2 * 10**8,
    hidden=4096,
    vocabulary=128_000,
    tied=False,
    cached=2 * 32 * 8 * 128,
    passes=NONE,
    passes_in_half=NONE,
)


def settings(**given: Any) -> Settings:
    return Settings(**{"model_name_or_path": "m", "dtype": "bfloat16", "gpus": 8, "use_vllm": True, **given})


def of(strategy: str, one: Settings, shape: ModelShape = SHAPE) -> Any:
    return held(strategy, Weights(shape.total, shape.adapters or shape.parameters), shape, one)


def test_held_by_hand() -> None:
    """8e9 parameters on 8 GPUs."""
    ddp, zero2, zero3 = (of(name, settings()) for name in ("ddp", "zero2", "zero3"))
    assert (ddp.weights, ddp.gradients, ddp.optimizer) == (16e9, 16e9, 32e9)
    assert ddp.buffers == 16e9
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (16e9, 2e9, 12e9)  # 12 bytes, an eighth of them
    assert zero2.buffers == 2 * BUCKET and zero2.host == 0
    assert (zero3.weights, zero3.gradients, zero3.optimizer) == (2e9, 2e9, 12e9)
    assert of("zero3_offload", settings()).always == 0
    assert of("zero3_offload", settings()).host == (12 + 4 + 2 + 2) * 8e9
    assert of("zero3_offload", settings(nodes=2)).host == (12 + 4 + 2 + 2) * 8e9 / 2  # of each machine
    assert of("fsdp2", settings()).always == 16 * 8e9 / 8
    assert of("ddp", settings(dtype="float32")).always == 16 * 8e9
    assert of("one_gpu", settings(optim="adamw_8bit")).optimizer == 16e9
    assert of("one_gpu", settings(optim="sgd")).optimizer == 0


def test_held_of_adapters_counts_no_gradient_of_the_rest() -> None:
    lora = of("one_gpu", settings(), replace(SHAPE, adapters=10**7))
    assert (lora.weights, lora.gradients, lora.optimizer) == (16e9 + 4e7, 4e7, 8e7)


def peaks(one: Settings, shape: ModelShape = SHAPE) -> dict[str, float]:
    return {e.strategy: e.peak for e in estimates(shape, one)}


def test_sharding_and_offload_take_less_on_the_gpu() -> None:
    found = peaks(settings())
    assert tuple(found) == SEVERAL
    assert found["ddp"] > found["zero2"] > found["zero3"] > found["zero3_offload"]
    assert found["zero2"] > found["zero2_offload"]
    assert peaks(settings(gpus=16))["zero3"] < found["zero3"]
    assert tuple(peaks(settings(gpus=1))) == SINGLE
    assert tuple(peaks(settings(gpus=1, optim="sgd"))) == ("one_gpu",)  # offload makes Adam of it


def test_passes_heads_references_and_critics_add_up() -> None:
    base = peaks(settings())
    busy = peaks(settings(), replace(SHAPE, passes=Passes(0, 0, 10 * 2**30), passes_in_half=Passes(0, 7 * 2**30, 0)))
    assert busy["ddp"] > base["ddp"] and busy["zero3"] - base["zero3"] == 7 * 2**30
    referred, ppo = peaks(settings(beta=0.1)), peaks(settings(critic="copy"))
    assert referred["ddp"] - base["ddp"] == 16e9  # a frozen copy
    assert referred["zero3"] - base["zero3"] == pytest.approx(2e9 + 2 * 1.05e9)  # an eighth, and what is gathered
    without_head = SHAPE.parameters - SHAPE.head
    assert ppo["zero2"] - base["zero2"] >= (2 + 14 / 8) * without_head  # the critic's own engine
    assert peaks(settings(critic="shared")).items() <= base.items() and "fsdp2" not in ppo
    lora = replace(SHAPE, adapters=10**7)
    assert peaks(settings(beta=0.1, use_peft=True), lora) == peaks(settings(use_peft=True), lora)


def test_engine_takes_its_share_unless_it_sleeps_or_is_elsewhere() -> None:
    room = {
        name: estimates(SHAPE, settings(**given))[0].room / GIB
        for name, given in {
            "colocate": {},
            "sleeping": {"vllm_enable_sleep_mode": True},
            "server": {"vllm_mode": "server"},
        }.items()
    }
    assert room == pytest.approx({"colocate": 0.95 * 80 - 24, "sleeping": 76, "server": 76})
    # 24 GiB less 16e9 bytes of weights and 1 GiB; 128 KiB a token, 1024 tokens: 1/8 GiB a sequence
    assert engine_sequences(SHAPE, settings()) == pytest.approx((24 - 1 - 16e9 / GIB) * 8)
    assert engine_sequences(SHAPE, settings(vllm_tensor_parallel_size=2)) > 2 * engine_sequences(SHAPE, settings())


def test_generation_without_an_engine_counts_its_cache_and_whole_weights() -> None:
    alone = settings(use_vllm=False, per_device_train_batch_size=64, gradient_accumulation_steps=8, gpus=8)
    assert alone.rollout_size == 512
    by_name = {e.strategy: e for e in estimates(SHAPE, alone)}
    cache = 512 * 1024 * SHAPE.cached * 2
    assert by_name["zero3"].phase == "rollout"
    assert by_name["zero3"].peak == by_name["zero3"].policy.always + CONTEXT + cache + 16e9


def test_text_recommends_the_first_that_fits_and_stays_in_100_columns() -> None:
    text = describe(SHAPE, settings(), ["--config", "RECIPE.yaml", *["--learning_rate 1e-6"] * 6])
    first = next(e.strategy for e in estimates(SHAPE, settings()) if e.fits)
    assert f"{first}, the simplest that does" in text and f"recipes/accelerate/{first}.yaml --num_processes 8" in text
    tight = describe(SHAPE, settings(gpu_memory=24.0))
    assert "nothing fits" in tight and "the engine has no room" in tight and "accelerate launch" not in tight
    server = describe(SHAPE, settings(gpu_memory=4.0, vllm_mode="server"))
    assert re.search(r"nothing fits +zero3_offload is nearest, [\d.]+ GiB short", server)
    nodes = describe(SHAPE, settings(gpus=16, nodes=2))
    assert "--num_machines 2 --machine_rank R" in nodes and "--deepspeed_multinode_launcher standard" in nodes
    assert "bfloat16 weights lose small updates" in describe(SHAPE, settings(gpu_memory=300.0))
    assert "recipes/ppo.py" in describe(SHAPE, settings(critic="copy"))
    for one in (text, tight, server, nodes):
        assert max(map(len, one.splitlines())) <= 100


def test_settings_have_the_trainers_names_and_defaults() -> None:
    defaults = {f.name: f.default for c in (GRPOConfig, trl.ModelConfig) for f in fields(c)}
    own = {"gpus", "nodes", "gpu_memory", "prompt_length", "critic", "critic_lora", "model_name_or_path"}
    for one in fields(Settings):
        assert one.default is not MISSING and one.name in HELP
        if one.name not in own:
            assert defaults[one.name] == one.default, one.name
    assert {f.name for f in fields(PPOConfig)} - {f.name for f in fields(PolicyConfig)} == OF_PPO


def test_recipes_are_read() -> None:
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = read_recipe(str(path))
        if "mole" in recipe:
            with pytest.raises(ConfigError, match="mole"):
                settings_from(recipe, {})
            continue
        found = settings_from(recipe, {"gpus": 8})
        assert found.max_completion_length == recipe.get("max_completion_length", 512)
        assert (found.critic != "none") is path.stem.startswith("ppo")
    assert settings_from(yaml.safe_load((ROOT / "recipes/grpo.yaml").read_text()), {}).beta  # of reference_kl


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "model is not set"),
        (["--model", "/nowhere"], "model='/nowhere' is no model directory"),
        (["--modle", "x"], "did you mean model"),
        (["--model", "m", "--gpus", "0"], "gpus=0: must be at least 1"),
        (["--model", "m", "--gpus", "two"], "invalid int value: 'two'"),
        (["--model", "m", "--gpus", "6", "--nodes", "4"], "gpus=6: must be a multiple of nodes=4"),
        (["--model", "m", "--gpu_memory", "-1"], "gpu_memory=-1.0: must be positive"),
        (["--model", "m", "--optim", "lion"], "optim='lion': a plan knows adamw_torch"),
        (["--model", "m", "--dtype", "int8"], "dtype='int8'"),
        (["--model", "m", "--use_vllm", "maybe"], "'maybe' is not true or false"),
        (["--model", "m", "--vllm_gpu_memory_utilization", "1.5"], "within (0, 1)"),
        (["--config", "nowhere.yaml"], "config='nowhere.yaml' cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and told in captured.err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("per_device_train_batch_size: many", "must be of type int"),
        ("use_peft: 1", "must be true or false"),
        ("mole: default", "not planned"),
        ("load_in_4bit: true", "quantized"),
        ("- a list", "holds no `key: value` lines"),
    ],
)
def test_bad_recipes_are_refused(line: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=told):
        plan(["--model", "m", "--config", str(path)])


def test_plan_reads_a_configuration_without_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    config = "recipes/gsm8k_lora.yaml"
    text = plan(["--model", str(tmp_path), "--config", str(ROOT / config), "--gpu_memory", "24", "--lora_r", "4"])
    assert "one_gpu, the simplest that does" in text
    words = " ".join(text.replace("\\\n", " ").split())
    assert f"recipes/grpo.py --config {ROOT / config} --model_name_or_path {tmp_path} --lora_r 4" in words
    assert "--gpu_memory" not in text  # no key of a recipe


def test_targets_that_are_not_there_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="lora_target_modules='nothing'"):
        plan(["--model", str(tiny_model_dir), "--use_peft", "--lora_target_modules", "nothing"])


def test_mixtures_of_experts_are_planned_in_bfloat16(tiny_moe_dir: Path) -> None:
    assert "the simplest that does" in plan(["--model", str(tiny_moe_dir), "--dtype", "bfloat16"])
    with pytest.raises(ConfigError, match=r"qwen3_moe of float32 cannot be run without data; set dtype bfloat16"):
        plan(["--model", str(tiny_moe_dir)])
