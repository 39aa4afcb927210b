"""The sides: ours, naive PyTorch and the public fused heads, each behind one signature.

A side takes hidden [N, D], weight [V, D], targets [N] and the wanted fields of `rlvr_kernels.TokenStats`, and returns
at least those with a gradient. Peers are imported when their side is loaded, so that none has to be installed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from rlvr_kernels import reference, token_stats
from rlvr_kernels.stats import MOMENTS

Call = Callable[..., Mapping[str, Tensor]]


class Side(NamedTuple):
    """One implementation.

    load: imports it and returns the call.   logits: their precision between the products.
    entropy: it returns entropy with a gradient.   moments: which of them it can return.   note: what else to know.
    tiles: settings of its own to try, the default first; keyword arguments of the call.
    """

    name: str
    load: Callable[[], Call]
    logits: str
    entropy: bool = True
    moments: str = ""
    note: str = ""
    tiles: tuple[dict[str, int], ...] = ({},)

    def computes(self, want: tuple[str, ...]) -> bool:
        return (self.entropy or "entropy" not in want) and (bool(self.moments) or set(MOMENTS).isdisjoint(want))


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, want: tuple[str, ...]) -> dict[str, Tensor]:
    """The logits in the inputs' dtype, then float32 as trainers do, all of it in autograd but the moments."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    stats = {"logps": logp.gather(1, targets[:, None]).squeeze(1)}
    if "entropy" in want:
        stats["entropy"] = -(logp.exp() * logp).sum(-1)
    if moments := set(MOMENTS).intersection(want):
        found = reference.logit_stats(logp.detach(), targets, want=moments)
        stats |= {name: getattr(found, name) for name in moments}
    return stats


def ours(backend: str) -> Call:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor, want: tuple[str, ...]) -> dict[str, Tensor]:
        return token_stats(hidden, weight, targets, want=want, backend=backend)._asdict()

    return call


def trl() -> Call:
    module: Any = import_module("trl.kernels.chunked_logprob")

    def call(
        hidden: Tensor, weight: Tensor, targets: Tensor, want: tuple[str, ...], *, tokens: int, vocabulary: int
    ) -> dict[str, Any]:
        module.TOKEN_CHUNK_SIZE = tokens  # the backward pass reads it too, and follows before another call
        outputs = ("entropy",) if "entropy" in want else ()
        if not set(MOMENTS).isdisjoint(want):
            outputs = module.OPTIONAL_OUTPUTS
        logps, entropy, *_ = module.ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, vocabulary, None, 1.0, outputs
        )
        return {"logps": logps, "entropy": entropy}

    return call


def liger_scaled() -> Call:
    module = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    run = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, want: tuple[str, ...]) -> dict[str, Tensor]:
        if "entropy" not in want:
            return {"logps": -run(hidden, weight, targets)}
        nll, entropy = run(hidden, weight, targets, 1.0, -100, 1, True)
        return {"logps": -nll, "entropy": entropy}

    return call


def liger_selective() -> Call:
    run = import_module("liger_kernel.chunked_loss.fused_linear_ppo")._ChunkedSelectiveLogProbFunction.apply

    def call(
        hidden: Tensor, weight: Tensor, targets: Tensor, _: tuple[str, ...], *, vocabulary: int
    ) -> dict[str, Tensor]:
        return {"logps": run(hidden, weight, targets, None, 1.0, vocabulary)}

    return call


def liger_cross_entropy() -> Call:
    loss = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return partial(_negative, partial(loss, reduction="none"))


def cut_cross_entropy() -> Call:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return partial(_negative, partial(loss, reduction="none", impl="cce"))


def _negative(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    _: tuple[str, ...],
) -> dict[str, Tensor]:
    return {"logps": -loss(hidden, weight, targets)}


def verl_torch() -> Call:
    head = import_module("verl.utils.experimental.torch_functional").FusedLinearForPPO

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, _: tuple[str, ...], *, tokens: int) -> dict[str, Tensor]:
        logps, entropy = head(chunk_size=tokens)(hidden, weight, targets)
        return {"logps": logps, "entropy": entropy}

    return call


def verl_triton() -> Call:
    run = import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, _: tuple[str, ...]) -> dict[str, Tensor]:
        logps, entropy = run(hidden, weight, targets, 1.0, "none")
        return {"logps": logps, "entropy": entropy}

    return call


OURS = {"chunked": "ours, chunked", "triton": "ours, triton", "triton_fused": "ours, triton_fused"}
FLOAT, INPUTS = "float32", "rounded to the inputs' dtype"
TRL_TILES = tuple(
    {"tokens": tokens, "vocabulary": vocabulary}
    for tokens, vocabulary in [
        (4096, 32768),
        *((tokens, vocabulary) for tokens in (256, 512) for vocabulary in (1024, 2048, 8192)),
        *((2048, 4096), (8192, 8192), (8192, 16384), (8192, 65536)),
    ]
)
SIDES = (
    *(Side(name, partial(ours, backend), FLOAT, moments="four") for backend, name in OURS.items()),
    Side("naive PyTorch", lambda: naive, INPUTS, moments="four", note="holds the logits, in autograd"),
    Side(
        "TRL",
        trl,
        INPUTS,
        moments="log sum p^2",
        note="ChunkedLogProbFunction; weight gradient [V, D] in float32",
        tiles=TRL_TILES,
    ),
    Side(
        "verl torch",
        verl_torch,
        INPUTS,
        note="FusedLinearForPPO; entropy always",
        tiles=tuple({"tokens": tokens} for tokens in (512, 128, 256, 2048)),
    ),
    Side("verl Triton", verl_triton, FLOAT, note="linear_cross_entropy; entropy always"),
    Side(
        "Liger scaled CE",
        liger_scaled,
        "fp16 on SM90, else " + INPUTS,
        note="FusedLinearScaledCrossEntropy: CuTe kernel on SM90, else verl's formulas",
    ),
    Side(
        "Liger chunked GRPO",
        liger_selective,
        INPUTS,
        entropy=False,
        note="_ChunkedSelectiveLogProb without its loss; products of gradients in float32",
        tiles=tuple({"vocabulary": vocabulary} for vocabulary in (4096, 512, 1024, 2048, 16384)),
    ),
    Side("Liger fused linear CE", liger_cross_entropy, INPUTS, entropy=False, note="Triton; reduction none"),
    Side(
        "cut-cross-entropy",
        cut_cross_entropy,
        FLOAT,
        entropy=False,
        note="Triton; drops tiles of small gradients: random logits flatter it",
    ),
)
