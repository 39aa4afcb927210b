"""Clip_B and Clip_V: spare the rare tokens whose punishment would lower entropy most.

Both read the entropy discriminator S = pi (log pi + H) of the sampled token. To first order, pushing its log-prob by
alpha changes entropy by alpha (E_S - S), so punishing a token with S below E_S lowers it (arXiv 2602.03392).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr.controls.base import Control, Outcome, Scope, check_fraction, check_scope, largest, required
from rlvr.controls.entropy import check_coef
from rlvr.surrogates import Clipped
from rlvr.theory import TokenStatistics
from rlvr.types import Coefficients, Mean, Reduce, Tokens

NO_SPREAD = 1e-12


def discriminator(tokens: Tokens) -> Tensor:
    """S = pi (log pi + H) of the sampled tokens, float64 [N]."""
    entropy = required(tokens.entropy, "entropy")
    return TokenStatistics(logps=tokens.logps, entropy=entropy, step=torch.ones_like(entropy)).discriminator


def spread(values: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, int]:
    """(mean, population standard deviation, number) of all ranks' values [n]; zeros without any. In two passes."""
    count = values.new_tensor(float(values.numel()))
    total, count = reduce.sum(torch.stack([values.sum(), count]))
    mean = total / count.clamp(min=1)
    variance = reduce.sum((values - mean).square().sum()) / count.clamp(min=1)
    return mean, variance.sqrt(), int(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipB(Control):
    """Take out of the loss the punished tokens whose discriminator is far below the mean.

    Drops a token where A < 0 and S - mean S < -mu std S, with S = pi (log pi + H), mean and population standard
    deviation over the scope's tokens. A standard deviation below 1e-12 drops nothing. The denominator shrinks too.

    mu: >= 0; the paper takes 2 to 3. How many tokens that drops depends on the model: S has no tail below
    -exp(-1 - H), so watch clip_b/masked.
    Raises: ValueError if mu is negative or not finite.
    Metrics: clip_b/masked (fraction), clip_b/std (nats).
    Ref: arXiv 2602.03392; its equations are known to us by the code alone (Trinity-RFT).
    Differs: Trinity mixes the engine's log-probs with the trainer's entropies; all statistics are the trainer's here.
    """

    mu: float = 2.5
    scope: Scope = "rollout"

    name: ClassVar[str] = "clip_b"
    levers: ClassVar[Mapping[str, int]] = {"mu": -1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_coef("mu", self.mu)
        check_scope(self.scope)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        s = discriminator(tokens)
        mean, std, _ = spread(s, reduce)
        masked = (tokens.advantages < 0) & (s - mean < -self.mu * std) & (std >= NO_SPREAD)
        metrics = {"clip_b/masked": Mean.of(masked), "clip_b/std": Mean.of(std.expand_as(s))}
        return Outcome(Coefficients(keep=~masked), metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipV(Control):
    """Take out of the loss the punished tokens that lower entropy most, at most a fixed share of all tokens.

    With D = E_S - S, candidates have A < 0 and D > mu std D, the population standard deviation over the scope's
    tokens; the threshold is not centered. The max(int(max_fraction N), 1) candidates of largest D are dropped. A
    standard deviation below 1e-12 drops nothing. The denominator shrinks too.

    mu: >= 0; the paper takes 7.5 to 8.5.   max_fraction: share of the scope's tokens, at least one token.
    Raises: ValueError if mu is negative or not finite, or max_fraction is outside [0, 1].
    Metrics: clip_v/masked, clip_v/candidates (fractions), clip_v/std (nats).
    Ref: arXiv 2602.03392; its equations are known to us by the code alone (Trinity-RFT).
    Differs: Trinity also drops tokens with A = 0, which have no gradient, and does not count them against the cap.
    """

    mu: float = 8.5
    max_fraction: float = 1e-4
    scope: Scope = "rollout"

    name: ClassVar[str] = "clip_v"
    levers: ClassVar[Mapping[str, int]] = {"mu": -1, "max_fraction": +1}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"entropy", "key", "mean_discriminator"})

    def __post_init__(self) -> None:
        check_coef("mu", self.mu)
        check_fraction("max_fraction", self.max_fraction)
        check_scope(self.scope)

    def __call__(self, tokens: Tokens, clipped: Clipped, reduce: Reduce) -> Outcome:
        key = required(tokens.key, "key")
        drop = required(tokens.mean_discriminator, "mean_discriminator").double() - discriminator(tokens)
        _, std, total = spread(drop, reduce)
        candidates = (tokens.advantages < 0) & (drop > self.mu * std) & (std >= NO_SPREAD)
        masked = torch.zeros_like(candidates)
        most = max(int(self.max_fraction * total), 1)
        masked[candidates] = largest(drop[candidates], key[candidates], most, reduce)
        metrics = {
            "clip_v/masked": Mean.of(masked),
            "clip_v/candidates": Mean.of(candidates),
            "clip_v/std": Mean.of(std.expand_as(drop)),
        }
        return Outcome(Coefficients(keep=~masked), metrics)
