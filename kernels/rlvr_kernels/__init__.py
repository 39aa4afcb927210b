"""Per-token statistics of a language-model head: log-prob, entropy and moments, with their gradients.

This package never imports rlvr: a kernel computes statistics; what an objective does with them is not its business.
"""

from rlvr_kernels.reference import TokenStats, logit_stats, token_stats

__all__ = ["TokenStats", "logit_stats", "token_stats"]
