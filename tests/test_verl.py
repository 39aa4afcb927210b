"""rlvr's policy loss in verl: the laws run on a fake of verl's interface, and on verl itself where it is installed.

In an environment with verl 0.9.1: pip install --no-deps -e . && pytest tests/test_verl.py tests/test_verl_parity.py
"""

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import fake_verl
import pytest
import torch
from control_cases import CASES
from torch import Tensor
from verl_cases import B, Batch, T, actor, batch, grad_of, run

from rlvr.controls import CONTROLS, apply
from rlvr.errors import ConfigError
from rlvr.integrations.verl import keyed_tokens, pass_entropy, policy_loss
from rlvr.objective import policy_loss as core_loss
from rlvr.surrogates import SURROGATES
from rlvr.types import LocalReduce, Tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
REFUSED = {
    "adaptive_entropy": "steps",
    "clip_v": "mean_discriminator",
    "entropy_bonus": "entropy_coeff",
    "geometric_gate": "rollout_correction",
    "icepop": "rollout_correction",
    "mis": "rollout_correction",
    "off_policy_mask": "rollout_correction",
    "reference_kl": "use_kl_loss",
    "tis": "rollout_correction",
    "token_budget": "optimizer_step",
}
PORTABLE = sorted(CASES.keys() - REFUSED.keys())


@pytest.fixture(params=["fake", "real"] if find_spec("verl") else ["fake"])
def verl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl.workers.utils.losses, in which `ppo_loss` is; what a test registers or wraps is undone."""
    if request.param == "fake":
        fake_verl.install(monkeypatch)
    from verl.trainer.ppo import core_algos
    from verl.workers.utils import losses

    monkeypatch.setattr(losses, "ppo_loss", losses.ppo_loss)
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    return losses


def section_of(name: str, **more: Any) -> dict[str, Any]:
    """The `policy_loss` section with the active case of a control."""
    control = CASES[name].active
    options = {f.name: getattr(control, f.name) for f in fields(CONTROLS[name]) if f.name != "scope"}
    return {"controls": [{"name": name, **options}], **more}


def tokens_of(values: Batch, config: Any) -> tuple[Tokens, dict[str, Any]]:
    """The same micro-batch as the core sees it, with the keys that the loss gives it, and the objective's parts."""
    surrogate, controls = config.policy_loss.rlvr
    mask = values["response_mask"]
    tokens = keyed_tokens(
        mask,
        logps=values["log_prob"],
        old_logps=values["old_log_prob"],
        advantages=values["advantages"],
        entropy=values["entropy"],
    )
    with torch.no_grad():
        clipped = surrogate.clipped(surrogate.ratio(tokens), tokens)
        outcome = apply(controls, tokens, clipped, LocalReduce())
    return tokens, {"surrogate": surrogate, "coefficients": outcome.coefficients}


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize(
    ("verl_mode", "mode"), [("token-mean", "token_mean"), ("seq-mean-token-sum", "seq_mean_token_sum")]
)
def test_loss_equals_the_core(verl: Any, name: str, verl_mode: str, mode: Any) -> None:
    """Every control that works in verl, those that shrink the denominator among them."""
    config, values = actor(section_of(name), loss_agg_mode=verl_mode), batch()
    tokens, parts = tokens_of(values, config)
    expected = core_loss(tokens, **parts, mode=mode)
    got, _ = run(config, values)
    assert parts["coefficients"].present()
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(grad_of(got, values), grad_of(expected, values), **EXACT)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_equals_the_core(verl: Any, surrogate: str) -> None:
    """With verl's mean of sequence means, which divides by the length plus 1e-8."""
    config, values = actor({"surrogate": surrogate}, loss_agg_mode="seq-mean-token-mean"), batch()
    tokens, parts = tokens_of(values, config)
    expected = core_loss(tokens, **parts, mode="seq_mean_token_mean")
    got, _ = run(config, values)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(grad_of(got, values), grad_of(expected, values), rtol=1e-8, atol=0.0)


def test_micro_batches_and_ranks_add_up(verl: Any) -> None:
    """With the batch's denominators, the losses of pieces sum to dp_size times the whole's mean loss."""
    for mode, info in (
        ("token-mean", {"batch_num_tokens": 40}),
        ("seq-mean-token-mean", {"global_batch_size": 6}),
        ("seq-mean-token-sum-norm", {"global_batch_size": 6, "loss_scale_factor": 16}),
        ("token-sum", {}),
    ):
        config, values = actor({"surrogate": "sapo"}, loss_agg_mode=mode), batch()
        config.global_batch_info.update(dp_size=2, **info)
        whole, _ = run(config, values)
        parts = [run(config, {k: x[rows] for k, x in values.items()})[0] for rows in (slice(0, 3), slice(3, B))]
        torch.testing.assert_close(parts[0] + parts[1], whole, **EXACT)
        config.global_batch_info["dp_size"] = 1
        torch.testing.assert_close(2 * run(config, values)[0], whole, **EXACT)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "clip_b"])
def test_rollout_weights_multiply_what_the_control_left(verl: Any, name: str) -> None:
    """verl's correction scales each token's loss, a penalty too, and changes neither choice nor denominator."""
    config, values = actor(section_of(name), loss_agg_mode="token-sum"), batch()
    flat = values["log_prob"].detach().clone().requires_grad_()
    loss, plain = run(config, {**values, "log_prob": flat})
    weighted, metrics = run(config, values, weights=True)
    (grad,) = torch.autograd.grad(loss, flat)
    weights = torch.where(values["response_mask"], values["rollout_is_weights"], 0.0)
    torch.testing.assert_close(grad_of(weighted, values), grad * weights, **EXACT)
    assert metrics == plain


def test_draws_depend_on_contents_alone(verl: Any) -> None:
    config, values = actor(section_of("clip_cov")), batch()
    first = grad_of(run(config, values)[0], values)
    torch.rand(3)  # the global generator is not asked
    assert torch.equal(grad_of(run(config, values)[0], values), first)
    keys = [keyed_tokens(x["response_mask"], **plain(x)).key for x in (values, batch(), batch(seed=1))]
    assert torch.equal(keys[0], keys[1])
    assert keys[0].unique().numel() == keys[0].numel()
    assert not torch.isin(keys[2], keys[0]).any()


def plain(values: Batch) -> dict[str, Tensor]:
    return {"logps": values["log_prob"], "old_logps": values["old_log_prob"], "advantages": values["advantages"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_is_never_read(verl: Any, dtype: torch.dtype) -> None:
    config, values = actor({"controls": ["steer", "kl_cov"]}), batch(dtype=dtype)
    spoiled = {
        k: x if k == "response_mask" else torch.where(values["response_mask"], x, torch.nan) for k, x in values.items()
    }
    loss, metrics = run(config, values)
    other, other_metrics = run(config, spoiled)
    assert torch.equal(loss, other) and metrics == other_metrics
    assert loss.isfinite() and grad_of(loss, values).isfinite().all()


def test_entropy_reaches_the_control_and_carries_no_gradient(verl: Any) -> None:
    """80/20 with the entropies of the micro-batch: only the most uncertain fifth of its tokens is trained on."""
    config, values = actor({"controls": ["high_entropy"], "surrogate": "unclipped"}), batch()
    values["entropy"].requires_grad_()
    loss, metrics = run(config, values)
    valid = values["entropy"][values["response_mask"]]
    trained = grad_of(loss, values) != 0
    assert (trained == (values["response_mask"] & (values["entropy"] >= valid.quantile(0.8)))).all()
    assert metrics["actor/high_entropy/masked"] == pytest.approx(1 - float(trained.sum()) / len(valid), abs=1e-12)
    assert torch.autograd.grad(loss, values["entropy"], allow_unused=True) == (None,)


def test_entropy_that_was_not_computed_is_asked_for(verl: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"high_entropy needs each token's entropy: set actor.calculate_entropy=true"
    ):
        run(actor({"controls": ["high_entropy"]}), batch(), entropy=False)
    loss, _ = run(actor({"controls": ["kl_cov"]}), batch(), entropy=False)
    assert loss.isfinite()


def test_metrics_are_what_verl_logs(verl: Any) -> None:
    config, values = (
        actor({"controls": ["kl_cov"], "surrogate": {"name": "ppo_clip", "low": 0.1, "high": 0.3}}),
        batch(),
    )
    _, metrics = run(config, values)
    tokens, _ = tokens_of(values, config)
    x, a = (tokens.logps - tokens.old_logps).detach(), tokens.advantages
    clipped = ((x.exp() > 1.3) & (a > 0)) | ((x.exp() < 0.9) & (a < 0))
    assert metrics.keys() == {f"actor/{k}" for k in ("kl_cov/selected", "kl_cov/cov", "pg_clipfrac", "ppo_kl")}
    assert all(type(x) is float for x in metrics.values())
    assert metrics["actor/ppo_kl"] == pytest.approx(-float(x.mean()), abs=1e-12)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(float(clipped.double().mean()), abs=1e-12)


def test_micro_batch_without_tokens_is_a_differentiable_zero(verl: Any) -> None:
    for name in PORTABLE:
        config, values = actor(section_of(name)), batch()
        config.global_batch_info["batch_num_tokens"] = 40
        loss, metrics = run(config, {**values, "response_mask": torch.zeros(B, T, dtype=torch.bool)})
        assert loss == 0 and (grad_of(loss, values) == 0).all()
        assert set(metrics.values()) == {0.0}


def test_surrogate_is_that_of_the_controls_paper(verl: Any) -> None:
    from_paper = policy_loss(loss_mode="rlvr", controls="kl_cov").rlvr.surrogate
    assert from_paper == SURROGATES["unclipped"]()
    assert policy_loss(loss_mode="rlvr", controls=["steer"]).rlvr.surrogate == SURROGATES["ppo_clip"]()
    explicit = policy_loss(loss_mode="rlvr", controls=["kl_cov"], surrogate={"name": "cispo", "ratio_high": 4.0})
    assert explicit.rlvr.surrogate == SURROGATES["cispo"](ratio_high=4.0)


@pytest.mark.parametrize("name", CASES)
def test_every_control_works_or_says_why_not(verl: Any, name: str) -> None:
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]) as raised:
            policy_loss(loss_mode="rlvr", **section_of(name))
        assert name in str(raised.value) and "\n" not in str(raised.value)
    else:
        (control,) = policy_loss(loss_mode="rlvr", **section_of(name)).rlvr.controls
        assert control.scope == "micro_batch"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"loss_mode": "vanilla"}, "loss_mode='vanilla'.*write rlvr"),
        ({"control": ["steer"]}, "option='control'.*did you mean controls"),
        ({"clip_cov_ratio": 0.1}, "policy_loss.clip_cov_ratio=0.1 does nothing"),
        ({"controls": [{"name": "steer", "scope": "rollout"}]}, "steer: scope='rollout'.*leave it out"),
        ({"controls": [{"name": "steer", "form": "full"}]}, "steer needs tokens.mean_discriminator"),
        ({"controls": ["ster"]}, "controls='ster' is not known; did you mean steer"),
        ({"controls": ["steer", "steer"]}, "controls names steer 2 times"),
        ({"surrogate": {"name": "dppo", "anchor": "rollout"}}, "anchor='rollout'.*rollout_correction"),
        ({"surrogate": "ppo"}, "surrogate='ppo' is not known"),
    ],
)
def test_section_that_cannot_work_is_refused(verl: Any, section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        policy_loss(**{"loss_mode": "rlvr", **section})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "options", "said"),
    [
        ({}, {"clip_ratio_high": 0.28}, "actor.clip_ratio_high=0.28 does nothing.*surrogate"),
        ({}, {"tau_neg": 2.0}, "actor.tau_neg=2.0 does nothing"),
        ({"surrogate": "gspo"}, {}, "loss_agg_mode=token-mean.*seq-mean-token-mean"),
        ({"surrogate": "gmpo"}, {"loss_agg_mode": "token-sum"}, "loss_agg_mode=token-sum"),
    ],
)
def test_actor_that_contradicts_the_objective_is_refused(
    verl: Any, section: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(actor(section, **options), batch())


def test_ppo_loss_is_wrapped_once_and_only_for_entropy(verl: Any) -> None:
    original = verl.ppo_loss
    policy_loss(loss_mode="rlvr", controls=["clip_cov"])
    assert verl.ppo_loss is original
    policy_loss(loss_mode="rlvr", controls=["steer"])
    wrapped = verl.ppo_loss
    assert wrapped is not original
    policy_loss(loss_mode="rlvr", controls=["steer"])
    assert verl.ppo_loss is wrapped


def test_other_verl_is_refused(verl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "ppo_loss", lambda config, model_output, batch: None)
    with pytest.raises(ConfigError, match=r"takes config, model_output, batch instead of .*verl 0\.9\.1"):
        pass_entropy()
