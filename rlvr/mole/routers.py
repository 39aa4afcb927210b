"""Routers by name: a routing rule with its hyper-parameters and auxiliary losses. Adding one is a class and a line."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlvr.controls import build
from rlvr.mole.router import (
    Routing,
    Rule,
    hybrid_route,
    load_balance,
    masked_mean,
    soft_route,
    switch_route,
    top_k_route,
    top_p_route,
    tsallis_entropy,
    z_loss,
)

MOST_EXPERTS = 4096
Load = Literal["selected", "weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(ABC):
    """What all routers have: called on probabilities [..., E], it gives a Routing.

    q: index of the Tsallis entropy T_q that is reported, and that `entropy_coef` weighs.   normalized: T_q divided by
    the largest that so many experts can have.   eps: added to every probability in T_q, as DynMoLE's release does.
    entropy_coef: of mean T_q in `auxiliary_loss`.   balance_coef: of the load balance there.
    z_coef: of the z-loss there. The means are over all routers of the model and all tokens but padding.
    Raises: ValueError for q <= 0 or a negative coefficient.
    """

    load: ClassVar[Load] = "selected"  # what of a routing the balance counts

    q: float = 1.1
    normalized: bool = True
    eps: float = 0.0
    entropy_coef: float = 0.0
    balance_coef: float = 0.001
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("k", "min_k"):
            value = getattr(self, name, 1)
            if type(value) is not int or not 1 <= value <= MOST_EXPERTS:
                raise ValueError(f"{name}={value!r}: must be a whole number of experts in [1, {MOST_EXPERTS}]")
        self(torch.full((self.fewest,), 1 / self.fewest))  # rules check their own options
        tsallis_entropy(torch.ones(1), self.q)
        for name in ("eps", "entropy_coef", "balance_coef", "z_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 0 and finite")

    @property
    def fewest(self) -> int:
        """Experts that this router needs."""
        return 1

    @property
    def penalizes(self) -> bool:
        """Whether there is an auxiliary loss."""
        return bool(self.entropy_coef or self.balance_coef or self.z_coef)

    @abstractmethod
    def __call__(self, probs: Tensor) -> Routing:
        """Where tokens of these probabilities go."""

    def entropy(self, probs: Tensor) -> Tensor:
        """T_q of each token, [...]."""
        return tsallis_entropy(probs, self.q, self.normalized, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynMole(Router):
    """All experts for uncertain tokens, few for the others; defaults of the authors' release, see `hybrid_route`.

    With threshold 1 routing is never soft (the paper's ablation "without hybrid routing").

    threshold: all experts where T_q is above it, normalized or not.   top_p: else the likeliest ones, by `rule`.
    min_k: at least so many.   rule: release, those whose cumulative probability is at most top_p, weighted by their
    probabilities as they are; reach, the fewest that reach top_p, renormalized.
    entropy_coef: of mean T_q, the paper's beta.
    Ref: Li et al. 2025, arXiv 2504.00661.
    Differs: from the release, eps 0, and padding is in no statistic (there the entropy counts it).
    """

    load: ClassVar[Load] = "weight"

    threshold: float = 0.9
    top_p: float = 0.75
    min_k: int = 2
    rule: Rule = "release"
    entropy_coef: float = 0.01

    def __post_init__(self) -> None:
        Router.__post_init__(self)
        if math.isnan(self.threshold):
            raise ValueError("threshold=nan: must be a number")

    @property
    def fewest(self) -> int:
        return self.min_k

    def __call__(self, probs: Tensor) -> Routing:
        return hybrid_route(
            probs,
            q=self.q,
            threshold=self.threshold,
            top_p=self.top_p,
            min_k=self.min_k,
            rule=self.rule,
            normalized=self.normalized,
            eps=self.eps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(Router):
    """The k likeliest experts, renormalized: MixLoRA, and MoLA with other numbers of experts in each layer.

    k: experts per token. With 1 the weight is 1 and only the balance trains the router: `switch` is the rule for one.
    Ref: MixLoRA, arXiv 2404.15159; MoLA, arXiv 2402.08562.
    Differs: a router for each linear layer; MixLoRA has one for each feed-forward block, and LoRA on attention.
    """

    k: int = 2

    @property
    def fewest(self) -> int:
        return self.k

    def __call__(self, probs: Tensor) -> Routing:
        return top_k_route(probs, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopP(Router):
    """The likeliest experts until they hold more than top_p: MixLoRA's dynamic routing.

    top_p: in (0, 1]; the expert that crosses it is taken.
    Ref: Huang et al. 2024, arXiv 2403.07652; MoE-PEFT's mixlora-dynamic.
    """

    top_p: float = 0.8

    def __call__(self, probs: Tensor) -> Routing:
        return top_p_route(probs, self.top_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch(Router):
    """The likeliest expert, weighted by its probability, with a z-loss.

    z_coef: of the z-loss; 0 for none.
    Ref: Switch Transformer, arXiv 2101.03961; z-loss: ST-MoE, arXiv 2202.08906.
    Differs: no capacity; what it drops would depend on the rest of the batch, and engine and trainer would disagree.
    """

    z_coef: float = 0.001

    def __call__(self, probs: Tensor) -> Routing:
        return switch_route(probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft(Router):
    """All experts, always: LoRAMoE.

    balance_coef: of the load balance; none by default.
    Ref: Dou et al. 2023, arXiv 2312.09979.
    Differs: no localized balancing constraint, which needs labels of tasks.
    """

    load: ClassVar[Load] = "weight"

    balance_coef: float = 0.0

    def __call__(self, probs: Tensor) -> Routing:
        return soft_route(probs)


ROUTERS: Mapping[str, type[Router]] = {
    "dynmole": DynMole,
    "soft": Soft,
    "switch": Switch,
    "top_k": TopK,
    "top_p": TopP,
}
"""Routers by the name that `router` gives them."""


def build_router(spec: str | Mapping[str, Any]) -> Router:
    """The router of a name or of {name: ..., option: ...}. Raises: ConfigError naming option, value and fix."""
    router: Router = build("router", ROUTERS, spec)
    return router


def auxiliary_loss(router: Router, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that a router adds, and its terms `entropy`, `balance` and `z` before their coefficients, all scalars.

    logits: [M, E] of every router of the model, one after the other.   mask: [M] bool, False for padding.
    Ref: DynMoLE, arXiv 2504.00661: beta mean T_q + alpha LB.
    """
    probs = logits.softmax(-1)
    routing = router(probs)
    terms = {
        "entropy": masked_mean(router.entropy(probs), mask),
        "balance": load_balance(getattr(routing, router.load).to(probs.dtype), probs, mask),
        "z": z_loss(logits, mask),
    }
    coefs = {name: getattr(router, f"{name}_coef") for name in terms}
    loss = sum((coefs[name] * term for name, term in terms.items() if coefs[name]), logits.new_zeros(()))
    return loss, {name: term.detach() for name, term in terms.items()}


def options(router: Router) -> dict[str, Any]:
    """The mapping that `build_router` makes the router of."""
    name = next(name for name, kind in ROUTERS.items() if kind is type(router))
    return {"name": name, **{f.name: getattr(router, f.name) for f in fields(router)}}
