"""What the routers of a model do in its passes: their auxiliary loss, and where tokens go."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from rlvr.errors import ConfigError
from rlvr.mole.experts import Experts
from rlvr.mole.routers import Router, auxiliary_loss
from rlvr.types import Mean, Metrics, Reduce

EDGES = tuple(16 * (2**i - 1) for i in range(15))  # where bins of positions begin, doubling in width: 0, 16, 48, ...
DEAD = 0.01  # of an even share of the tokens: an expert with less of them is dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Sums over tokens, padding left out; float64, so that they add over micro-batches and ranks.

    tokens: [].   entropy, soft, experts: [L], of each layer's router: T_q, tokens sent to all experts, experts.
    load: [L, E], tokens sent to each expert, 0 beyond a layer's experts.
    position_tokens, position_entropy: [P] by bin of positions in the text, prompt included, means over routers.
    position_load: [P, E], sums over routers.
    """

    tokens: Tensor
    entropy: Tensor
    soft: Tensor
    experts: Tensor
    load: Tensor
    position_tokens: Tensor
    position_entropy: Tensor
    position_load: Tensor

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def reduced(self, reduce: Reduce) -> "Traffic":
        """Over all ranks, in one reduction."""
        parts = [getattr(self, f.name) for f in fields(self)]
        sums = reduce.sum(torch.cat([x.flatten() for x in parts])).split([x.numel() for x in parts])
        named = zip(fields(self), sums, parts, strict=True)
        return Traffic(**{f.name: x.view(part.shape).cpu() for f, x, part in named})


@dataclass(slots=True)
class Recorded:
    """A pass. logits: of each layer, [B, S, E].   mask: [B, S] bool, None if the pass did not say what padding is.
    position: [B, S], of a token in its text.
    """

    logits: list[Tensor]
    mask: Tensor | None
    position: Tensor | None


class RouterTracker:
    """Records the routers in each pass with gradient of a decoder, such as LlamaModel, bare or inside of wrappers.

    layers: experts by the name of their linear layer, all of one kind of router.
    Padding is known from `expect`, or else from the attention mask of the pass.
    """

    def __init__(self, decoder: nn.Module, layers: Mapping[str, Experts]) -> None:
        self.layers = dict(layers)
        self.router: Router = next(iter(layers.values())).route
        self._expected: Tensor | None = None
        self._last: Recorded | None = None
        self._loads: list[Tensor] | None = None  # of each text of the passes, while they are collected
        self._traffic: Traffic | None = None
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has hooks of its own, and nothing of what this one has seen."""
        return {**self.__dict__, "_last": None, "_expected": None, "_loads": None, "_traffic": None}

    def expect(self, mask: Tensor) -> None:
        """Say which places [B, S] of the next pass are no padding."""
        self._expected = mask

    @contextmanager
    def collected(self) -> Iterator[list[Tensor]]:
        """Within it, passes without gradient add what share of each text every expert gets, see `_shares`."""
        self._loads = []
        try:
            yield self._loads
        finally:
            self._loads = None

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() or self._loads is not None:
            for experts in self.layers.values():
                experts.recording = True

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        expected, self._expected = self._expected, None
        if not torch.is_grad_enabled() and self._loads is None:
            return
        found = []
        for experts in self.layers.values():
            found.append(experts.recorded)
            # A checkpointed layer runs again, in the backward pass.
            experts.recording, experts.recorded = False, None
        logits = [x for x in found if x is not None]
        if len(logits) < len(found):  # experts are turned off
            return
        batch, length = output[0].shape[:2]
        for name, x in zip(self.layers, logits, strict=True):
            if x.numel() != batch * length * x.size(-1):
                raise ConfigError(f"target_modules names {name}, which does not see every token: leave it out")
        logits = [x.view(batch, length, x.size(-1)) for x in logits]  # some layers get their texts as one
        mask = kwargs.get("attention_mask") if expected is None else expected
        last = Recorded(logits, mask, kwargs.get("position_ids"))
        if self._loads is None:
            self._last = last
        else:
            self._loads.append(_shares(self.router, logits, self._valid(last)))

    @staticmethod
    def _valid(last: Recorded) -> Tensor:
        """Which places [B, S] of a pass are no padding."""
        like = last.logits[0]
        if last.mask is None:
            return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        if last.mask.dim() != 2:
            raise ConfigError("routers cannot tell padding from an attention mask of 4 dimensions: give one of [B, S]")
        return last.mask.bool().to(like.device)

    def take(self, before: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """The auxiliary loss of the last pass with gradient, coefficients included, its terms, and the drift of
        routing.   before: what `collected` gave for the texts of the pass.
        """
        if self._last is None:
            raise RuntimeError("no pass with gradient has been recorded")
        last, self._last = self._last, None
        logits, mask = last.logits, self._valid(last)
        if self.router.penalizes and not logits[0].requires_grad:
            raise ConfigError(
                "the routers' loss has no gradient: load the adapters with is_trainable=True, and under checkpointing "
                "set gradient_checkpointing_kwargs: {use_reentrant: false}"
            )
        with torch.no_grad():
            seen = _traffic(self.router, last, mask)
            now = None if before is None else _shares(self.router, logits, mask)
        self._traffic = seen if self._traffic is None else self._traffic + seen
        loss, terms = self._auxiliary(logits, mask.flatten())
        told = {**terms, "aux_loss": loss}
        if now is not None and before is not None:
            told["drift"] = (now - before).abs().sum(1) / 2 / len(logits)
        return loss, {f"router/{name}": Mean.of(x) for name, x in told.items()}

    def _auxiliary(self, logits: list[Tensor], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of all routers as one; those with other numbers of experts (MoLA) apart, averaged by how many there are."""
        loss, terms = logits[0].new_zeros(()), {"balance": logits[0].new_zeros(()), "z": logits[0].new_zeros(())}
        for size in sorted({x.size(-1) for x in logits}):
            alike = [x.flatten(0, 1) for x in logits if x.size(-1) == size]
            share = len(alike) / len(logits)
            part, told = auxiliary_loss(self.router, torch.cat(alike), mask.repeat(len(alike)))
            loss = loss + share * part
            terms = {name: x + share * told[name] for name, x in terms.items()}
        return loss, terms

    def close(self, reduce: Reduce) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the passes since the last call, over all ranks, and what to record by layer and by position."""
        if self._traffic is None:
            return {}, {}
        traffic, self._traffic = self._traffic.reduced(reduce), None
        tokens = float(traffic.tokens)
        counts = torch.tensor([float(experts.num_experts) for experts in self.layers.values()])
        share = traffic.load / traffic.load.sum(1, keepdim=True).clamp(min=1) * counts.unsqueeze(1)  # 1 is even
        real = torch.arange(share.size(1)).unsqueeze(0) < counts.unsqueeze(1)
        routed = max(tokens, 1.0) * len(self.layers)
        metrics = {
            "router/entropy": float(traffic.entropy.sum()) / routed,
            "router/soft": float(traffic.soft.sum()) / routed,
            "router/experts": float(traffic.experts.sum()) / routed,
            "router/load_max": float(share.max()),
            "router/dead": float((share[real] < DEAD).double().mean()),
        }
        return metrics, _details(traffic, list(self.layers), real)


def _traffic(router: Router, last: Recorded, mask: Tensor) -> Traffic:
    """mask: [B, S] bool. Without positions a token's is its place in its row."""
    logits, device = last.logits, mask.device
    most = max(x.size(-1) for x in logits)
    position = (mask.cumsum(1) - 1 if last.position is None else last.position.expand_as(mask))[mask]
    bins = torch.bucketize(position, torch.tensor(EDGES[1:], device=device), right=True)
    zeros = torch.zeros(len(EDGES), dtype=torch.float64, device=device)
    entropy, soft, experts, load = [], [], [], []
    by_entropy, by_load = zeros.clone(), zeros.unsqueeze(1).repeat(1, most)
    for each in logits:
        probs = each[mask].softmax(-1)
        selected = router(probs).selected.double()
        h = router.entropy(probs).double()
        wide = nn.functional.pad(selected, (0, most - selected.size(1)))
        entropy.append(h.sum())
        soft.append((selected.sum(1) == selected.size(1)).double().sum())
        experts.append(selected.sum())
        load.append(wide.sum(0))
        by_entropy.index_add_(0, bins, h / len(logits))
        by_load.index_add_(0, bins, wide)
    return Traffic(
        tokens=mask.sum().double(),
        entropy=torch.stack(entropy),
        soft=torch.stack(soft),
        experts=torch.stack(experts),
        load=torch.stack(load),
        position_tokens=zeros.index_add(0, bins, torch.ones_like(bins, dtype=torch.float64)),
        position_entropy=by_entropy,
        position_load=by_load,
    )


def _shares(router: Router, logits: list[Tensor], mask: Tensor) -> Tensor:
    """What share of each text's tokens every expert gets, [B, experts of all layers]; a router's add up to 1."""
    parts = []
    for each in logits:
        sent = (router(each.softmax(-1)).selected & mask.unsqueeze(-1)).sum(1).float()
        parts.append(sent / sent.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(parts, dim=1)


def _details(traffic: Traffic, names: list[str], real: Tensor) -> dict[str, Any]:
    """Means by layer and by bin of positions, as plain numbers; bins beyond the longest text are left out."""
    tokens = traffic.tokens.clamp(min=1)
    used = int(traffic.position_tokens.nonzero().max()) + 1 if traffic.position_tokens.any() else 0
    count = traffic.position_tokens[:used].clamp(min=1)
    sent = traffic.load / traffic.load.sum(1, keepdim=True).clamp(min=1)
    sent_at = traffic.position_load[:used] / traffic.position_load[:used].sum(1, keepdim=True).clamp(min=1)
    return {
        "layers": names,
        "entropy": (traffic.entropy / tokens).tolist(),
        "soft": (traffic.soft / tokens).tolist(),
        "load": [row[mine].tolist() for row, mine in zip(sent, real, strict=True)],
        "position_edges": [float(edge) for edge in EDGES[:used]],
        "position_tokens": traffic.position_tokens[:used].tolist(),
        "position_entropy": (traffic.position_entropy[:used] / count).tolist(),
        "position_load": sent_at.tolist(),
    }
