"""Against verl itself: its own losses, its configuration, its engine. Skipped where verl is not installed."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import fake_verl
import pytest
import torch
from torch import Tensor
from verl_cases import B, Batch, T, actor, batch, grad_of, run

from rlvr.integrations.verl import UNREAD, rlvr_loss
from rlvr.surrogates import PpoClip

pytest.importorskip("verl", reason="verl is not installed: docs/verl.md says how to run this")

from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers import config as verl_config
from verl.workers import engine_workers
from verl.workers.utils import losses

EXACT = {"rtol": 0.0, "atol": 1e-10}
SECTION = "actor_rollout_ref.actor.policy_loss"
OURS = (f"{SECTION}._target_=rlvr.integrations.verl.policy_loss", f"{SECTION}.loss_mode=rlvr")
REGION = {"low": 0.1, "high": 0.15}
RATIOS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
TAUS = {"tau_pos": 1.5, "tau_neg": 2.5}
SEQUENCES = "seq-mean-token-mean"

# verl's loss, its settings in the actor and in policy_loss, and our section for the same.
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ppo_clip": ("vanilla", RATIOS, {}, {"surrogate": {"name": "ppo_clip", "dual_clip": 3.0, **REGION}}),
    "dual_clip": (
        "vanilla",
        {**RATIOS, "clip_ratio_c": 1.2},
        {},
        {"surrogate": {"name": "ppo_clip", "dual_clip": 1.2, **REGION}},
    ),
    # A share of 1 takes every candidate, so that verl's random draw has nothing to choose.
    "clip_cov": (
        "clip_cov",
        RATIOS,
        {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 3.0},
        {
            "surrogate": {"name": "ppo_clip", **REGION},
            "controls": [{"name": "clip_cov", "fraction": 1.0, "low": 0.05, "high": 3.0}],
        },
    ),
    "kl_cov": (
        "kl_cov",
        {},
        {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7},
        {"controls": [{"name": "kl_cov", "fraction": 0.3, "coef": 0.7}]},
    ),
    "sapo": ("sapo", TAUS, {}, {"surrogate": {"name": "sapo", **TAUS}}),
    "gpg": ("gpg", {}, {}, {"surrogate": "gpg"}),
    "cispo": ("cispo", RATIOS, {}, {"surrogate": {"name": "cispo", "ratio_low": 0.9, "ratio_high": 1.15}}),
    "gspo": ("gspo", RATIOS, {}, {"surrogate": {"name": "gspo", **REGION}}),
    "gmpo": ("geo_mean", RATIOS, {}, {"surrogate": {"name": "gmpo", **REGION}}),
}
TOKEN_LEVEL = sorted(PAIRS.keys() - {"gspo", "gmpo"})
GLOBAL = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 32}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers or wraps is undone."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    for module in (losses, engine_workers, sys.modules["verl.trainer.distillation.losses"]):
        monkeypatch.setattr(module, "ppo_loss", losses.ppo_loss)


def both(name: str, values: Batch, mode: str, info: dict[str, Any], *, weights: bool) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) by verl and by us."""
    theirs, in_actor, in_section, section = PAIRS[name]
    config = verl_config.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        policy_loss=verl_config.PolicyLossConfig(loss_mode=theirs, **in_section),
        **in_actor,
    )
    config.global_batch_info.update(info)
    expected, _ = core_algos.get_policy_loss_fn(theirs)(
        old_log_prob=values["old_log_prob"],
        log_prob=values["log_prob"],
        advantages=values["advantages"],
        response_mask=values["response_mask"],
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=values["rollout_is_weights"] if weights else None,
    )
    ours = actor(section, loss_agg_mode=mode)
    ours.global_batch_info.update(info)
    got, _ = run(ours, values, weights=weights)
    return [(loss.detach(), grad_of(loss, values)) for loss in (expected, got)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("info", [{}, GLOBAL])
@pytest.mark.parametrize("mode", ["token-mean", SEQUENCES, "seq-mean-token-sum-norm", "token-sum"])
@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_loss_and_gradient_equal_verls_own(name: str, mode: str, info: dict[str, Any], weights: bool) -> None:
    if name == "sapo":
        mode = SEQUENCES  # the only one that verl's has
    for seed in range(3):
        expected, got = both(name, batch(seed), mode, info, weights=weights)
        torch.testing.assert_close(got[0], expected[0], **EXACT)
        torch.testing.assert_close(got[1], expected[1], **EXACT)


@pytest.mark.parametrize("name", TOKEN_LEVEL)
def test_loss_is_verls_to_the_bit_in_float32(name: str) -> None:
    """The value; gradients may differ in the last bit, where verl and the core multiply in another order."""
    for seed in range(3):
        values = batch(seed, torch.float32)
        expected, got = both(name, values, SEQUENCES, GLOBAL, weights=False)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-9)


def test_gspo_equals_verls_own() -> None:
    """Without rollout weights, which verl applies token by token and the core to the sequence's gradient."""
    for info in ({}, GLOBAL):
        expected, got = both("gspo", batch(), SEQUENCES, info, weights=False)
        torch.testing.assert_close(got[0], expected[0], **EXACT)
        torch.testing.assert_close(got[1], expected[1], **EXACT)


def test_gmpo_equals_verls_own() -> None:
    """verl's counts sequences without tokens and knows no batch beyond the micro-batch; it divides by |y| + 1e-8."""
    values = {name: x[3:].detach() for name, x in batch().items()}
    values["log_prob"].requires_grad_()
    expected, got = both("gmpo", values, SEQUENCES, {}, weights=False)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=0.0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-7, atol=0.0)


def test_dppo_has_the_gradient_of_verls_own() -> None:
    """Its value is another: verl's is -A stop(r) log pi, ours -A r."""
    values = batch()
    config = verl_config.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=20.0, **RATIOS
    )
    names = ("old_log_prob", "log_prob", "advantages", "response_mask")
    expected, _ = core_algos.compute_policy_loss_dppo_tv(**{k: values[k] for k in names}, config=config)
    got, metrics = run(actor({"surrogate": {"name": "dppo", "kl_coef": 0.0, **REGION}}), values)
    assert metrics["actor/pg_clipfrac"] > 0
    torch.testing.assert_close(grad_of(got, values), grad_of(expected, values), **EXACT)


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_interface_is_the_one_that_the_fake_has() -> None:
    for module, name in (
        (core_algos, "register_policy_loss"),
        (core_algos, "get_policy_loss_fn"),
        (core_algos, "agg_loss"),
        (losses, "ppo_loss"),
        (losses, "no_padding_2_padding"),
    ):
        assert parameters(getattr(module, name)) == parameters(getattr(fake_verl, name))
    assert parameters(rlvr_loss) == parameters(core_algos.compute_policy_loss_vanilla)
    for name in ("PolicyLossConfig", "ActorConfig"):
        real = {f.name: f.default for f in fields(getattr(verl_config, name))}
        fake = {f.name: f.default for f in fields(getattr(fake_verl, name)) if f.name not in ("strategy", "rollout_n")}
        assert {name: real[name] for name in fake} == fake
    assert set(UNREAD) <= {f.name for f in fields(fake_verl.ActorConfig)}
    mask, values = batch()["response_mask"], batch()["entropy"]
    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", SEQUENCES):
        for info in ({}, GLOBAL):
            real_loss = core_algos.agg_loss(values, mask, mode, **info)
            torch.testing.assert_close(fake_verl.agg_loss(values, mask, mode, **info), real_loss, **EXACT)


def composed(*overrides: str) -> Any:
    """verl's actor, from verl's own configuration files and these overrides."""
    from hydra import compose, initialize_config_dir

    folder = Path(inspect.getfile(verl_config)).parents[2] / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose(
            "ppo_trainer", overrides=["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", *overrides]
        )
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_configuration_of_verl_carries_the_objective() -> None:
    original = losses.ppo_loss
    config = composed(
        *OURS,
        f"+{SECTION}.surrogate={{name: ppo_clip, high: 0.28}}",
        f"+{SECTION}.controls=[{{name: kl_cov, coef: 0.5}}]",
    )
    surrogate, (control,) = config.policy_loss.rlvr
    assert surrogate == PpoClip(high=0.28) and (control.name, control.coef, control.scope) == (
        "kl_cov",
        0.5,
        "micro_batch",
    )
    assert core_algos.get_policy_loss_fn(config.policy_loss.loss_mode) is rlvr_loss
    assert engine_workers.ppo_loss is original
    composed(*OURS, f"+{SECTION}.controls=[steer]")
    assert engine_workers.ppo_loss is losses.ppo_loss is not original
    assert sys.modules["verl.trainer.distillation.losses"].ppo_loss is losses.ppo_loss  # type: ignore[attr-defined]


def test_configuration_error_names_the_value() -> None:
    with pytest.raises(Exception, match=r"controls='ster' is not known; did you mean steer"):
        composed(*OURS, f"+{SECTION}.controls=[ster]")


def test_ppo_loss_of_verl_hands_the_entropy_on() -> None:
    """Through verl's nested tensors: the loss is that of the same padded micro-batch."""
    from tensordict import TensorDict

    config, values = composed(*OURS, f"+{SECTION}.controls=[steer, high_entropy]"), batch()
    prompts = [torch.ones(2 + i % 3, dtype=torch.int64) for i in range(B)]

    def nested(rows: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def output(x: Tensor) -> Tensor:
        """The engine's: a value per token of prompt and response, one place early."""
        ends = [x.new_zeros(len(prompts[i]) - 1) for i in range(B)]
        return nested([torch.cat([ends[i], x[i], x.new_zeros(1)]) for i in range(B)])

    data = TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested([torch.ones(T, dtype=torch.int64)] * B),
            "response_mask": nested(list(values["response_mask"])),
            "old_log_probs": nested(list(values["old_log_prob"])),
            "advantages": nested(list(values["advantages"])),
        },
        batch_size=B,
    )
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=40, global_batch_size=B)
    model_output = {"log_probs": output(values["log_prob"]), "entropy": output(values["entropy"])}
    loss, metrics = losses.ppo_loss(config, model_output, data)
    expected, expected_metrics = run(config, values)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(grad_of(loss, values), grad_of(expected, values), **EXACT)
    assert {name: metrics[name].aggregate() for name in expected_metrics} == expected_metrics
    assert metrics["actor/steer/changed"].aggregate() > 0


def engine_step(model_dir: Path, *overrides: str) -> dict[str, float]:
    """Metrics of one optimizer step of verl's actor worker, in a process of its own."""
    script = Path(__file__).with_name("verl_engine.py")
    command = [sys.executable, str(script), str(model_dir), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((), "surrogate={name: ppo_clip, dual_clip: 3.0}"),
        (
            (f"{SECTION}.loss_mode=kl_cov", f"{SECTION}.kl_cov_ratio=0.3", f"{SECTION}.ppo_kl_coef=0.5"),
            "controls=[{name: kl_cov, fraction: 0.3, coef: 0.5}]",
        ),
    ],
)
def test_optimizer_step_of_verls_engine_is_the_same(tiny_model_dir: Path, theirs: tuple[str, ...], ours: str) -> None:
    """Two micro-batches of responses of four lengths: loss and gradient norm, to the bit."""
    expected = engine_step(tiny_model_dir, *theirs)
    got = engine_step(tiny_model_dir, *OURS, f"+{SECTION}.{ours}")
    assert (got["loss"], got["grad_norm"]) == (expected["loss"], expected["grad_norm"])


@pytest.mark.slow
def test_entropy_reaches_controls_in_verls_engine(tiny_model_dir: Path) -> None:
    section = (*OURS, f"+{SECTION}.controls=[steer]")
    plain = engine_step(tiny_model_dir, *OURS)
    steered = engine_step(tiny_model_dir, *section, "actor_rollout_ref.actor.calculate_entropy=true")
    assert steered["actor/steer/changed"] > 0 and steered["grad_norm"] < plain["grad_norm"]
    assert steered["actor/ppo_kl"] == plain["actor/ppo_kl"]
    with pytest.raises(AssertionError, match=r"steer needs each token's entropy: set actor\.calculate_entropy=true"):
        engine_step(tiny_model_dir, *section)
