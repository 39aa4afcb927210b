"""LoRA experts beside one linear layer, with the router that mixes them."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlvr.mole.routers import Router


class Experts(nn.Module):
    """sum_e w_e(x) B_e A_e x: what a mixture of E LoRA experts adds to a linear layer; 0 at the start.

    All experts are one product of rank E * r whose middle is scaled by the weights, so that there is no loop over
    experts, and those with weight 0 cost what they add to the rank. The router is computed in float32.

    router.weight: [E, in], Kaiming uniform with a = sqrt(5) as in DynMoLE's release.   a: [E * r, in], as LoRA's A.
    b: [out, E * r], zero.   Of expert e are the rows e r to (e + 1) r of a and these columns of b.
    scaling: alpha / r.   dropout: of what the experts read, not of what the router reads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        r: int,
        scaling: float,
        router: Router,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.r, self.scaling, self.route = num_experts, r, scaling, router
        self.dropout = nn.Dropout(dropout)
        self.router = nn.Parameter(torch.empty(num_experts, in_features))
        self.a = nn.Parameter(torch.empty(num_experts * r, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, num_experts * r))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.recording = False
        self.recorded: Tensor | None = None  # router logits of the pass that is recorded, [..., E], with gradient

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out], of the dtype that the experts compute in."""
        with torch.autocast(x.device.type, enabled=False):
            logits = linear(x.float(), self.router.float())
            weight = self.route(logits.softmax(-1)).weight * self.scaling
        if self.recording:
            self.recorded = logits
        hidden = linear(self.dropout(x.to(self.a.dtype)), self.a).unflatten(-1, (self.num_experts, self.r))
        return linear((hidden * weight.to(hidden.dtype).unsqueeze(-1)).flatten(-2), self.b)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, r={self.r}, scaling={self.scaling:g}, route={self.route}"
