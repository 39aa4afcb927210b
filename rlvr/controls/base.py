"""What an entropy control is: a frozen dataclass of hyper-parameters that maps token statistics to coefficients.

No gradient, no state, no logging and no trainer inside. What differs between ranks comes in through `reduce`.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Metrics, Reduce, Tokens

Scope = Literal["rollout", "micro_batch", "optimizer_step"]
"""When a control runs, and on which tokens: see Control."""
SCOPES: tuple[Scope, ...] = ("rollout", "micro_batch")


class Outcome(NamedTuple):
    """What a control decided, and what it has to tell about it."""

    coefficients: Coefficients
    metrics: Metrics


class Control:
    """One entropy-control method. Subclasses are frozen dataclasses of its hyper-parameters.

    scope: "rollout" runs once on the whole rollout batch, over all ranks, with the statistics of the policy that made
    it, so the result does not depend on micro-batches or ranks; "micro_batch" runs on each micro-batch of one rank
    with the current policy, as much published code does; "optimizer_step" runs once on all tokens of a step, over all
    ranks, and knows their keys and positions alone.
    """

    __slots__ = ()

    name: ClassVar[str]
    """In CONTROLS, in front of its metrics, and in recipes."""
    off_policy_only: ClassVar[bool] = False
    """Whether it does nothing while old and current policy are equal; one update per rollout is then refused."""
    surrogate: ClassVar[str | None] = None
    """The surrogate of its paper, where that is not the PPO clip; taken unless a run names one."""
    levers: ClassVar[Mapping[str, int]] = {}
    """Hyper-parameters that a thermostat may move: +1 where a larger value leaves more entropy, -1 where less."""

    @property
    def needs(self) -> frozenset[str]:
        """Optional fields of Tokens that it reads, with these hyper-parameters."""
        return frozenset()

    @property
    @abstractmethod
    def scope(self) -> Scope:
        """When it runs, and on which tokens."""

    @property
    def idle(self) -> bool:
        """Whether these hyper-parameters make it do nothing: a run refuses that unless a thermostat moves it."""
        return False

    @abstractmethod
    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        """What it says of the scope's tokens [N].

        clipped: where the surrogate's bound is active.   reduce: sums and gathers over ranks.
        """

    def observe(self, entropy: float) -> "Control":
        """The control for the next optimizer step, after one with this entropy (nats, token mean over all ranks)."""
        return self


def required(value: Tensor | None, name: str) -> Tensor:
    """The field of Tokens that a control named in `needs`. Raises: ValueError if it was not computed."""
    if value is None:
        raise ValueError(f"tokens.{name} is needed and was not computed")
    return value


def in_loss_precision(decided: Tensor, tokens: Tokens) -> Tensor:
    """A coefficient decided in float64 [N], in the precision of the loss: that of the log-probs, at least float32."""
    return decided.to(torch.promote_types(tokens.logps.dtype, torch.float32))


def check_fraction(name: str, value: float) -> None:
    """Raises: ValueError, naming the option, unless its value lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must lie in [0, 1]")


def check_scope(scope: str) -> None:
    """Raises: ValueError unless it is "rollout" or "micro_batch", the scopes that a control can be set to."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: must be 'rollout' or 'micro_batch'")


def largest(score: Tensor, key: Tensor, k: int, reduce: Reduce) -> Tensor:
    """The k largest scores over all ranks, as a mask over this rank's [n]; ties go to the larger key.

    Every rank sends at most k candidates. All of them when there are fewer than k.
    """
    mine = torch.stack([score.double(), key.double()])
    possible = mine
    if 0 < k < score.numel():  # cheap first cut, so that only ties and candidates are sorted
        possible = mine[:, mine[0] >= mine[0].topk(k).values[-1]]
    possible = possible[:, _descending(possible)[:k]]
    candidates = reduce.gather(possible.T.contiguous()).T
    top = candidates[:, _descending(candidates)[:k]]
    if k <= 0 or top.size(1) == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    last_score, last_key = top[0, -1], top[1, -1]
    return (mine[0] > last_score) | ((mine[0] == last_score) & (mine[1] >= last_key))


def _descending(pairs: Tensor) -> Tensor:
    """Order of [2, n] columns by the first row, then by the second, largest first."""
    by_key = pairs[1].argsort(descending=True, stable=True)
    return by_key[pairs[0, by_key].argsort(descending=True, stable=True)]
