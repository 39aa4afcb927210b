"""The shape legend of the project, and the values that travel between its stages.

B sequences, T response positions, N valid tokens, V vocabulary, D hidden. Everything in the core is flat: [N]
tensors of valid tokens, so that there is no padding to forget and no mask to apply twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean as (total, count), which can be added over micro-batches and ranks and divided once."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Mean":
        """The mean of all elements; bool counts as 0/1."""
        values = values.detach()
        return cls(values.sum(dtype=torch.float64), torch.tensor(float(values.numel()), dtype=torch.float64))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """total / count, NaN when nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


Metrics = Mapping[str, Mean]


class Reduce(Protocol):
    """What the core needs of a process group."""

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """Concatenation over ranks along the first dimension, whose length may differ between ranks."""


class LocalReduce:
    """One process: everything is already global."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Valid tokens only. Every tensor is [N]; optional ones are None when nobody asked for them.

    logps: current policy, with gradient.   old_logps: policy at the start of the update, recomputed by the trainer.
    rollout_logps: as the engine reported them.   ref_logps: reference policy.   entropy: nats, of softmax(z /
    temperature).
    mean_discriminator: E_S = sum_v p_v^2 (H + log p_v).   sequence: row of the batch in [0, num_sequences), int64.
    position: of the token in its response, int64.
    key: int64 >= 0, a random number that belongs to the token (see `token_keys`), never to its place in a batch.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    sequence: Tensor
    num_sequences: int
    position: Tensor | None = None
    key: Tensor | None = None
    entropy: Tensor | None = None
    rollout_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    mean_discriminator: Tensor | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            x = getattr(self, f.name)
            if isinstance(x, Tensor) and x.shape != self.logps.shape:
                raise ValueError(f"Tokens.{f.name} has shape {tuple(x.shape)}, logps has {tuple(self.logps.shape)}")
        if self.logps.dim() != 1:
            raise ValueError(f"Tokens are flat: logps must be [N], got shape {tuple(self.logps.shape)}")

    def __len__(self) -> int:
        return self.logps.numel()

    @classmethod
    def from_padded(cls, mask: Tensor, **padded: Tensor | None) -> "Tokens":
        """Flatten (B, T) tensors to the tokens where mask is true; a (B,) or (B, 1) advantage is spread over its row.

        A token's sequence is its row, its position its column.
        """
        mask = mask.bool()
        rows = torch.arange(mask.size(0), device=mask.device)
        columns = torch.arange(mask.size(1), device=mask.device).unsqueeze(0)

        def flat(x: Tensor) -> Tensor:
            x = x.unsqueeze(1) if x.dim() == 1 else x
            return x.expand_as(mask)[mask]

        values = {name: flat(x) for name, x in padded.items() if x is not None}
        return cls(sequence=flat(rows), position=flat(columns), num_sequences=mask.size(0), **values)

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Sum of values [N] over the tokens of each sequence, [num_sequences]."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def sequence_means(self, values: Tensor) -> Tensor:
        """Mean of values [N] over the tokens of each sequence, [num_sequences]; 0 without tokens."""
        return self.sequence_sums(values) / self.sequence_sums(torch.ones_like(values)).clamp(min=1)

    def select(self, keep: Tensor) -> "Tokens":
        """The tokens where keep [N] is true; rows keep their numbers."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: x[keep] if isinstance(x, Tensor) else x for name, x in picked.items()}
        return Tokens(**picked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """What a control decides per token: None is neutral, everything else is [N] and detached.

    weight: >= 0, multiplies the surrogate; the denominator stays.   keep: False takes the token out of the loss and
    of its denominator.   advantage: added to the advantage before the surrogate.
    drift: scales |log pi - log pi_old|.   entropy: scales the entropy bonus.   reference: scales the KL to the
    reference policy.
    """

    weight: Tensor | None = None
    keep: Tensor | None = None
    advantage: Tensor | None = None
    drift: Tensor | None = None
    entropy: Tensor | None = None
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if any(x.requires_grad for x in self.present().values()):
            raise ValueError("Coefficients must be detached: a control decides, it does not learn")

    def present(self) -> dict[str, Tensor]:
        """The coefficients that are not neutral, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def combine(self, other: "Coefficients") -> "Coefficients":
        """Both at once: weights multiply, keep is both, the rest add."""
        mine, theirs = self.present(), other.present()
        both = {**mine, **theirs}
        for name in mine.keys() & theirs.keys():
            if name == "weight":
                both[name] = mine[name] * theirs[name]
            elif name == "keep":
                both[name] = mine[name] & theirs[name]
            else:
                both[name] = mine[name] + theirs[name]
        return Coefficients(**both)

    def select(self, keep: Tensor) -> "Coefficients":
        """The coefficients of the tokens where keep [N] is true, with `keep` itself spent."""
        return replace(Coefficients(**{name: x[keep] for name, x in self.present().items()}), keep=None)


def token_keys(seed: int, step: int, sequence: Tensor, position: Tensor) -> Tensor:
    """Uniform random int64 in [0, 2^53) that depend on (seed, step, sequence, position) alone, any equal shapes.

    `sequence` is the sequence's number in the whole rollout, over all ranks: the same token draws the same number
    however the batch is ordered, cut into micro-batches or spread over ranks. SplitMix64 (Steele et al. 2014).
    """
    x = torch.full_like(sequence, _signed(_mix_int(seed * _GOLDEN + step)), dtype=torch.int64)
    for part in (sequence, position):
        x = _mix(x + part.to(torch.int64) * _signed(_GOLDEN))
    return _shift(x, 11)


_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _mix_int(x: int) -> int:
    x &= (1 << 64) - 1
    x = ((x ^ (x >> 30)) * _M1) & ((1 << 64) - 1)
    x = ((x ^ (x >> 27)) * _M2) & ((1 << 64) - 1)
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_M1)
    x = (x ^ _shift(x, 27)) * _signed(_M2)
    return x ^ _shift(x, 31)
