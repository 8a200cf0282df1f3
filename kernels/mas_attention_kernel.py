"""MAS attention in Triton: O_h = sigmoid(s_h) * softmax(Q_h K_h^T / sqrt(D)) V_h, forward and backward.

Shapes: q, k, v, o and their gradients [B, N, H, D], any strides with a contiguous last dimension; head_scale s [H].
Write S = Q K^T / sqrt(D), P = softmax(S) by row, g = sigmoid(s), so O = g P V, and let dO be the gradient of O.  Then

    dV = g P^T dO           dP = dO V^T          delta_i = sum_j P_ij dP_ij
    dS = g P * (dP - delta) dQ = dS K / sqrt(D)  dK = dS^T Q / sqrt(D)    ds_h = g (1 - g) sum_i delta_i

N <= 128: one program holds a whole (batch, head), Q, K, V and P in registers and shared memory (where an
architecture's registers cannot hold it, tuned/ sets STREAM and the kernels for longer N run).  Forward reads q, k, v
and writes o (4 BNHD elements, 4 BHN^2 D flops); backward reads q, k, v, dO, recomputes P from them and delta from P and
dP, and writes dq, dk, dv (7 BNHD elements, 10 BHN^2 D flops).  It needs neither O nor the row sums of the forward.

Longer N: flash attention.  The forward streams K and V past a block of queries with a running maximum and sum and
stores lse_i = log2 sum_j exp2(S_ij log2 e).  In the backward P_ij = exp2(S_ij log2 e - lse_i), and since the stored O
includes g, sum_d O_id dO_id = g delta_i.  One kernel streams keys past queries for dQ (and stores g delta_i on
its way), a second streams queries past keys for dK and dV.  Each output element has one writer: no atomics,
bitwise equal results in every run.

Products run in the inputs' dtype with float32 accumulation; S, P, delta and every reduction are float32; P and dS are
rounded to the inputs' dtype only where they enter a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtn_fast.kernels.launch import INTERPRET, Launch, product_precision
from dtn_fast.kernels.launch_values import SMALL, settings

LOG2E = 1.4426950408889634
PROCESSORS = 132
"""Multiprocessors for which persistent kernels are compiled without a GPU: H100's and H200's."""


# ------------------------------------------------------------------------------------------------ device functions


@triton.jit
def _load(base, rows, cols, row_stride, rows_total, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """A [rows, cols] tile; rows past the end read as zero.  EXACT: no row is past the end."""
    pointers = base + rows[:, None] * row_stride + cols[None, :]
    if EXACT:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=rows[:, None] < rows_total, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store(base, rows, cols, row_stride, rows_total, tile, EXACT: tl.constexpr):
    pointers = base + rows[:, None] * row_stride + cols[None, :]
    tile = tile.to(base.dtype.element_ty)
    if EXACT:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=rows[:, None] < rows_total)


@triton.jit
def _softmax(q, k, cols, n, scale, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """exp2(S - row maximum) and its row sums; columns past n get weight zero."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if not EXACT:
        s = tl.where(cols[None, :] < n, s, -float("inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _ds(p, do, v, factor, PRECISION: tl.constexpr):
    """factor * P * (dP - delta) and sum_i delta_i; both zero in rows where dO is."""
    weighted = p * tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = (weighted - p * tl.sum(weighted, 1)[:, None]) * factor
    return ds.to(v.dtype), tl.sum(weighted)


@triton.jit
def _gate(HEAD_SCALE, h):
    """sigmoid(s_h) without overflow at either end."""
    s = tl.load(HEAD_SCALE + h).to(tl.float32)
    e = tl.exp2(-tl.abs(s) * 1.4426950408889634)
    return tl.where(s >= 0, 1.0, e) / (1.0 + e)


# ------------------------------------------------------------------------------------------------ N <= 128


@triton.jit
def mas_small_forward(
    Q, K, V, HEAD_SCALE, O,
    n, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one (batch, head) per program.  scale = log2(e) / sqrt(D)."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), pid % H
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    q = _load(Q + b * q_b + h * q_h, rows, cols, q_n, n, EXACT, UPCAST)
    k = _load(K + b * k_b + h * k_h, rows, cols, k_n, n, EXACT, UPCAST)
    v = _load(V + b * v_b + h * v_h, rows, cols, v_n, n, EXACT, UPCAST)
    p, total = _softmax(q, k, rows, n, scale, EXACT, PRECISION)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (_gate(HEAD_SCALE, h) / total)[:, None]
    _store(O + b * o_b + h * o_h, rows, cols, o_n, n, o, EXACT)


@triton.jit
def mas_small_forward_persistent(
    q_desc, k_desc, v_desc, o_desc, HEAD_SCALE,
    n, scale, tiles, programs,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Variant of :func:`mas_small_forward` with tensor descriptors (TMA from Hopper on): each program loops over
    (batch, head) pairs and loads the next pair while it computes the current one.  Rows past n load as zero and are
    not stored."""
    rows = tl.arange(0, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        b, h = tile // H, tile % H
        q = q_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        k = k_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        v = v_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        if UPCAST:
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        p, total = _softmax(q, k, rows, n, scale, EXACT, PRECISION)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (_gate(HEAD_SCALE, h) / total)[:, None]
        o_desc.store([b, 0, h, 0], o.to(o_desc.dtype).reshape(1, BLOCK, 1, D))


@triton.jit
def mas_small_backward(
    Q, K, V, HEAD_SCALE, DO, DQ, DK, DV, DSCALE,
    n, scale, softmax_scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of one (batch, head) per program.  softmax_scale = 1 / sqrt(D); DSCALE [B, H] float32 partial sums."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), pid % H
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    q = _load(Q + b * q_b + h * q_h, rows, cols, q_n, n, EXACT, UPCAST)
    k = _load(K + b * k_b + h * k_h, rows, cols, k_n, n, EXACT, UPCAST)
    v = _load(V + b * v_b + h * v_h, rows, cols, v_n, n, EXACT, UPCAST)
    do = _load(DO + b * do_b + h * do_h, rows, cols, do_n, n, EXACT, UPCAST)
    g = _gate(HEAD_SCALE, h)
    p, total = _softmax(q, k, rows, n, scale, EXACT, PRECISION)
    p *= (1.0 / total)[:, None]
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION) * g
    _store(DV + b * dv_b + h * dv_h, rows, cols, dv_n, n, dv, EXACT)
    ds, delta = _ds(p, do, v, g * softmax_scale, PRECISION)
    tl.store(DSCALE + pid, g * (1 - g) * delta)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    _store(DQ + b * dq_b + h * dq_h, rows, cols, dq_n, n, dq, EXACT)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    _store(DK + b * dk_b + h * dk_h, rows, cols, dk_n, n, dk, EXACT)


@triton.jit
def mas_small_backward_persistent(
    q_desc, k_desc, v_desc, do_desc, dq_desc, dk_desc, dv_desc, HEAD_SCALE, DSCALE,
    n, scale, softmax_scale, tiles, programs,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Variant of :func:`mas_small_backward` with tensor descriptors, as :func:`mas_small_forward_persistent`."""
    rows = tl.arange(0, BLOCK)
    for tile in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        b, h = tile // H, tile % H
        q = q_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        k = k_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        v = v_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        do = do_desc.load([b, 0, h, 0]).reshape(BLOCK, D)
        if UPCAST:
            q, k, v, do = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32), do.to(tl.float32)
        g = _gate(HEAD_SCALE, h)
        p, total = _softmax(q, k, rows, n, scale, EXACT, PRECISION)
        p *= (1.0 / total)[:, None]
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION) * g
        dv_desc.store([b, 0, h, 0], dv.to(dv_desc.dtype).reshape(1, BLOCK, 1, D))
        ds, delta = _ds(p, do, v, g * softmax_scale, PRECISION)
        tl.store(DSCALE + tile, g * (1 - g) * delta)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        dq_desc.store([b, 0, h, 0], dq.to(dq_desc.dtype).reshape(1, BLOCK, 1, D))
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dk_desc.store([b, 0, h, 0], dk.to(dk_desc.dtype).reshape(1, BLOCK, 1, D))


# ------------------------------------------------------------------------------------------------ longer N


@triton.jit
def _pair(N: tl.constexpr, BLOCK: tl.constexpr):
    """(batch, head) pair of a program and its block of the N rows; a grid's second dimension would end at 65,535."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return pid // BLOCKS, pid % BLOCKS


@triton.jit
def mas_flash_forward(
    Q, K, V, HEAD_SCALE, O, LSE,
    scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries of one (batch, head) per program, keys streamed in blocks of BLOCK_N.
    LSE: [B, H, N] or None."""
    pid, block = _pair(N, BLOCK_M)
    b, h = (pid // H).to(tl.int64), pid % H
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    EXACT_M: tl.constexpr = N % BLOCK_M == 0
    EXACT_N: tl.constexpr = N % BLOCK_N == 0
    q = _load(Q + b * q_b + h * q_h, rows, cols, q_n, N, EXACT_M, UPCAST)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(K + b * k_b + h * k_h, keys, cols, k_n, N, EXACT_N, UPCAST)
        v = _load(V + b * v_b + h * v_h, keys, cols, v_n, N, EXACT_N, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if not EXACT_N:
            s = tl.where(keys[None, :] < N, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))  # finite from the first block on: it holds at least one key
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    o = acc * (_gate(HEAD_SCALE, h) / total)[:, None]
    _store(O + b * o_b + h * o_h, rows, cols, o_n, N, o, EXACT_M)
    if LSE is not None:
        tl.store(LSE + pid.to(tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def mas_flash_backward_dq(
    Q, K, V, HEAD_SCALE, O, DO, LSE, DELTA, DQ,
    scale, softmax_scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, o_b, o_n, o_h, do_b, do_n, do_h, dq_b, dq_n, dq_h,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries; writes g delta_i to DELTA [B, H, N] for the dK, dV kernel and for ds."""
    pid, block = _pair(N, BLOCK_M)
    b, h = (pid // H).to(tl.int64), pid % H
    rows, cols = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    EXACT_M: tl.constexpr = N % BLOCK_M == 0
    EXACT_N: tl.constexpr = N % BLOCK_N == 0
    do = _load(DO + b * do_b + h * do_h, rows, cols, do_n, N, EXACT_M, UPCAST)
    o = _load(O + b * o_b + h * o_h, rows, cols, o_n, N, EXACT_M, UPCAST)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + pid.to(tl.int64) * N + rows, delta, mask=rows < N)
    q = _load(Q + b * q_b + h * q_h, rows, cols, q_n, N, EXACT_M, UPCAST)
    lse = tl.load(LSE + pid.to(tl.int64) * N + rows, mask=rows < N, other=float("inf"))
    g = _gate(HEAD_SCALE, h)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(K + b * k_b + h * k_h, keys, cols, k_n, N, EXACT_N, UPCAST)
        v = _load(V + b * v_b + h * v_h, keys, cols, v_n, N, EXACT_N, UPCAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if not EXACT_N:
            s = tl.where(keys[None, :] < N, s, -float("inf"))
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp * g - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ + b * dq_b + h * dq_h, rows, cols, dq_n, N, dq * softmax_scale, EXACT_M)


@triton.jit
def mas_flash_backward_dkdv(
    Q, K, V, HEAD_SCALE, DO, LSE, DELTA, DK, DV,
    scale, softmax_scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys, queries streamed in blocks of BLOCK_M; works on S^T."""
    pid, block = _pair(N, BLOCK_N)
    b, h = (pid // H).to(tl.int64), pid % H
    keys, cols = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    EXACT_M: tl.constexpr = N % BLOCK_M == 0
    EXACT_N: tl.constexpr = N % BLOCK_N == 0
    k = _load(K + b * k_b + h * k_h, keys, cols, k_n, N, EXACT_N, UPCAST)
    v = _load(V + b * v_b + h * v_h, keys, cols, v_n, N, EXACT_N, UPCAST)
    g = _gate(HEAD_SCALE, h)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for start in tl.range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(Q + b * q_b + h * q_h, rows, cols, q_n, N, EXACT_M, UPCAST)
        do = _load(DO + b * do_b + h * do_h, rows, cols, do_n, N, EXACT_M, UPCAST)
        lse = tl.load(LSE + pid.to(tl.int64) * N + rows, mask=rows < N, other=float("inf"))  # P = 0 past the end
        delta = tl.load(DELTA + pid.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp * g - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(DK + b * dk_b + h * dk_h, keys, cols, dk_n, N, dk * softmax_scale, EXACT_N)
    _store(DV + b * dv_b + h * dv_h, keys, cols, dv_n, N, dv * g, EXACT_N)


# ------------------------------------------------------------------------------------------------ launchers


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for t in tensors for s in t.stride()[:3])


def _common(q: Tensor) -> dict[str, object]:
    return {
        "H": q.shape[2],
        "D": q.shape[3],
        "UPCAST": INTERPRET and q.dtype != torch.float32,
        "PRECISION": product_precision(q),
    }


def _block(n: int) -> dict[str, object]:
    block = max(16, triton.next_power_of_2(n))
    return {"BLOCK": block, "EXACT": block == n}


def forward(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, o: Tensor, lse: Tensor) -> list[Launch]:
    """Launches that fill ``o`` [B, N, H, D] and, for N > 128, ``lse`` [B, H, N] float32."""
    n, dim = q.shape[1], q.shape[3]
    scale = dim**-0.5 * LOG2E
    if n > SMALL:
        return [_flash_forward(q, k, v, head_scale, o, lse, scale)]
    options, tiles = settings("mas_small_forward", q, D=dim, N=n)
    if tiles.get("STREAM"):
        return [_flash_forward(q, k, v, head_scale, o, rows_like(q), scale)]
    constants = {**_common(q), **_block(n)}
    if tiles.get("PERSISTENT") and _describable(q, k, v, o):
        kernel, maps = mas_small_forward_persistent, (q, k, v, o)
        return [_persistent(kernel, maps, (head_scale,), (scale,), constants, options, tiles)]
    args = (q, k, v, head_scale, o, n, scale, *_strides(q, k, v, o))
    return [Launch(mas_small_forward, (q.shape[0] * q.shape[2],), args, constants, options)]


def _flash_forward(q, k, v, head_scale, o, lse, scale) -> Launch:
    batch, n, heads, dim = q.shape
    options, tiles = settings("mas_flash_forward", q, D=dim)
    grid = (triton.cdiv(n, tiles["BLOCK_M"]) * batch * heads,)
    args = (q, k, v, head_scale, o, lse, scale, *_strides(q, k, v, o))
    return Launch(mas_flash_forward, grid, args, {"N": n, **_common(q), **tiles}, options)


def _describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can address the tensors: bases and strides are multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:3]) for t in tensors)


def _persistent(
    kernel, maps: tuple[Tensor, ...], others: tuple[Tensor, ...], scales: tuple[float, ...], constants, options, tiles
) -> Launch:
    """Launch of a persistent kernel: PERSISTENT programs a multiprocessor over the (batch, head) pairs of ``maps``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    q = maps[0]
    batch, n, heads, dim = q.shape
    block = [1, constants["BLOCK"], 1, dim]
    descriptors = [TensorDescriptor(t, list(t.shape), list(t.stride()), block) for t in maps]
    total = batch * heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else PROCESSORS
    programs = min(total, processors * tiles["PERSISTENT"])
    args = (*descriptors, *others, n, *scales, total, programs)
    return Launch(kernel, (programs,), args, {**constants, "STAGES": tiles["STAGES"]}, options)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, partial: Tensor,
) -> list[Launch]:  # fmt: skip
    """Launches that fill dq, dk, dv and ``partial`` (from :func:`partial_like`), which :func:`finish` turns into ds.

    ``o`` and ``lse`` come from the forward and are read only for N > 128.
    """
    batch, n, heads, dim = q.shape
    scales = (dim**-0.5 * LOG2E, dim**-0.5)
    launches = []
    if n <= SMALL:
        options, tiles = settings("mas_small_backward", q, D=dim, N=n)
        if not tiles.get("STREAM"):
            constants, maps = {**_common(q), **_block(n)}, (q, k, v, do, dq, dk, dv)
            if tiles.get("PERSISTENT") and _describable(*maps):
                kernel, others = mas_small_backward_persistent, (head_scale, partial)
                return [_persistent(kernel, maps, others, scales, constants, options, tiles)]
            args = (q, k, v, head_scale, do, dq, dk, dv, partial, n, *scales, *_strides(*maps))
            return [Launch(mas_small_backward, (batch * heads,), args, constants, options)]
        o, lse = torch.empty_like(do), rows_like(q)
        launches.append(_flash_forward(q, k, v, head_scale, o, lse, scales[0]))
    options, tiles = settings("mas_flash_backward_dq", q, D=dim)
    args = (q, k, v, head_scale, o, do, lse, partial, dq, *scales, *_strides(q, k, v, o, do, dq))
    grid = (triton.cdiv(n, tiles["BLOCK_M"]) * batch * heads,)
    launches.append(Launch(mas_flash_backward_dq, grid, args, {"N": n, **_common(q), **tiles}, options))
    options, tiles = settings("mas_flash_backward_dkdv", q, D=dim)
    args = (q, k, v, head_scale, do, lse, partial, dk, dv, *scales, *_strides(q, k, v, do, dk, dv))
    grid = (triton.cdiv(n, tiles["BLOCK_N"]) * batch * heads,)
    launches.append(Launch(mas_flash_backward_dkdv, grid, args, {"N": n, **_common(q), **tiles}, options))
    return launches


def finish(partial: Tensor, head_scale: Tensor) -> Tensor:
    """Gradient [H] of the head scale from the ``partial`` that :func:`backward` filled."""
    if partial.dim() == 2:  # g (1 - g) sum_i delta_i of each (batch, head)
        return partial.sum(0).to(head_scale.dtype)
    return ((1 - head_scale.float().sigmoid()) * partial.sum((0, 2))).to(head_scale.dtype)  # sums of g delta_i


def partial_like(q: Tensor) -> Tensor:
    """Uninitialised ``partial`` for :func:`backward`, float32: [B, H] for the one-pass kernel, else [B, H, N]."""
    whole = q.shape[1] <= SMALL and "STREAM" not in settings("mas_small_backward", q, D=q.shape[3], N=q.shape[1])[1]
    return q.new_empty((q.shape[0], q.shape[2]), dtype=torch.float32) if whole else rows_like(q)


def rows_like(q: Tensor) -> Tensor:
    """Uninitialised float32 tensor [B, H, N], one value per query."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
