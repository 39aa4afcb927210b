"""The histograms of a step's tokens: what they count, and their bins, the same in every run so that runs compare."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Histogram:
    """n edges make n + 1 bins: below the first edge, [edge, next edge), from the last edge on.

    A histogram whose bins change gets another name: a record holds its counts alone.
    """

    unit: str
    meaning: str
    edges: tuple[float, ...]


def _mirrored(*edges: float) -> tuple[float, ...]:
    return (*(-edge for edge in reversed(edges)), *edges)


HISTOGRAMS = {
    "entropy": Histogram(
        "nats",
        "entropy of the trained tokens, those too that a control masks",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8),
    ),
    "covariance": Histogram(
        "nats",
        "(A - mean A)(logp - mean logp) of the trained tokens: the right tail drives entropy down",
        _mirrored(0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10),
    ),
    "advantage": Histogram(
        "reward", "advantage of the trained tokens", _mirrored(0.001, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3)
    ),
    "weight": Histogram(
        "1",
        "weight that controls and engine correction put on the trained tokens, 0 for those taken out of the loss",
        (0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.01, 1.1, 1.25, 1.5, 2, 3),
    ),
    "mismatch": Histogram(
        "nats",
        "|trainer log-prob - engine log-prob| of the rollout's tokens",
        (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3),
    ),
}
