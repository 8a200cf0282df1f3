"""The noisy expert gate in Triton: F' = F * sigmoid(max_e m_e), m_e = sigmoid(s_e) * sigmoid(E_e(F + n_e)).

Rows are positions: x, y, dy [T, C] with T = B H W (a channels_last map seen as a matrix).  E_e(z) = w2_e . relu(W1_e z
+ b1_e) + b2_e with w1 [E, M, C], b1 and w2 [E, M], b2 and s [E].  n_e is Gaussian of standard deviation ``std``, drawn
in registers: element i = row * C + channel of expert e takes half a word of Philox-4x32-10 at counter (i // 8, e) under
the seed (reference.gate_noise draws the same numbers), so neither forward nor backward ever writes noise to memory.

Forward: one kernel, 2 T C E (M + 1) flops; reads x and the weights (x again from cache for each further expert and for
the product), writes y, the attention map a [T] float32 and the winning expert [T] int8 (the first at a tie, as torch).

Backward.  Only the winner w of a row has a gradient.  With A = a, m = m_w, p = sigmoid(E_w):

    dA = sum_c dy_c x_c     dm = dA A (1 - A)     de = dm sigmoid(s_w) p (1 - p)     ds_w = sum dm p sigmoid'(s_w)
    db2_w = sum de          dw2_w = sum de h      dh = de w2_w [h > 0]               db1_w = sum dh
    dx = dy A + dh W1_w     dW1_w = sum dh (x + n_w)^T

The row kernel recomputes noise and h for each expert in turn, uses only the rows that this expert won, and writes dx
(each row once, in its winner's turn), dh [T, M] and per-program sums of the small gradients.  The weight kernel redraws
the noise and multiplies dh by x + n in splits of the rows.  Partial sums are added in a fixed order: no atomics,
bitwise equal results in every run.  Products run in x's dtype, accumulation and everything else in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtn_fast.kernels.launch import INTERPRET, Launch, product_precision
from dtn_fast.kernels.launch_values import settings

# ------------------------------------------------------------------------------------------------ device functions


@triton.jit
def _normals(word, FAST: tl.constexpr):
    """Two standard normals from one 32-bit word: Box-Muller on its halves."""
    u = (word & 0xFFFF).to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06
    angle = (word >> 16).to(tl.float32) * 9.587379924285257e-05
    if FAST:  # the special function unit: a fifth of the instructions, absolute error below 1e-6
        r = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
        r = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [r * -1.3862943611198906], tl.float32, is_pure=True, pack=1
        )
        c = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        s = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
    else:
        r = tl.sqrt(tl.log2(u) * -1.3862943611198906)
        c = tl.cos(angle)
        s = tl.sin(angle)
    return r * c, r * s


@triton.jit
def _noise(seed, expert, calls, ROWS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr):
    """Noise of a [ROWS, COLS] tile from its Philox calls [ROWS, COLS / 8]: one call gives eight channels."""
    zero = calls * 0
    w0, w1, w2, w3 = tl.philox(seed, calls, zero + expert, zero, zero)
    a, b = _normals(w0, FAST)
    c, d = _normals(w1, FAST)
    e, f = _normals(w2, FAST)
    g, h = _normals(w3, FAST)
    # join appends a dimension of two; the channel's bits are (word // 2, word % 2, cosine or sine)
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def _noisy(x, seed, expert, std, first_call, ROWS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr):
    """x + std * noise, rounded to x's dtype as the reference does; first_call [ROWS, 1]: each row's first call."""
    calls = first_call + tl.arange(0, COLS // 8)[None, :]
    z = _noise(seed, expert, calls, ROWS, COLS, FAST)
    return (x.to(tl.float32) + std * z).to(x.dtype)


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _hidden(
    X, W1, B1, DY, rows, rows_total, x_row, dy_row, seed, expert, std,
    C: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    NOISE: tl.constexpr, WITH_DY: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """relu(W1_e (x + n_e) + b1_e) of BLOCK_T rows, [BLOCK_T, BLOCK_M] float32; WITH_DY: also sum_c dy x, [BLOCK_T]."""
    valid = rows[:, None] < rows_total
    units, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        x = tl.load(X + rows[:, None] * x_row + start + cols[None, :], mask=valid, other=0.0)
        if WITH_DY:
            dy = tl.load(DY + rows[:, None] * dy_row + start + cols[None, :], mask=valid, other=0.0)
            dot += tl.sum(dy.to(tl.float32) * x.to(tl.float32), 1)
        if NOISE:
            first = (rows[:, None] * (C // 8) + start // 8).to(tl.uint32)
            x = _noisy(x, seed, expert, std, first, BLOCK_T, BLOCK_C, FAST)
        w = W1 + (expert * M + units[None, :]) * C + start + cols[:, None]
        if BLOCK_M == M:
            w = tl.load(w)
        else:
            w = tl.load(w, mask=units[None, :] < M, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    bias = tl.load(B1 + expert * M + units, mask=units < M, other=0.0).to(tl.float32)
    return tl.maximum(acc + bias[None, :], 0.0), dot


@triton.jit
def _score(h, W2, B2, expert, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """sigmoid(w2_e . h + b2_e) [rows] and w2_e [BLOCK_M]."""
    units = tl.arange(0, BLOCK_M)
    w2 = tl.load(W2 + expert * M + units, mask=units < M, other=0.0).to(tl.float32)
    return _sigmoid(tl.sum(h * w2[None, :], 1) + tl.load(B2 + expert).to(tl.float32)), w2


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def moe_forward(
    X, W1, B1, W2, B2, EXPERT_SCALE, SEED, Y, A, WINNER,
    std, rows_total, x_row, y_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
    NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate of BLOCK_T rows per program; A and WINNER may both be None."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    seed = 0
    if NOISE:
        seed = tl.load(SEED)
    best = tl.full([BLOCK_T], -1.0, tl.float32)
    winner = tl.zeros([BLOCK_T], tl.int32)
    for expert in tl.static_range(E):
        h, _ = _hidden(
            X, W1, B1, X, rows, rows_total, x_row, x_row, seed, expert, std,
            C, M, BLOCK_T, BLOCK_C, BLOCK_M, NOISE, False, FAST, UPCAST, PRECISION,
        )  # fmt: skip
        p, _ = _score(h, W2, B2, expert, M, BLOCK_M)
        m = _sigmoid(tl.load(EXPERT_SCALE + expert).to(tl.float32)) * p
        winner = tl.where(m > best, expert, winner)  # strictly greater: the first of equals wins
        best = tl.maximum(best, m)
    a = _sigmoid(best)
    if A is not None:
        tl.store(A + rows, a, mask=rows < rows_total)
        tl.store(WINNER + rows, winner.to(tl.int8), mask=rows < rows_total)
    cols = tl.arange(0, BLOCK_OUT)
    valid = rows[:, None] < rows_total
    for start in tl.range(0, C, BLOCK_OUT):
        x = tl.load(X + rows[:, None] * x_row + start + cols[None, :], mask=valid, other=0.0)
        y = (x.to(tl.float32) * a[:, None]).to(Y.dtype.element_ty)
        tl.store(Y + rows[:, None] * y_row + start + cols[None, :], y, mask=valid)


@triton.jit
def moe_backward_rows(
    X, W1, B1, W2, B2, EXPERT_SCALE, SEED, DY, A, WINNER, DX, DH, PARTIAL,
    std, rows_total, x_row, dy_row, dx_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
    NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dx and dh of BLOCK_T rows; PARTIAL [programs, E, 2 M + 2] holds this program's db1, dw2, db2 and ds."""
    pid = tl.program_id(0)
    rows = (pid * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = rows < rows_total
    units, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_OUT)
    seed = 0
    if NOISE:
        seed = tl.load(SEED)
    a = tl.load(A + rows, mask=inside, other=0.0)
    winner = tl.load(WINNER + rows, mask=inside, other=-1).to(tl.int32)
    for expert in tl.static_range(E):
        h, da = _hidden(
            X, W1, B1, DY, rows, rows_total, x_row, dy_row, seed, expert, std,
            C, M, BLOCK_T, BLOCK_C, BLOCK_M, NOISE, True, FAST, UPCAST, PRECISION,
        )  # fmt: skip
        p, w2 = _score(h, W2, B2, expert, M, BLOCK_M)
        s = _sigmoid(tl.load(EXPERT_SCALE + expert).to(tl.float32))
        mine = winner == expert
        dm = tl.where(mine, da * a * (1.0 - a), 0.0)
        de = dm * s * p * (1.0 - p)
        dh = tl.where(h > 0.0, de[:, None] * w2[None, :], 0.0)
        out = PARTIAL + (pid * E + expert).to(tl.int64) * (2 * M + 2)
        tl.store(out + units, tl.sum(dh, 0), mask=units < M)
        tl.store(out + M + units, tl.sum(h * de[:, None], 0), mask=units < M)
        # db2 and ds as two columns: reducing a row vector to a scalar crashes the compiler on sm_100
        last = tl.where(units[None, :] == 0, de[:, None], (s * (1.0 - s) * dm * p)[:, None])
        tl.store(out + 2 * M + units, tl.sum(last, 0), mask=units < 2)
        dh = dh.to(DH.dtype.element_ty)
        tl.store(DH + rows[:, None] * M + units[None, :], dh, mask=mine[:, None] & (units[None, :] < M))
        if UPCAST:
            dh = dh.to(tl.float32)
        for start in tl.range(0, C, BLOCK_OUT):
            w = tl.load(
                W1 + (expert * M + units[:, None]) * C + start + cols[None, :], mask=units[:, None] < M, other=0.0
            )
            if UPCAST:
                w = w.to(tl.float32)
            dx = tl.dot(dh, w, input_precision=PRECISION)
            dy = tl.load(DY + rows[:, None] * dy_row + start + cols[None, :], mask=mine[:, None], other=0.0)
            dx = (dx + dy.to(tl.float32) * a[:, None]).to(DX.dtype.element_ty)
            tl.store(DX + rows[:, None] * dx_row + start + cols[None, :], dx, mask=mine[:, None])


@triton.jit
def moe_backward_weight(
    X, SEED, WINNER, DH, DW1,
    std, rows_total, x_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dW1 of one expert, BLOCK_C channels and a split of STEPS * BLOCK_T rows; DW1 [splits, E, M, C] float32."""
    column, split, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    units, cols = tl.arange(0, BLOCK_M), column * BLOCK_C + tl.arange(0, BLOCK_C)
    seed = 0
    if NOISE:
        seed = tl.load(SEED)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        rows = ((split * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mine = tl.load(WINNER + rows, mask=rows < rows_total, other=-1) == expert
        dh = tl.load(DH + rows[:, None] * M + units[None, :], mask=mine[:, None] & (units[None, :] < M), other=0.0)
        x = tl.load(X + rows[:, None] * x_row + cols[None, :], mask=mine[:, None], other=0.0)
        if NOISE:
            first = (rows[:, None] * (C // 8) + column * (BLOCK_C // 8)).to(tl.uint32)
            x = _noisy(x, seed, expert, std, first, BLOCK_T, BLOCK_C, FAST)
        if UPCAST:
            x, dh = x.to(tl.float32), dh.to(tl.float32)
        acc = tl.dot(tl.trans(dh), x, acc, input_precision=PRECISION)
    out = DW1 + ((split * E + expert).to(tl.int64) * M + units[:, None]) * C + cols[None, :]
    tl.store(out, acc, mask=units[:, None] < M)


# ------------------------------------------------------------------------------------------------ launchers


def _constants(kernel: str, x: Tensor, w1: Tensor, std: float) -> tuple[dict[str, int], dict[str, Any]]:
    experts, hidden, channels = w1.shape
    options, tiles = settings(kernel, x, M=triton.next_power_of_2(hidden))
    divisor = channels & -channels  # the largest power of two that divides C
    blocks = {k: min(v, divisor) if k in ("BLOCK_C", "BLOCK_OUT") else v for k, v in tiles.items()}
    return options, {
        "E": experts,
        "C": channels,
        "M": hidden,
        "BLOCK_M": triton.next_power_of_2(hidden),
        "NOISE": std > 0,
        "FAST": not INTERPRET,
        "UPCAST": INTERPRET and x.dtype != torch.float32,
        "PRECISION": product_precision(x),
        **blocks,
    }


def forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, expert_scale: Tensor, seed: Tensor, std: float,
    y: Tensor, a: Tensor, winner: Tensor,
) -> list[Launch]:  # fmt: skip
    """Launches that fill y [T, C], a [T] float32 and winner [T] int8 from x [T, C]; w1 in x's dtype."""
    options, constants = _constants("moe_forward", x, w1, std)
    args = (x, w1, b1, w2, b2, expert_scale, seed, y, a, winner, float(std), x.shape[0], x.stride(0), y.stride(0))
    return [Launch(moe_forward, (triton.cdiv(x.shape[0], constants["BLOCK_T"]),), args, constants, options)]


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, expert_scale: Tensor, seed: Tensor,
    std: float, a: Tensor, winner: Tensor, dx: Tensor,
) -> tuple[list[Launch], Tensor, Tensor]:  # fmt: skip
    """Launches that fill dx [T, C] and two partial sums, and these sums: [P, E, 2 M + 2] and [S, E, M, C] (dW1)."""
    total, (experts, hidden, channels) = x.shape[0], w1.shape
    options, constants = _constants("moe_backward_rows", x, w1, std)
    programs = triton.cdiv(total, constants["BLOCK_T"])
    partial = x.new_empty(programs, experts, 2 * hidden + 2, dtype=torch.float32)
    dh = x.new_empty(total, hidden)
    strides = (x.stride(0), dy.stride(0), dx.stride(0))
    args = (x, w1, b1, w2, b2, expert_scale, seed, dy, a, winner, dx, dh, partial, float(std), total, *strides)
    launches = [Launch(moe_backward_rows, (programs,), args, constants, options)]
    options, constants = _constants("moe_backward_weight", x, w1, std)
    # just enough splits to fill a large GPU with (column, split, expert) programs
    columns, block = channels // constants["BLOCK_C"], constants["BLOCK_T"]
    splits = max(1, min(triton.cdiv(total, block), constants.pop("PROGRAMS") // (columns * experts)))
    steps = triton.next_power_of_2(triton.cdiv(total, splits * block))  # few values: few recompilations
    splits = triton.cdiv(total, steps * block)
    dw1 = x.new_empty(splits, experts, hidden, channels, dtype=torch.float32)
    weight_args = (x, seed, winner, dh, dw1, float(std), total, x.stride(0))
    constants["STEPS"] = steps
    launches.append(Launch(moe_backward_weight, (columns, splits, experts), weight_args, constants, options))
    return launches, partial, dw1


def finish(partial: Tensor, dw1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w1, b1, w2, b2 and expert_scale in float32 from the partial sums of :func:`backward`."""
    hidden = dw1.shape[2]
    small = partial.sum(0)  # [E, 2 M + 2]
    return dw1.sum(0), small[:, :hidden], small[:, hidden : 2 * hidden], small[:, 2 * hidden], small[:, 2 * hidden + 1]
