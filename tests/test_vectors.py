"""Worked cases in float64 (tests/data/vectors.json): inputs, parameters and expected numbers of each method."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlvr.advantages import gae, group_relative, whiten
from rlvr.controls import ClipCov, Control, KlCov, apply
from rlvr.controls.entropy import AdaptiveEntropy, EntropyAdvantage, EntropyBonus, HighEntropyTokens, upper_quantile
from rlvr.controls.mismatch import GeometricGate, IcePop, Mis, OffPolicyMask, Tis, log_gap
from rlvr.objective import aggregate, policy_loss
from rlvr.surrogates import Cispo, Clipped, Dppo, Gmpo, Gpg, Gspo, PpoClip, Sapo, Surrogate
from rlvr.types import Coefficients, LocalReduce, Tokens, token_keys

VECTORS = {v["id"]: v for v in json.loads((Path(__file__).parent / "data" / "vectors.json").read_text())["vectors"]}
EXACT = {"rtol": 0.0, "atol": 1e-10}
NUMERICAL_GRADIENT = {"rtol": 0.0, "atol": 2e-8}  # the cases' gradients are central differences


def cases(prefix: str) -> Any:
    return pytest.mark.parametrize(
        "case", [v for k, v in VECTORS.items() if k.split("/")[0] == prefix], ids=lambda v: v["id"]
    )


def tensor(x: Any) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def setup(case: dict[str, Any], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    """(padded log-probs that carry the gradient, mask, tokens)"""
    x = {k: tensor(v) for k, v in case["inputs"].items()}
    logps = x["logp"].requires_grad_()
    mask = x["mask"].bool()
    row, col = torch.meshgrid(*[torch.arange(n) for n in mask.shape], indexing="ij")
    tokens = Tokens.from_padded(
        mask,
        logps=logps,
        old_logps=x.get("old_logp", x["logp"].detach()),
        advantages=x["adv"],
        key=token_keys(seed, 0, row, col),
    )
    return logps, mask, tokens


def check_loss(case: dict[str, Any], loss: torch.Tensor, logps: torch.Tensor) -> None:
    expected = case["expected"]
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **EXACT)
    if "grad_logp" in expected:
        (grad,) = torch.autograd.grad(loss, logps)
        torch.testing.assert_close(grad, tensor(expected["grad_logp"]), **NUMERICAL_GRADIENT)


def ppo(p: dict[str, Any]) -> PpoClip:
    return PpoClip(low=p["eps_low"], high=p["eps_high"], dual_clip=p.get("dual_clip"))


@cases("agg")
def test_aggregation(case: dict[str, Any]) -> None:
    loss, mask = tensor(case["inputs"]["loss_mat"]), tensor(case["inputs"]["mask"]).bool()
    flat = loss[mask]
    tokens = Tokens.from_padded(mask, logps=loss, old_logps=loss, advantages=loss)
    mode, const = case["params"]["mode"], case["params"]["const"]
    denominator = const * mask.size(0) if mode == "dr_grpo" else const
    got = aggregate(flat, tokens, mode=mode, denominator=denominator)
    torch.testing.assert_close(got, tensor(case["expected"]["loss"]), **EXACT)


@cases("grpo_adv")
def test_group_relative_advantage(case: dict[str, Any]) -> None:
    rewards, group, p = tensor(case["inputs"]["rewards"]), torch.tensor(case["inputs"]["group"]), case["params"]
    got = group_relative(rewards, group, scale=p["scale"], eps=p["eps"], ddof=p["ddof"])
    torch.testing.assert_close(got, tensor(case["expected"]["advantage"]), **EXACT)


@cases("gae")
def test_generalized_advantage(case: dict[str, Any]) -> None:
    rewards, values, mask = (tensor(case["inputs"][name]) for name in ("rewards", "values", "mask"))
    advantages, returns = gae(rewards, values, mask, **case["params"])
    got = {"adv_raw": advantages, "returns": returns, "adv_whitened": whiten(advantages, mask)}
    for name, expected in case["expected"].items():
        torch.testing.assert_close(got[name], tensor(expected), **EXACT)


@cases("ppo")
def test_ppo_clip(case: dict[str, Any]) -> None:
    logps, mask, tokens = setup(case)
    surrogate, expected = ppo(case["params"]), case["expected"]
    torch.testing.assert_close(
        surrogate.loss(surrogate.ratio(tokens), tokens).detach(), tensor(expected["token_loss"])[mask], **EXACT
    )
    assert torch.equal(surrogate.clipped(surrogate.ratio(tokens), tokens).any, torch.tensor(expected["clipped"])[mask])
    check_loss(case, policy_loss(tokens, surrogate, Coefficients(), mode=case["params"]["mode"]), logps)


@cases("gspo")
def test_gspo(case: dict[str, Any]) -> None:
    logps, _, tokens = setup(case)
    surrogate = Gspo(low=case["params"]["eps_low"], high=case["params"]["eps_high"])
    if "seq_ratio" in case["expected"]:
        got = torch.stack([surrogate.ratio(tokens)[tokens.sequence == i][0] for i in range(tokens.num_sequences)])
        torch.testing.assert_close(got.detach(), tensor(case["expected"]["seq_ratio"]), **EXACT)
    check_loss(case, policy_loss(tokens, surrogate, Coefficients(), mode="seq_mean_token_mean"), logps)


@cases("cispo")
def test_cispo(case: dict[str, Any]) -> None:
    logps, mask, tokens = setup(case)
    surrogate = Cispo(ratio_low=1 - case["params"]["eps_low"], ratio_high=1 + case["params"]["eps_high"])
    torch.testing.assert_close(
        surrogate.loss(surrogate.ratio(tokens), tokens).detach(), tensor(case["expected"]["token_loss"])[mask], **EXACT
    )
    check_loss(case, policy_loss(tokens, surrogate, Coefficients(), mode="token_mean"), logps)


@cases("sapo")
def test_sapo(case: dict[str, Any]) -> None:
    logps, mask, tokens = setup(case)
    surrogate = Sapo(**case["params"])
    torch.testing.assert_close(
        surrogate.loss(surrogate.ratio(tokens), tokens).detach(), tensor(case["expected"]["token_loss"])[mask], **EXACT
    )
    check_loss(case, policy_loss(tokens, surrogate, Coefficients(), mode="seq_mean_token_mean"), logps)


@cases("gmpo")
def test_gmpo(case: dict[str, Any]) -> None:
    logps, mask, tokens = setup(case)
    surrogate = Gmpo(low=case["params"]["eps_low"], high=case["params"]["eps_high"])
    loss = policy_loss(tokens, surrogate, Coefficients(), mode="seq_mean_token_mean")
    clipped = surrogate.clipped(surrogate.ratio(tokens), tokens).any
    assert torch.equal(clipped, tensor(case["expected"]["grad_logp"])[mask] == 0)
    check_loss(case, loss, logps)


@cases("gpg")
def test_gpg(case: dict[str, Any]) -> None:
    logps, _, tokens = setup(case)
    mode = case["params"].get("mode", "token_mean")
    check_loss(case, policy_loss(tokens, Gpg(), Coefficients(), mode=mode), logps)


@cases("dppo")
def test_dppo(case: dict[str, Any]) -> None:
    logps, mask, tokens = setup(case)
    p = case["params"]
    surrogate = Dppo(low=p["mask_low"], high=p["mask_high"], kl_coef=p["kl_tau"])
    keep = ~surrogate.clipped(surrogate.ratio(tokens), tokens).any
    assert torch.equal(keep, torch.tensor(case["expected"]["keep"])[mask])
    loss = policy_loss(tokens, surrogate, Coefficients(), mode="token_mean", denominator=1.0)
    check_loss({"expected": {**case["expected"], "loss": case["expected"]["loss_sum"]}}, loss, logps)


def clip_cov_loss(case: dict[str, Any], seed: int, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, Coefficients]:
    logps, mask, tokens = setup(case, seed)
    p, surrogate = case["params"], ppo(case["params"])
    control = ClipCov(fraction=p["clip_ratio"], low=p["cov_lb"], high=p["cov_ub"], scope="micro_batch", **changes)
    coefficients, metrics = apply([control], tokens, surrogate.clipped(surrogate.ratio(tokens), tokens), LocalReduce())
    expected = case["expected"]
    if "candidates" in expected and not changes:
        share = tensor(expected["candidates"]).sum().item() / mask.sum().item()
        assert metrics["clip_cov/candidates"].value() == pytest.approx(share, abs=1e-12)
    return policy_loss(tokens, surrogate, coefficients, mode="token_mean"), logps, coefficients


@cases("clip_cov")
def test_clip_cov(case: dict[str, Any]) -> None:
    expected, mask = case["expected"], tensor(case["inputs"]["mask"]).bool()
    if "possible_losses" in expected:
        losses = [clip_cov_loss(case, seed)[0].item() for seed in range(300)]
        nearest = [min(range(3), key=lambda i, x=x: abs(x - expected["possible_losses"][i])) for x in losses]
        assert all(
            math.isclose(x, expected["possible_losses"][i], abs_tol=1e-10)
            for x, i in zip(losses, nearest, strict=True)
        )
        assert all(60 <= nearest.count(i) <= 140 for i in range(3))  # uniform: 100 +- 4.9 sigma
        return
    loss, logps, coefficients = clip_cov_loss(case, 0)
    if "selected" in expected:
        assert coefficients.weight is not None
        assert torch.equal(coefficients.weight == 0, torch.tensor(expected["selected"])[mask])
    check_loss(case, loss, logps)
    if "candidates_paper_no_exclusion" in expected:
        _, _, coefficients = clip_cov_loss(case, 0, exclude_clipped=False)
        assert coefficients.weight is not None
        assert torch.equal(coefficients.weight == 0, torch.tensor(expected["candidates_paper_no_exclusion"])[mask])


@cases("kl_cov")
def test_kl_cov(case: dict[str, Any]) -> None:
    from rlvr.surrogates import Unclipped

    logps, mask, tokens = setup(case)
    surrogate: Surrogate = Unclipped()
    control = KlCov(fraction=case["params"]["k_frac"], coef=case["params"]["beta"], scope="micro_batch")
    coefficients, _ = apply([control], tokens, surrogate.clipped(surrogate.ratio(tokens), tokens), LocalReduce())
    assert coefficients.drift is not None
    selected = torch.tensor(case["expected"]["selected"])[mask]
    assert torch.equal(coefficients.drift, case["params"]["beta"] * selected.double())
    check_loss(case, policy_loss(tokens, surrogate, coefficients, mode="token_mean"), logps)


def decided(case: dict[str, Any], control: Control, **fields: torch.Tensor) -> tuple[Tokens, Coefficients]:
    """Tokens with these (B, T) fields, log-probs 0 and advantage 1 unless given, and what the control says of them."""
    mask = torch.ones_like(next(iter(fields.values()))).bool()
    if "mask" in case["inputs"]:
        mask = tensor(case["inputs"]["mask"]).bool()
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    tokens = Tokens.from_padded(mask, **{"logps": zeros, "old_logps": zeros, "advantages": zeros + 1, **fields})
    none = torch.zeros(len(tokens), dtype=torch.bool)
    return tokens, apply([control], tokens, Clipped(none, none), LocalReduce()).coefficients


@cases("top_entropy")
def test_high_entropy_tokens(case: dict[str, Any]) -> None:
    mask, entropy = tensor(case["inputs"]["mask"]).bool(), tensor(case["inputs"]["entropy"])
    rho = case["params"]["rho"]
    _, coefficients = decided(case, HighEntropyTokens(fraction=rho), entropy=entropy)
    assert coefficients.weight is not None
    assert torch.equal(coefficients.weight == 1, torch.tensor(case["expected"]["keep"])[mask])
    threshold = upper_quantile(entropy[mask], rho, LocalReduce())
    torch.testing.assert_close(threshold, tensor(case["expected"]["threshold"]), **EXACT)


@cases("entropy_bonus")
def test_entropy_bonus(case: dict[str, Any]) -> None:
    """The bonus on kept tokens only is the bonus times the weight of the control that keeps them."""
    entropy, policy_loss_alone = tensor(case["inputs"]["entropy"]), case["inputs"]["policy_loss"]
    advantages = torch.full_like(entropy, -policy_loss_alone)  # at a ratio of 1 each token's loss is minus this
    control = EntropyBonus(coef=case["params"]["coef"])
    tokens, coefficients = decided(case, control, entropy=entropy, advantages=advantages)
    assert coefficients.entropy is not None
    if "keep" in case["inputs"]:
        kept = tensor(case["inputs"]["keep"])[tensor(case["inputs"]["mask"]).bool()]
        coefficients = Coefficients(entropy=coefficients.entropy * kept)
    loss = policy_loss(tokens, PpoClip(), coefficients, mode="token_mean")
    torch.testing.assert_close(loss, tensor(case["expected"]["loss"]), **EXACT)


@cases("adaptive_entropy")
def test_adaptive_entropy(case: dict[str, Any]) -> None:
    p = case["params"]
    control = AdaptiveEntropy(
        coef=p["c0"],
        target=p["target"],
        delta=p["delta"],
        min_coef=p["c_min"],
        max_coef=p["c_max"],
        inclusive=p["inclusive"],
    )
    for entropy, step in zip(case["inputs"]["entropy_trace"], case["expected"]["steps"], strict=True):
        control = control.observe(entropy)
        assert control.enabled == step["enabled"]
        assert control.coef == pytest.approx(step["coef"], abs=1e-12)
        assert control.applied == pytest.approx(step["applied"], abs=1e-12)


@cases("adv_shaping")
def test_entropy_advantage(case: dict[str, Any]) -> None:
    adv, entropy = tensor(case["inputs"]["adv"]), tensor(case["inputs"]["entropy"])
    control = EntropyAdvantage(alpha=case["params"]["alpha"], kappa=case["params"]["kappa"])
    tokens, coefficients = decided(case, control, entropy=entropy, advantages=adv)
    assert coefficients.advantage is not None
    torch.testing.assert_close(coefficients.advantage, tensor(case["expected"]["psi"]).flatten(), **EXACT)
    shaped = tokens.advantages + coefficients.advantage
    torch.testing.assert_close(shaped, tensor(case["expected"]["adv_shaped"]).flatten(), **EXACT)


@cases("tis")
def test_engine_corrections(case: dict[str, Any]) -> None:
    p, log_ratio = case["params"], tensor(case["inputs"]["log_ratio"])
    control = {
        "token_truncate": lambda: Tis(low=p["c_min"] or 0.0, high=p["c_max"]),
        "sequence_truncate": lambda: Tis(low=p["c_min"] or 0.0, high=p["c_max"], level="sequence"),
        "token_mask": lambda: IcePop(low=p["c_min"], high=p["c_max"]),
        "sequence_mask": lambda: Mis(low=p["c_min"] or 0.0, high=p["c_max"]),
        "geo_mask": lambda: GeometricGate(low=p["c_min"], high=p["c_max"]),
    }[p["mode"]]()
    _, coefficients = decided(case, control, old_logps=log_ratio, rollout_logps=torch.zeros_like(log_ratio))
    assert coefficients.weight is not None
    expected = tensor(case["expected"]["weight"])[tensor(case["inputs"]["mask"]).bool()]
    torch.testing.assert_close(coefficients.weight, expected, **EXACT)


@cases("offpolicy_mask")
def test_off_policy_mask(case: dict[str, Any]) -> None:
    x, expected = {k: tensor(v) for k, v in case["inputs"].items()}, case["expected"]
    fields = {"logps": x["logp"], "rollout_logps": x["sampling_logp"], "advantages": x["adv_seq"]}
    tokens, coefficients = decided(case, OffPolicyMask(delta=case["params"]["delta"]), **fields)
    assert coefficients.weight is not None
    assert torch.equal(coefficients.weight == 1, torch.tensor(expected["keep_seq"])[tokens.sequence])
    mean = tokens.sequence_means(log_gap(fields["rollout_logps"], x["logp"])[x["mask"].bool()])
    torch.testing.assert_close(mean, tensor(expected["mean_kl"]), **EXACT)
