"""Statistics of a head without its logits: one differentiable function, whatever the backend."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlvr_kernels.backend import Backend, Head, Needs, Rows
from rlvr_kernels.dispatch import backend_named
from rlvr_kernels.sharded import gathered, merged, scattered
from rlvr_kernels.stats import MOMENTS, WITHOUT_GRADIENT, TokenStats, check_want, inverse_temperature
from rlvr_kernels.sums import finish, live_tokens, slope


@torch.compiler.disable
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    want: Collection[str] = ("logps", "entropy"),
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> TokenStats:
    """Statistics of softmax(softcap(logit_scale (hidden W^T + bias)) / temperature) at each token, for the fields in
    `want`, in memory that does not grow with N V: the logits exist as small tiles, again in the backward pass.

    Logits are float32 from the matrix product on, whatever the inputs. Differentiable by hidden, weight and bias, each
    only if it asks for a gradient; one backward pass for all fields, without second derivatives (create_graph=True).
    Tokens without a label get 0 and cost nothing; tokens whose gradient is 0 cost no backward pass.

    hidden: [N, D].   weight: [V, D]; may be shared with the embedding, a DTensor (FSDP2) or partitioned by ZeRO-3: it
    is gathered here and again in the backward pass, so each rank calls this and uses the result in its loss, without
    tokens too. A DTensor's gradient is the average over its mesh, as FSDP2's and DDP's are. Under ZeRO-3 call it
    inside the forward of the wrapped model, unless the weight needs no gradient.
    targets: [N] int64 in [0, V) or ignore_index.   temperature: a number or [N].
    bias: [V]; -inf makes a token impossible, where there is no soft cap.   softcap: c of c * tanh(z / c).
    backend: "auto", "chunked", "triton" or "triton_fused"; see `choose_backend`.
    group: ranks among which the vocabulary is split; `weight` and `bias` are this rank's rows, from number vocab_start
    on. Hidden, targets and the loss have to be the same on all of them; statistics and the gradient by hidden are.
    Under autocast on an accelerator the matrix products take inputs of autocast's dtype.
    Raises: ValueError for shapes, dtypes or values that do not fit, and for a backend that cannot run here.
    """
    want = check_want(want)
    _check_tensors(hidden, weight, targets, bias)
    _check_numbers(softcap, logit_scale, vocab_start, group)
    chosen = backend_named(backend, hidden, weight)
    like = hidden.new_empty(len(hidden), dtype=torch.promote_types(_common(hidden, weight), torch.float32))
    labeled = _labeled(targets, ignore_index, None if group is not None else _vocabulary(weight))
    call = Call(
        backend=chosen,
        fields=tuple(name for name in TokenStats._fields if name in want),
        targets=targets,
        labeled=labeled,
        inv_t=inverse_temperature(temperature, like),
        head={"softcap": softcap, "logit_scale": logit_scale, "dtype": _input_dtype(hidden, weight)},
        group=group,
        start=vocab_start,
    )
    return TokenStats(**dict(zip(call.fields, _Statistics.apply(hidden, weight, bias, call), strict=True)))


class Call(NamedTuple):
    """What a call says beside the three tensors that may have gradients. targets, inv_t: [N]."""

    backend: Backend
    fields: tuple[str, ...]
    targets: Tensor
    labeled: Tensor | None  # numbers of the tokens with a label; None for all
    inv_t: Tensor
    head: Mapping[str, Any]
    group: dist.ProcessGroup | None
    start: int

    def rows(self, hidden: Tensor, index: Tensor | None) -> Rows:
        if index is None:
            return Rows(hidden, self.targets, self.inv_t)
        return Rows(hidden[index], self.targets[index], self.inv_t[index])


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows = call.rows(hidden, call.labeled)
        with gathered(weight, bias) as (w, b), torch.autocast(hidden.device.type, enabled=False):
            head = Head(w, b, **call.head, start=call.start)
            sums = call.backend.forward(rows, head, not set(MOMENTS).isdisjoint(call.fields))
        if call.group is not None:
            sums = merged(sums, rows.targets, call.start, len(w), call.group)
        stats = finish(sums, call.fields)
        if call.labeled is not None:
            stats = {name: x.new_zeros(len(hidden)).index_copy(0, call.labeled, x) for name, x in stats.items()}
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, sums, call.targets)
        ctx.mark_non_differentiable(*(stats[name] for name in WITHOUT_GRADIENT if name in stats))
        return tuple(stats[name] for name in call.fields)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable returns a constant, in silence, where grads are constants
            raise RuntimeError("token_stats has no second derivatives: differentiate it without create_graph=True")
        hidden, weight, bias, sums, targets = ctx.saved_tensors
        call: Call = ctx.call._replace(targets=targets)  # saved, so that a change of it in between is an error
        needs = Needs(*ctx.needs_input_grad[:3])
        given = {
            name: (g if call.labeled is None else g[call.labeled]).to(sums.dtype)
            for name, g in zip(call.fields, grads, strict=True)
            if g is not None and name not in WITHOUT_GRADIENT
        }
        live = live_tokens(given, sums[0]).nonzero().squeeze(1)
        index = live if call.labeled is None else call.labeled[live]
        rows = call.rows(hidden, index)
        of_logits = slope(sums[:, live], {name: g[live] for name, g in given.items()})
        with gathered(weight, bias) as (w, b), torch.autocast(hidden.device.type, enabled=False):
            head = Head(w, b, **call.head, start=call.start)
            found = call.backend.backward(rows, head, sums[:, live], of_logits, needs)
            del w, b, head  # a gathered weight is not held while its gradient is scattered
        by_hidden = found.hidden
        if by_hidden is not None:
            if call.group is not None:
                dist.all_reduce(by_hidden, group=call.group)
            by_hidden = torch.zeros_like(hidden).index_copy(0, index, by_hidden.to(hidden.dtype))
        return by_hidden, scattered(found.weight, weight), scattered(found.bias, bias), None


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shape = getattr(weight, "ds_shape", weight.shape)
    if hidden.dim() != 2 or len(shape) != 2 or hidden.size(1) != shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            "want hidden [N, D], weight [V, D] and targets [N], got "
            f"{tuple(hidden.shape)}, {tuple(shape)} and {tuple(targets.shape)}"
        )
    if bias is not None and tuple(getattr(bias, "ds_shape", bias.shape)) != (shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: give one number for each of {shape[0]} tokens")
    if not (hidden.is_floating_point() and weight.is_floating_point()) or targets.dtype != torch.int64:
        raise ValueError(
            f"want floating-point hidden and weight and int64 targets, got {hidden.dtype}, {weight.dtype} and "
            f"{targets.dtype}"
        )
    if weight.device != hidden.device or targets.device != hidden.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}: want one device"
        )
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"want a floating-point bias, got {bias.dtype}")


def _check_numbers(
    softcap: float | None, logit_scale: float, vocab_start: int, group: dist.ProcessGroup | None
) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be > 0 and finite, or None for none")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale={logit_scale} must be > 0 and finite")
    if vocab_start < 0 or (vocab_start and group is None):
        raise ValueError(f"vocab_start={vocab_start} must be >= 0, and 0 without a group that holds the other rows")


def _vocabulary(weight: Tensor) -> int:
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _labeled(targets: Tensor, ignore_index: int, vocabulary: int | None) -> Tensor | None:
    """Numbers of the tokens with a label, None if all have one. Raises: ValueError for a target outside [0, V)."""
    has_label = targets != ignore_index
    wrong = has_label & (targets < 0)
    if vocabulary is not None:
        wrong |= has_label & (targets >= vocabulary)
    if bool(wrong.any()):
        value = int(targets[wrong][0])
        raise ValueError(
            f"targets has {value}: want numbers in [0, {vocabulary or 'V'}) or ignore_index={ignore_index}"
        )
    return None if bool(has_label.all()) else has_label.nonzero().squeeze(1)


def _common(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, weight.dtype)


def _input_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matrix products' inputs. On a CPU autocast is ignored: float32 products are exact and cost the same."""
    kind = hidden.device.type
    if kind != "cpu" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return _common(hidden, weight)
