# mypy: disable-error-code="no-untyped-def"
"""The kernels of the Triton backends: logits folded into sums, and the gradient by the logits.

They handle blocks of tokens x vocabulary, [R, C], and compute in float32 whatever the tensors hold. Offsets that a
stride multiplies are int64: tokens times vocabulary is more than int32 counts. bias_ptr and cap may be None, which
removes their code.

They must be compiled without contraction of a * b + c: u = x / T - m has to be exactly 0 at the maximum, or a greedy
token would not be seen as one and a log-prob could be positive. Loads are through pointers: descriptors of tensors
(TMA) want rows aligned to 16 bytes, which the hidden size need not give.
"""

import triton
import triton.language as tl


@triton.jit
def _logits(x, inv_t, bias_ptr, columns, inside, scale, cap):
    """z = cap(scale (x + bias)) / T, -inf where not inside, and dz/dx, from the products x = h W^T."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = x * scale
    slope = scale * inv_t[:, None]
    if cap is not None:
        t = tl.abs(z) / cap
        e = tl.exp(-2.0 * t)
        t2 = t * t
        series = t * (1.0 + t2 * (-1.0 / 3.0 + t2 * (2.0 / 15.0 - t2 * (17.0 / 315.0))))
        tanh = tl.where(t < 0.1, series, (1.0 - e) / (1.0 + e))  # 1 - e cancels for small t
        z = tl.where(z < 0, -cap, cap) * tanh
        slope = slope * (1.0 - tanh * tanh)
    return tl.where(inside[None, :], z * inv_t[:, None], float("-inf")), slope


@triton.jit
def _finite(u):
    """u without -inf: far below where e^u is 0, so that 0 log 0 = 0. NaN stays."""
    return tl.maximum(u, -1000.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fold(sums, z, at_target, MOMENTS: tl.constexpr):
    """The sums of `rlvr_kernels.sums`, a tuple of eight [R], with a block of logits added."""
    m, s0, s1, s2, q0, q1, q2, u_target = sums
    above = tl.maximum(m, tl.max(z, axis=1))
    up = tl.where(m == float("-inf"), 0.0, above - m)  # sums over no logits are all 0 and stay so
    d = tl.minimum(up, 1000.0, propagate_nan=tl.PropagateNan.ALL)  # e^-1000 is 0 already, 1000^2 finite
    reference = tl.where(above == float("-inf"), 0.0, above)
    here = tl.max(tl.where(at_target, z, float("-inf")), axis=1) - reference
    u = _finite(z - reference[:, None])
    e = tl.exp(u)
    ue = u * e
    a = tl.exp(-d)
    if MOMENTS:
        s2 = a * (s2 - 2 * d * s1 + d * d * s0) + tl.sum(u * ue, axis=1)
        q2 = a * a * (q2 - 2 * d * q1 + d * d * q0) + tl.sum(ue * ue, axis=1)
        q1 = a * a * (q1 - d * q0) + tl.sum(e * ue, axis=1)
        q0 = a * a * q0 + tl.sum(e * e, axis=1)
    s1 = a * (s1 - d * s0) + tl.sum(ue, axis=1)
    s0 = a * s0 + tl.sum(e, axis=1)
    return above, s0, s1, s2, q0, q1, q2, tl.maximum(u_target - up, here)


@triton.jit
def _load_sums(ptr, stride, live):
    stride = stride.to(tl.int64)
    return (
        tl.load(ptr, mask=live, other=float("-inf")),
        tl.load(ptr + stride, mask=live, other=0.0),
        tl.load(ptr + 2 * stride, mask=live, other=0.0),
        tl.load(ptr + 3 * stride, mask=live, other=0.0),
        tl.load(ptr + 4 * stride, mask=live, other=0.0),
        tl.load(ptr + 5 * stride, mask=live, other=0.0),
        tl.load(ptr + 6 * stride, mask=live, other=0.0),
        tl.load(ptr + 7 * stride, mask=live, other=float("-inf")),
    )


@triton.jit
def _store_sums(ptr, stride, live, sums):
    stride = stride.to(tl.int64)
    for i in tl.static_range(8):
        tl.store(ptr + i * stride, sums[i], mask=live)


@triton.jit(do_not_specialize=["n", "width", "first", "sums_stride"])
def tile_stats(
    x_ptr, x_stride, n, width, first, targets_ptr, inv_t_ptr, bias_ptr, scale, cap, sums_ptr, sums_stride,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add a tile of products [n, width <= COLUMNS] to the sums [8, n].   first: the number of its first column."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    live = rows < n
    inside = columns < width
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=live[:, None] & inside[None, :])
    target = tl.load(targets_ptr + rows, mask=live, other=-1) - first
    inv_t = tl.load(inv_t_ptr + rows, mask=live, other=1.0)
    z, _ = _logits(x, inv_t, bias_ptr, columns, inside, scale, cap)
    sums = _load_sums(sums_ptr + rows, sums_stride, live)
    sums = _fold(sums, z, columns[None, :] == target[:, None], MOMENTS)
    _store_sums(sums_ptr + rows, sums_stride, live, sums)


@triton.jit(do_not_specialize=["n", "vocabulary", "first", "sums_stride"])
def fused_stats(
    hidden_ptr, hidden_row, hidden_column, weight_ptr, weight_row, weight_column, n, vocabulary, width, first,
    targets_ptr, inv_t_ptr, bias_ptr, scale, cap, sums_ptr, sums_stride,
    MOMENTS: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write the sums over each SPAN columns of hidden [n, width] weight^T [width, vocabulary] to sums [8, S, n].

    program_id(0) counts blocks of tokens: programs that run at the same time read the same rows of the weight.
    DTYPE: of the products' inputs; they are summed up in float32.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    live = rows < n
    target = tl.load(targets_ptr + rows, mask=live, other=-1) - first
    inv_t = tl.load(inv_t_ptr + rows, mask=live, other=1.0)
    zero = tl.zeros((ROWS,), tl.float32)
    nothing = zero + float("-inf")
    sums = (nothing, zero, zero, zero, zero, zero, zero, nothing)
    hidden_ptr += rows[:, None].to(tl.int64) * hidden_row
    for start in range(part * SPAN, tl.minimum((part + 1) * SPAN, vocabulary), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < vocabulary
        of_columns = weight_ptr + columns[None, :].to(tl.int64) * weight_row
        x = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, INNER):
            inner = k + tl.arange(0, INNER)
            h_mask = live[:, None] & (inner[None, :] < width)
            w_mask = inside[None, :] & (inner[:, None] < width)
            h = tl.load(hidden_ptr + inner[None, :].to(tl.int64) * hidden_column, mask=h_mask, other=0.0)
            w = tl.load(of_columns + inner[:, None].to(tl.int64) * weight_column, mask=w_mask, other=0.0)
            x = tl.dot(h.to(DTYPE), w.to(DTYPE), x, input_precision="ieee")
        z, _ = _logits(x, inv_t, bias_ptr, columns, inside, scale, cap)
        sums = _fold(sums, z, columns[None, :] == target[:, None], MOMENTS)
    _store_sums(sums_ptr + part.to(tl.int64) * n + rows, sums_stride, live, sums)


@triton.jit(do_not_specialize=["n", "width", "first", "slope_stride"])
def tile_grad(
    x_ptr, x_stride, n, width, first, targets_ptr, inv_t_ptr, bias_ptr, scale, cap,
    out_ptr, out_stride, m_ptr, log_s0_ptr, slope_ptr, slope_stride,
    DEGREE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient by the products of a tile [n, width].   slope: [7, n]; see `rlvr_kernels.sums.Slope`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = rows < n
    inside = columns < width
    mask = live[:, None] & inside[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=mask)
    target = tl.load(targets_ptr + rows, mask=live, other=-1) - first
    inv_t = tl.load(inv_t_ptr + rows, mask=live, other=1.0)
    z, dz = _logits(x, inv_t, bias_ptr, columns, inside, scale, cap)
    m = tl.load(m_ptr + rows, mask=live, other=0.0)[:, None]
    log_s0 = tl.load(log_s0_ptr + rows, mask=live, other=0.0)[:, None]
    logp = _finite((z - m) - log_s0)  # m + log s0 would round at the logits' size
    p = tl.exp(logp)
    slope_ptr += rows
    at_target = tl.load(slope_ptr, mask=live, other=0.0)[:, None]
    grad = tl.load(slope_ptr + slope_stride, mask=live, other=0.0)[:, None]
    if DEGREE >= 1:
        grad += tl.load(slope_ptr + 2 * slope_stride, mask=live, other=0.0)[:, None] * logp
    if DEGREE == 2:
        a2 = tl.load(slope_ptr + 3 * slope_stride, mask=live, other=0.0)[:, None]
        b0 = tl.load(slope_ptr + 4 * slope_stride, mask=live, other=0.0)[:, None]
        b1 = tl.load(slope_ptr + 5 * slope_stride, mask=live, other=0.0)[:, None]
        b2 = tl.load(slope_ptr + 6 * slope_stride, mask=live, other=0.0)[:, None]
        grad += a2 * logp * logp + p * (b0 + logp * (b1 + b2 * logp))
    grad = grad * p + tl.where(columns[None, :] == target[:, None], at_target, 0.0)
    tl.store(out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :], grad * dz, mask=mask)
