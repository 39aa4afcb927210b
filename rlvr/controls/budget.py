"""C3PO's token budget: an optimizer step trains on so many tokens at most, and divides by that number."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.budget import kept_tokens
from rlvr.controls.base import Control, Outcome, Scope, required
from rlvr.surrogates import Clipped
from rlvr.types import Coefficients, Mean, Reduce, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget(Control):
    """Train each optimizer step on at most a fixed number of tokens: responses in random order until it is reached.

    The response that reaches it is cut after its first tokens. The loss is the sum over the kept tokens / tokens, even
    where fewer or more are kept; this is aggregation `token_budget`.

    tokens: of one optimizer step over all ranks, >= 1.   whole_responses: do not cut the last response, go over the
    budget.
    Raises: ValueError if tokens is no whole number >= 1.
    Metrics: token_budget/kept (share of the step's tokens), token_budget/filled (kept tokens over the budget).
    Ref: Ring team 2025, Ring-lite, arXiv 2506.14731, Eq. 2-3.
    Differs: the paper has both variants and no order; the order is random by the key of each response's first token,
    hence the same however responses are spread over ranks. Its training code is not public.
    """

    tokens: int = 409_600
    whole_responses: bool = False

    name: ClassVar[str] = "token_budget"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"key", "position"})

    @property
    def scope(self) -> Scope:
        """The budget is that of an optimizer step."""
        return "optimizer_step"

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: must be a whole number >= 1, of one optimizer step")

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        key, position = required(tokens.key, "key"), required(tokens.position, "position")
        _, response, lengths = tokens.sequence.unique(return_inverse=True, return_counts=True)
        by_position = position.argsort(stable=True)
        in_order = by_position[response[by_position].argsort(stable=True)]  # by response, then by position
        start = lengths.cumsum(0) - lengths
        place = torch.empty_like(response)
        place[in_order] = torch.arange(len(tokens), device=place.device) - start[response[in_order]]
        kept, total = self._select(key[in_order[start]], lengths, reduce)
        keep = place < kept[response]
        filled = (total.double() / self.tokens).expand(len(tokens))
        return Outcome(
            Coefficients(keep=keep), {"token_budget/kept": Mean.of(keep), "token_budget/filled": Mean.of(filled)}
        )

    def _select(self, key: Tensor, lengths: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """(kept tokens of each response [S] of this rank, their number over all ranks), responses in order of key."""
        everyone = reduce.gather(torch.stack([key, lengths], dim=1))
        everyone = everyone[everyone[:, 0].argsort(stable=True)]
        kept = kept_tokens(everyone[:, 1], self.tokens, whole_responses=self.whole_responses)
        mine = torch.searchsorted(everyone[:, 0].contiguous(), key)
        return kept[mine], kept.sum()
