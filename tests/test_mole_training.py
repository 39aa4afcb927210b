"""Mixtures of LoRA experts under GRPO and PPO: the routers' loss is a term of the objective; what they do is told."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_cases import FixedPPO, history, policy_trainer
from test_grpo_trainer import FixedRollouts
from test_ppo_resume import timeless
from torch import Tensor
from transformers import TrainerCallback

from rlvr import GRPOConfig
from rlvr.errors import ConfigError
from rlvr.mole.model import MoleConfig, expert_layers
from rlvr.mole.routers import auxiliary_loss, build_router
from rlvr.monitor.records import read_steps
from rlvr.trainers.engine import require_engine_of_experts

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**settings: Any) -> MoleConfig:
    given = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "num_experts": 4, "target_modules": TARGETS}
    return MoleConfig(**{**given, "task_type": "CAUSAL_LM", **settings})


def trainer(model_dir: Path, out: Path, *, kind: Any = FixedRollouts, mole: Any = None, **settings: Any) -> Any:
    """Four rollouts with two updates on each; experts that already do something."""
    shared = {"num_generations": 4, "num_iterations": 2, "max_steps": 8}
    torch.manual_seed(1)
    one = policy_trainer(kind, model_dir, out, peft_config=config(**(mole or {})), **{**shared, **settings})
    g = torch.Generator().manual_seed(2)
    for experts in expert_layers(one.model).values():
        torch.nn.init.normal_(experts.b, std=0.1, generator=g)
    return one


def adapters(one: Any) -> Tensor:
    model = one.accelerator.unwrap_model(one.model)
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "mole_" in name])


def texts(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sides = ("prompt", "completion")
    return tuple(torch.cat([batch[f"{side}_{what}"] for side in sides], 1) for what in ("ids", "mask"))  # type: ignore[return-value]


def test_the_routers_loss_is_a_term_of_the_objective(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One step with and one without it differ by the gradient of what the formula gives, over tokens but padding."""
    coefs = {"entropy_coef": 0.5, "balance_coef": 0.3, "z_coef": 0.2}
    moved, batches = [], []
    for name, given in (("with", coefs), ("without", dict.fromkeys(coefs, 0.0))):
        one = trainer(
            tiny_model_dir,
            tmp_path / name,
            mole={"router": {"name": "dynmole", **given}},
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
        )
        compute, seen = one._compute_loss, []

        def remembered(model: Any, inputs: Any, compute: Any = compute, seen: list[Any] = seen) -> Tensor:
            seen.append(inputs)
            return compute(model, inputs)

        one._compute_loss = remembered
        start = adapters(one)
        one.train()
        moved.append(adapters(one) - start)
        batches.append(seen)
    again = trainer(tiny_model_dir, tmp_path / "again", mole={"router": {"name": "dynmole", **coefs}})
    router, total = build_router({"name": "dynmole", **coefs}), torch.zeros(())
    for batch in batches[0]:
        ids, mask = texts(batch)
        again.model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        recorded = [logits[mask.bool()] for logits in again.routers._last.logits]
        total = total + auxiliary_loss(router, torch.cat(recorded))[0] / 2
    trained = [p for name, p in again.model.named_parameters() if "mole_" in name]
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    known = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained, strict=True)]
    want = -0.1 * torch.cat([g.flatten() for g in known])
    assert (batches[0][0]["prompt_mask"] == 0).any() and want.norm() > 1e-3
    assert (moved[0] - moved[1] - want).norm() < 1e-4 * want.norm()


def test_what_routers_do_is_recorded_by_layer_and_position(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, mole={"num_experts": [3, 5]}, max_steps=2)
    one.train()
    for record in read_steps(tmp_path):
        metrics, routers = record["metrics"], record["routers"]
        assert routers["layers"] == list(expert_layers(one.model)) and len(routers["layers"]) == 6
        assert [len(load) for load in routers["load"]] == [3, 3, 3, 5, 5, 5]
        assert all(sum(load) == pytest.approx(1) for load in [*routers["load"], *routers["position_load"]])
        assert metrics["router/entropy"] == pytest.approx(sum(routers["entropy"]) / 6)
        assert metrics["router/soft"] == pytest.approx(sum(routers["soft"]) / 6)
        whole = sum(h * n for h, n in zip(routers["position_entropy"], routers["position_tokens"], strict=True))
        assert metrics["router/entropy"] == pytest.approx(whole / sum(routers["position_tokens"]))
        assert 2 <= metrics["router/experts"] <= 5 and metrics["router/dead"] == 0 and metrics["router/load_max"] >= 1


@pytest.mark.parametrize("way", ["cut", "checkpointed", "packed"])
def test_training_is_the_same_however_it_is_computed(way: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Without the balance, whose means are a micro-batch's."""
    router = {"name": "dynmole", "balance_coef": 0.0, "entropy_coef": 0.0}
    changed: dict[str, Any] = {
        "cut": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        "checkpointed": {"gradient_checkpointing": True},
        "packed": {"share_prompts": True},  # in which a prompt is one text for all its completions
    }[way]
    ends, told = [], []
    for name, settings in (("plain", {}), (way, changed)):
        one = trainer(tiny_model_dir, tmp_path / name, mole={"router": router}, **settings)
        start = adapters(one)
        one.train()
        ends.append(adapters(one))
        told.append([{k: x for k, x in entry.items() if k.startswith("router/")} for entry in history(one)])
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[0] - start).norm()
    for a, b in zip(*told, strict=True) if way != "packed" else ():
        assert a == pytest.approx(b, rel=1e-3) or way == "cut"
        for name in ("router/entropy", "router/soft", "router/experts", "router/load_max"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_the_routers_loss_is_the_same_under_checkpointing(tiny_model_dir: Path, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        router = {"name": "dynmole", "entropy_coef": 0.5}
        settings = {"mole": {"router": router}, "gradient_checkpointing": checkpointing}
        one = trainer(tiny_model_dir, tmp_path / str(checkpointing), **settings)
        start = adapters(one)
        one.train()
        ends.append(adapters(one))
    assert (ends[0] - ends[1]).norm() < 1e-5 * (ends[0] - start).norm()


def test_reentrant_checkpointing_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="use_reentrant: false"):
        trainer(tiny_model_dir, tmp_path, **reentrant).train()


@pytest.mark.parametrize("kind", [FixedRollouts, FixedPPO])
def test_a_resumed_run_is_the_one_that_was_not_stopped(kind: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trainer(tiny_model_dir, tmp_path / "whole", kind=kind, **saving)
    whole.train()
    resumed = trainer(tiny_model_dir, tmp_path / "resumed", kind=kind, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert torch.equal(adapters(whole), adapters(resumed))
    assert [timeless(a) for a in history(resumed)] == [timeless(a) for a in history(whole)]
    assert all("router/entropy" in entry for entry in history(whole))


def test_the_base_is_the_reference_and_is_not_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, beta=0.1, max_steps=2)
    base = {name: p.clone() for name, p in one.model.named_parameters() if "mole_" not in name}
    start = adapters(one)
    one.train()
    assert history(one)[0]["policy/reference_kl"] > 1e-4
    assert not torch.equal(adapters(one), start)
    assert all(torch.equal(p, base[name]) for name, p in one.model.named_parameters() if name in base)


@pytest.mark.parametrize("penalized", [False, True])
def test_sequences_are_skipped_where_routers_have_no_loss(
    penalized: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    coefs = {"entropy_coef": 0.01 * penalized, "balance_coef": 0.0}
    one = trainer(tiny_model_dir, tmp_path, mole={"router": {"name": "dynmole", **coefs}}, max_steps=2)
    one.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    moved: list[bool] = []
    before = adapters(one)

    class Remember(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            moved.append(not torch.equal(adapters(one), before))

    one.add_callback(Remember())
    one.train()
    assert moved == [penalized] * 2
    assert [entry["policy/skipped"] for entry in history(one)] == [0.0 if penalized else 1.0] * 2


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mole": {"num_experts": 0}}, ("num_experts=0", "at least 1")),
        ({"mole": {"expert": 2}}, ("mole option", "num_experts")),
        ({"mole": ["a"]}, ("mole=", "mapping")),
        ({"mole": '{"router": {"name": "dynmole", "top_p": 2}}'}, ("top_p=2", "(0, 1]")),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    settings: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **settings)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("mode", "own_engine", "use_vllm", "refused"),
    [
        ("colocate", False, True, True),  # TRL's, on CUDA
        ("server", True, True, True),
        ("colocate", True, True, False),
        ("colocate", False, False, False),
    ],
)
def test_an_engine_without_the_experts_is_refused(mode: str, own_engine: bool, use_vllm: bool, refused: bool) -> None:
    args: Any = SimpleNamespace(use_vllm=use_vllm, vllm_mode=mode)
    if refused:
        with pytest.raises(ConfigError, match=r"would sample without the experts.* set use_vllm: false"):
            require_engine_of_experts(args, own_engine)
    else:
        require_engine_of_experts(args, own_engine)


def test_settings_are_enough_for_a_mixture(tiny_model_dir: Path, tmp_path: Path) -> None:
    mole = {"r": 4, "num_experts": 3, "target_modules": ["q_proj"]}
    one = policy_trainer(FixedRollouts, tiny_model_dir, tmp_path, num_generations=4, mole=mole)
    assert {experts.num_experts for experts in expert_layers(one.model).values()} == {3}
    with pytest.raises(ConfigError, match="mole and a PEFT configuration"):
        policy_trainer(FixedRollouts, tiny_model_dir, tmp_path, num_generations=4, mole=mole, peft_config=config())


def test_a_copy_of_the_model_has_nothing_of_a_pass(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, max_steps=1)
    one.train()
    one.model(input_ids=torch.arange(5, 15).view(2, 5))  # a pass with gradient that nobody asks for
    copy = deepcopy(one.model)
    assert torch.equal(
        adapters(one), torch.cat([p.detach().flatten() for n, p in copy.named_parameters() if "mole_" in n])
    )


def test_settings_of_experts_are_pefts_configuration(tmp_path: Path) -> None:
    spec = {"num_experts": 8, "r": 16, "router": "top_k", "target_modules": ["up_proj"]}
    args = GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, mole=spec)
    mole = args.mole_config
    assert mole is not None and (mole.num_experts, mole.r, mole.target_modules) == (8, 16, ["up_proj"])
    assert GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False).mole_config is None


def test_padding_of_packed_prompts_is_in_no_statistic(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One prompt is as long as its row, the others are padded: tokens count as often as they are computed."""
    one = trainer(tiny_model_dir, tmp_path, share_prompts=True, max_steps=2)
    prepare, counted = one._prepare_inputs, []

    def counting(inputs: Any) -> Any:
        batch = prepare(inputs)
        sides = (batch["prompt_ids"], batch["prompt_mask"])
        rows = {tuple(ids[shown.bool()].tolist()) for ids, shown in zip(*sides, strict=True)}
        counted.append(sum(len(row) - 1 for row in rows) + int(batch["completion_mask"].sum()))
        return batch

    one._prepare_inputs = counting
    one.train()
    assert len({len(row) for row in read_steps(tmp_path)[0]["routers"]["load"]}) == 1
    told = [record["routers"]["position_tokens"] for record in read_steps(tmp_path)]
    assert [sum(tokens) for tokens in told] == counted
    assert all(len(tokens) == 1 for tokens in told)  # no text has more than 16 tokens, though rows do


def test_routing_drifts_from_the_rollouts_with_each_update(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Nothing before the first update; then by what the routers have learned since, however the step is cut."""
    told = []
    for size in (16, 4):
        router = {"name": "top_k", "k": 1, "balance_coef": 5.0}
        one = trainer(
            tiny_model_dir,
            tmp_path / str(size),
            mole={"router": router, "lora_dropout": 0.0},
            num_iterations=4,
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
        )
        one.train()
        told.append([entry["router/drift"] for entry in history(one)])
    assert told[0][0] == told[1][0] == 0
    for drift in told:
        assert 0 < drift[1] < drift[3] < 1
