"""Routing rules: from a router's logits to the weights of the experts of each token, as pure functions.

Every rule sees one token at a time, so that a token is routed alike in training, in sampling, and in any batch. That
is why no rule has a capacity (Switch Transformer, C tokens per expert): what it drops depends on the rest of the
batch, and engine and trainer would disagree.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["release", "reach"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where tokens go; every field [..., E].

    probs: softmax of the router's logits, with gradient.   weight: of the experts' outputs, 0 where not selected, with
    gradient.   selected: bool.
    """

    probs: Tensor
    weight: Tensor
    selected: Tensor


def tsallis_entropy(probs: Tensor, q: float, normalized: bool = False, eps: float = 0.0) -> Tensor:
    """T_q(p) = (1 - sum_e p_e^q) / (q - 1), Shannon's -sum_e p_e log p_e at q = 1; [..., E] to [...].

    normalized: divided by the largest that E experts can have, (1 - E^(1 - q)) / (q - 1), so that it lies in [0, 1];
    one expert has 0.   eps: added to every probability as DynMoLE's release does (1e-5), which biases T_q by up to
    3e-4.
    Differs from the release: exact at p = 0 without eps, in value and gradient.
    Raises: ValueError unless q > 0 and finite.   Ref: Tsallis 1988; DynMoLE, Li et al. 2025, arXiv 2504.00661.
    """
    if not 0 < q < math.inf:
        raise ValueError(f"q={q}: must be > 0 and finite")
    experts, p = probs.size(-1), probs + eps
    safe = torch.where(p > 0, p, 1.0)
    if q == 1:
        entropy = -(safe * safe.log()).sum(-1)
    else:
        near_1 = abs(q - 1) < 0.5  # where p - p^q is a small difference; elsewhere p^(q - 1) may overflow
        lost = -safe * torch.expm1((q - 1) * safe.log()) if near_1 else safe - safe**q
        entropy = lost.sum(-1) / (q - 1) - experts * eps / (q - 1)
    if not normalized or experts == 1:
        return entropy
    most = math.log(experts) if q == 1 else -math.expm1((1 - q) * math.log(experts)) / (q - 1)
    return entropy / most


def hybrid_route(
    probs: Tensor,
    *,
    q: float = 1.1,
    threshold: float = 0.9,
    top_p: float = 0.75,
    min_k: int = 2,
    rule: Rule = "release",
    normalized: bool = True,
    eps: float = 0.0,
) -> Routing:
    """DynMoLE: all experts where the router is uncertain, T_q > threshold, else few.

    release: the authors' code. Experts whose cumulative probability, from the largest down, is at most top_p, but at
    least min_k; weights are the probabilities, not renormalized, so that a sure token gets less than 1 in all.
    reach: the smallest set that reaches top_p, at least min_k, renormalized to 1.

    probs: [..., E].   threshold: of the entropy, normalized or not.
    Raises: ValueError for q <= 0, top_p outside (0, 1], min_k outside [1, E], or an unknown rule.
    Ref: arXiv 2504.00661; github.com/mikecovlee/DynMoLE at 9354b27.   Differs: `eps` 0, see `tsallis_entropy`.
    """
    _check_share("top_p", top_p)
    _check_count("min_k", min_k, probs.size(-1))
    if rule not in ("release", "reach"):
        raise ValueError(f"rule={rule!r}: must be 'release' or 'reach'")
    ordered, order = probs.detach().sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    few = reached <= top_p if rule == "release" else reached - ordered < top_p
    few[..., :min_k] = True
    entropy = tsallis_entropy(probs.detach(), q, normalized, eps)
    soft = (entropy.clamp(max=1.0) if normalized else entropy) > threshold  # rounding must not exceed 1
    selected = torch.zeros_like(few).scatter(-1, order, few) | soft.unsqueeze(-1)
    return _routed(probs, selected, renormalize=rule == "reach")


def top_k_route(probs: Tensor, k: int) -> Routing:
    """The k likeliest experts, renormalized (MixLoRA, MoLA). With k = 1 the weight is 1: the router learns nothing
    but by its auxiliary loss; `switch_route` is the rule for one expert.

    probs: [..., E].   Raises: ValueError for k outside [1, E].
    Ref: MixLoRA, Li et al. 2024, arXiv 2404.15159; MoLA, Gao et al. 2024, arXiv 2402.08562.
    """
    _check_count("k", k, probs.size(-1))
    return _routed(probs, _largest(probs, k), renormalize=True)


def switch_route(probs: Tensor) -> Routing:
    """The likeliest expert, weighted by its probability.   Ref: Fedus et al. 2022, arXiv 2101.03961, Eq. 2."""
    return _routed(probs, _largest(probs, 1), renormalize=False)


def top_p_route(probs: Tensor, top_p: float) -> Routing:
    """The likeliest experts until they hold more than top_p, weighted by their probabilities (MixLoRA's "dynamic").

    probs: [..., E].   Raises: ValueError for top_p outside (0, 1].
    Ref: Huang et al. 2024, arXiv 2403.07652; MoE-PEFT's mixlora-dynamic, top_p .8.
    """
    _check_share("top_p", top_p)
    ordered, order = probs.detach().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return _routed(probs, torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before <= top_p))


def soft_route(probs: Tensor) -> Routing:
    """All experts, weighted by their probabilities (LoRAMoE).   Ref: Dou et al. 2023, arXiv 2312.09979."""
    return _routed(probs, torch.ones_like(probs, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ auxiliary losses


def load_balance(load: Tensor, probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """E * sum_e mean(load_e) mean(p_e), a scalar: least where load and probability are spread evenly.

    load: [M, E]; where tokens go, selected experts as 0 and 1 in Mixtral's convention (k slots: balanced is k), their
    weights in DynMoLE's release.   probs: [M, E].   mask: [M] bool, False for padding.   No token gives 0.
    Ref: Fedus et al. 2022, Eq. 4.
    """
    return probs.size(-1) * (masked_mean(load, mask) * masked_mean(probs, mask)).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean (logsumexp_e z_e)^2, a scalar.   logits: [M, E].   mask: [M] bool.

    Ref: Zoph et al. 2022, arXiv 2202.08906, Eq. 5.
    """
    return masked_mean(logits.logsumexp(-1).square(), mask)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of x [M, ...] over the tokens of a mask [M]; 0 without any."""
    if mask is not None:
        x = x[mask]
    return x.sum(0) / max(len(x), 1)


# ------------------------------------------------------------------------------------------------ parts


def _routed(probs: Tensor, selected: Tensor, renormalize: bool = False) -> Routing:
    weight = torch.where(selected, probs, 0.0)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return Routing(probs=probs, weight=weight, selected=selected)


def _largest(probs: Tensor, k: int) -> Tensor:
    """Where the k largest are, ties by number: bool, the shape of probs."""
    order = probs.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, True)


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: must lie in (0, 1]")


def _check_count(name: str, value: int, experts: int) -> None:
    if type(value) is not int:
        raise ValueError(f"{name}={value!r}: must be a whole number")
    if not 1 <= value <= experts:
        raise ValueError(f"{name}={value}: must lie in [1, {experts}], the number of experts")
