"""Per-token statistics of a language-model head: log-prob, entropy and moments, with their gradients.

`token_stats` computes them from hidden states without the logits; `rlvr_kernels.reference` says what they are.
This package never imports rlvr: a kernel computes statistics; what an objective does with them is not its business.
"""

from rlvr_kernels.dispatch import Choice, choose_backend
from rlvr_kernels.fused import token_stats
from rlvr_kernels.reference import logit_stats
from rlvr_kernels.stats import TokenStats

__all__ = ["Choice", "TokenStats", "choose_backend", "logit_stats", "token_stats"]
