"""Which tokens fit into a token budget."""

import torch
from torch import Tensor


def kept_tokens(lengths: Tensor, budget: int, *, whole_responses: bool) -> Tensor:
    """How many tokens of each response [S] to train on: responses are taken in order until `budget` is reached.

    The response that reaches it is cut at the budget, so that the sum is min(sum of lengths, budget); whole_responses
    keeps all of it, and the sum may exceed the budget by less than that response.
    lengths: int64 [S].
    Ref: Ring-lite, arXiv 2506.14731, the caption of Fig. 3 (cut) and Eq. 3 (whole).
    """
    left = (budget - (lengths.cumsum(0) - lengths)).clamp(min=0)
    return torch.where(left > 0, lengths, 0) if whole_responses else torch.minimum(lengths, left)
