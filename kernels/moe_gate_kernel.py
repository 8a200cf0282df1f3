"""The noisy expert gate in Triton: F' = F * sigmoid(max_e m_e), m_e = sigmoid(s_e) * sigmoid(E_e(F + n_e)).

Rows are positions: x, y, dy [T, C] with T = B H W (a channels_last map seen as a matrix).  E_e(z) = w2_e . relu(W1_e z
+ b1_e) + b2_e with w1 [E, M, C], b1 and w2 [E, M], b2 and s [E].  n_e is Gaussian of standard deviation ``std``, drawn
in registers: element i = row * C + channel of expert e takes half a word of Philox-4x32-10 at counter (i // 8, e) under
the seed (reference.gate_noise draws the same numbers), so neither forward nor backward ever writes noise to memory.

Forward: one kernel, 2 T C E (M + 1) flops; reads x and the weights (x again from cache for every two further experts
and for the product), writes y, the attention map a [T] float32, the winning expert [T] int8 (the first at a tie, as
torch) and, if there will be a backward, the winner's hidden units h [T, M].

Backward.  Only the winner w of a row has a gradient.  With A = a, m = m_w, p = sigmoid(E_w):

    dA = sum_c dy_c x_c     dm = dA A (1 - A)     de = dm sigmoid(s_w) p (1 - p)     ds_w = sum dm p sigmoid'(s_w)
    db2_w = sum de          dw2_w = sum de h      dh = de w2_w [h > 0]               db1_w = sum dh
    dx = dy A + dh W1_w     dW1_w = sum dh (x + n_w)^T

The row kernel reads h, so that it needs no noise, and writes dx, dh [T, M] and per-program sums of the small gradients.
Hidden units of up to 256 / M experts stand side by side in a tile, zero where the expert did not win: one product
serves them all.  The weight kernel draws the winner's noise again, once per element, and multiplies dh by x + n in
splits of the rows.  Partial sums are added in a fixed order: no atomics, bitwise equal results in every run.  Products
run in x's dtype, accumulation and everything else in float32.
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
def _philox(seed, calls, stream):
    """Philox-4x32-10 words at counter (calls, stream, 0, 0), uint32; as tl.philox, but each product is one
    instruction, where umulhi and a product are two."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = calls
    c1, c2, c3 = calls * 0 + stream, calls * 0, calls * 0
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _polar(word, FAST: tl.constexpr):
    """Box-Muller on the halves k, l of a 32-bit word: sqrt(-log2((k + 1/2) / 65536)), and cosine and sine of
    2 pi l / 65536."""
    if FAST:  # the special function unit: a fifth of the instructions, absolute error of a normal below 1e-6.  A half
        # becomes a float as the mantissa of 2**23 + k, because conversions share the special functions' pipe.
        r, c, s = tl.inline_asm_elementwise(
            """{
            .reg .b32 k, l;
            .reg .f32 u, t;
            prmt.b32 k, $3, 0x4B000000, 0x7610;
            prmt.b32 l, $3, 0x4B000000, 0x7632;
            mov.b32 u, k;
            mov.b32 t, l;
            fma.rn.f32 u, u, 0f37800000, 0fC2FFFFFF;
            lg2.approx.ftz.f32 u, u;
            abs.f32 u, u;
            sqrt.approx.ftz.f32 $0, u;
            fma.rn.f32 t, t, 0f38C90FDB, 0fC4490FDB;
            cos.approx.ftz.f32 $1, t;
            sin.approx.ftz.f32 $2, t;
            }""",
            "=f,=f,=f,r", [word], (tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        angle = (word >> 16).to(tl.float32) * 9.587379924285257e-05
        r = tl.sqrt(-tl.log2((word & 0xFFFF).to(tl.float32) * 1.52587890625e-05 + 7.62939453125e-06))
        c = tl.cos(angle)
        s = tl.sin(angle)
    return r, c, s


@triton.jit
def _noise(seed, stream, calls, std, ROWS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr):
    """Noise of a [ROWS, COLS] tile, as two factors, from its Philox calls [ROWS, COLS / 8]: each gives eight channels.
    stream: the expert, one or [ROWS, 1]."""
    w0, w1, w2, w3 = _philox(seed, calls, stream)
    r0, c0, s0 = _polar(w0, FAST)
    r1, c1, s1 = _polar(w1, FAST)
    r2, c2, s2 = _polar(w2, FAST)
    r3, c3, s3 = _polar(w3, FAST)
    # join appends a dimension of two; the channel's bits are (word // 2, word % 2, cosine or sine)
    radius = tl.join(tl.join(r0, r2), tl.join(r1, r3)) * (std * 1.1774100225154747)  # sqrt(2 ln 2)
    even = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    odd = tl.join(tl.join(s0, s2), tl.join(s1, s3))
    return tl.reshape(tl.join(radius, radius), (ROWS, COLS)), tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def _noisy(x, seed, stream, std, first_call, ROWS: tl.constexpr, COLS: tl.constexpr, FAST: tl.constexpr):
    """x + std * noise, rounded to x's dtype as the reference does; first_call [ROWS, 1]: each row's first call."""
    calls = first_call + tl.arange(0, COLS // 8)[None, :].to(tl.uint32)
    radius, turn = _noise(seed, stream, calls, std, ROWS, COLS, FAST)
    return (x.to(tl.float32) + radius * turn).to(x.dtype)


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-tl.abs(x) * 1.4426950408889634)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _product(x, W1, expert, start, acc, C: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
             UPCAST: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + x W1_e^T over the BLOCK_C channels from ``start``."""
    units, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    w = W1 + (expert * M + units[None, :]) * C + start + cols[:, None]
    if BLOCK_M == M:
        w = tl.load(w)
    else:
        w = tl.load(w, mask=units[None, :] < M, other=0.0)
    if UPCAST:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def _experts(
    X, W1, rows, rows_total, x_row, seed, expert, std,
    C: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    BOTH: tl.constexpr, NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W1_e (x + n_e) of BLOCK_T rows, [BLOCK_T, BLOCK_M] float32, for ``expert`` and, with BOTH, the next one."""
    valid = rows[:, None] < rows_total
    cols = tl.arange(0, BLOCK_C)
    one = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    two = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        x = tl.load(X + rows[:, None] * x_row + start + cols[None, :], mask=valid, other=0.0)
        first = (rows[:, None] * (C // 8) + start // 8).to(tl.uint32)
        z = x
        if NOISE:
            z = _noisy(x, seed, expert, std, first, BLOCK_T, BLOCK_C, FAST)
        one = _product(z, W1, expert, start, one, C, M, BLOCK_C, BLOCK_M, UPCAST, PRECISION)
        if BOTH:
            z = x
            if NOISE:
                z = _noisy(x, seed, expert + 1, std, first, BLOCK_T, BLOCK_C, FAST)
            two = _product(z, W1, expert + 1, start, two, C, M, BLOCK_C, BLOCK_M, UPCAST, PRECISION)
    return one, two


@triton.jit
def _score(acc, B1, W2, B2, EXPERT_SCALE, expert, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Hidden units relu(acc + b1_e) and m_e = sigmoid(s_e) sigmoid(w2_e . h + b2_e) [rows]."""
    units = tl.arange(0, BLOCK_M)
    good = units < M
    h = tl.maximum(acc + tl.load(B1 + expert * M + units, mask=good, other=0.0).to(tl.float32)[None, :], 0.0)
    w2 = tl.load(W2 + expert * M + units, mask=good, other=0.0).to(tl.float32)
    p = _sigmoid(tl.sum(h * w2[None, :], 1) + tl.load(B2 + expert).to(tl.float32))
    return h, _sigmoid(tl.load(EXPERT_SCALE + expert).to(tl.float32)) * p


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def moe_forward(
    X, W1, B1, W2, B2, EXPERT_SCALE, SEED, Y, A, WINNER, HIDDEN,
    std, rows_total, x_row, y_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
    NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate of BLOCK_T rows per program; A, WINNER and HIDDEN may all be None, or HIDDEN alone."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    PAIR: tl.constexpr = 2 if BLOCK_M <= 128 else 1  # experts in one pass: their sums fit the registers
    seed = 0
    if NOISE:
        seed = tl.load(SEED)
    best = tl.full([BLOCK_T], -1.0, tl.float32)
    winner = tl.zeros([BLOCK_T], tl.int32)
    hidden = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for expert in tl.static_range(0, E, PAIR):
        one, two = _experts(
            X, W1, rows, rows_total, x_row, seed, expert, std,
            C, M, BLOCK_T, BLOCK_C, BLOCK_M, PAIR == 2 and expert + 1 < E, NOISE, FAST, UPCAST, PRECISION,
        )  # fmt: skip
        h, m = _score(one, B1, W2, B2, EXPERT_SCALE, expert, M, BLOCK_M)
        better = m > best  # strictly greater: the first of equals wins
        winner = tl.where(better, expert, winner)
        best = tl.where(better, m, best)
        hidden = tl.where(better[:, None], h, hidden)
        if PAIR == 2 and expert + 1 < E:
            h, m = _score(two, B1, W2, B2, EXPERT_SCALE, expert + 1, M, BLOCK_M)
            better = m > best
            winner = tl.where(better, expert + 1, winner)
            best = tl.where(better, m, best)
            hidden = tl.where(better[:, None], h, hidden)
    a = _sigmoid(best)
    valid = rows[:, None] < rows_total
    if A is not None:
        tl.store(A + rows, a, mask=rows < rows_total)
        tl.store(WINNER + rows, winner.to(tl.int8), mask=rows < rows_total)
    if HIDDEN is not None:
        units = tl.arange(0, BLOCK_M)
        kept = hidden.to(HIDDEN.dtype.element_ty)
        tl.store(HIDDEN + rows[:, None] * M + units[None, :], kept, mask=valid & (units[None, :] < M))
    cols = tl.arange(0, BLOCK_OUT)
    for start in tl.range(0, C, BLOCK_OUT):
        x = tl.load(X + rows[:, None] * x_row + start + cols[None, :], mask=valid, other=0.0)
        y = (x.to(tl.float32) * a[:, None]).to(Y.dtype.element_ty)
        tl.store(Y + rows[:, None] * y_row + start + cols[None, :], y, mask=valid)


@triton.jit
def moe_backward_rows(
    X, W1, W2, B2, EXPERT_SCALE, DY, A, WINNER, HIDDEN, DX, DH, PARTIAL,
    rows_total, x_row, dy_row, dx_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dx and dh of BLOCK_T rows, GROUP experts at a time; PARTIAL [programs, E, 2 M + 2] holds this program's
    db1, dw2, db2 and ds."""
    pid = tl.program_id(0)
    rows = (pid * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = rows < rows_total
    a = tl.load(A + rows, mask=inside, other=0.0)
    winner = tl.load(WINNER + rows, mask=inside, other=-1).to(tl.int32)
    da = tl.zeros([BLOCK_T], tl.float32)
    cols = tl.arange(0, BLOCK_C)
    for start in tl.range(0, C, BLOCK_C):
        x = tl.load(X + rows[:, None] * x_row + start + cols[None, :], mask=inside[:, None], other=0.0)
        dy = tl.load(DY + rows[:, None] * dy_row + start + cols[None, :], mask=inside[:, None], other=0.0)
        da += tl.sum(dy.to(tl.float32) * x.to(tl.float32), 1)
    dm = da * a * (1.0 - a)
    column, cols = tl.arange(0, GROUP * BLOCK_M), tl.arange(0, BLOCK_OUT)
    unit = column % BLOCK_M
    for group in tl.static_range(0, E, GROUP):
        expert = group + column // BLOCK_M
        good = (unit < M) & (expert < E)
        # without a winner in this group a row has h = 0, and so dh = 0
        mine = (winner >= group) & (winner < group + GROUP)
        own = (winner[:, None] == expert[None, :]) & good[None, :]
        h = tl.load(HIDDEN + rows[:, None] * M + unit[None, :], mask=own, other=0.0).to(tl.float32)
        w2 = tl.load(W2 + expert * M + unit, mask=good, other=0.0).to(tl.float32)
        b2 = tl.load(B2 + winner, mask=mine, other=0.0).to(tl.float32)
        s = _sigmoid(tl.load(EXPERT_SCALE + winner, mask=mine, other=0.0).to(tl.float32))
        p = _sigmoid(tl.sum(h * w2[None, :], 1) + b2)
        de = tl.where(mine, dm * s * p * (1.0 - p), 0.0)
        ds = tl.where(mine, s * (1.0 - s) * dm * p, 0.0)
        out = PARTIAL + (pid.to(tl.int64) * E + expert) * (2 * M + 2)
        tl.store(out + M + unit, tl.sum(h * de[:, None], 0), mask=good)
        dh = tl.where(h > 0.0, de[:, None] * w2[None, :], 0.0)
        tl.store(out + unit, tl.sum(dh, 0), mask=good)
        # db2 and ds as two columns an expert: reducing a row vector to a scalar crashes the compiler on sm_100
        last = tl.where(unit[None, :] == 0, de[:, None], ds[:, None])
        last = tl.sum(tl.where(winner[:, None] == expert[None, :], last, 0.0), 0)
        tl.store(out + 2 * M + unit, last, mask=good & (unit < 2))
        dh = dh.to(DH.dtype.element_ty)
        tl.store(DH + rows[:, None] * M + unit[None, :], dh, mask=own)
        if UPCAST:
            dh = dh.to(tl.float32)
        for start in tl.range(0, C, BLOCK_OUT):
            w = W1 + (expert[:, None] * M + unit[:, None]) * C + start + cols[None, :]
            w = tl.load(w, mask=good[:, None], other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            dy = tl.load(DY + rows[:, None] * dy_row + start + cols[None, :], mask=mine[:, None], other=0.0)
            dx = tl.dot(dh, w, input_precision=PRECISION) + dy.to(tl.float32) * a[:, None]
            dx = dx.to(DX.dtype.element_ty)
            tl.store(DX + rows[:, None] * dx_row + start + cols[None, :], dx, mask=mine[:, None])


@triton.jit
def moe_backward_weight(
    X, SEED, WINNER, DH, DW1,
    std, rows_total, x_row,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    NOISE: tl.constexpr, FAST: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dW1 of GROUP experts, BLOCK_C channels and a split of STEPS * BLOCK_T rows; DW1 [splits, E, M, C]."""
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2) * GROUP
    column, cols = tl.arange(0, GROUP * BLOCK_M), tile * BLOCK_C + tl.arange(0, BLOCK_C)
    unit, expert = column % BLOCK_M, group + column // BLOCK_M
    good = (unit < M) & (expert < E)
    seed = 0
    if NOISE:
        seed = tl.load(SEED)
    acc = tl.zeros([GROUP * BLOCK_M, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        rows = ((split * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = rows < rows_total
        winner = tl.load(WINNER + rows, mask=inside, other=-1).to(tl.int32)
        own = (winner[:, None] == expert[None, :]) & good[None, :]
        dh = tl.load(DH + rows[:, None] * M + unit[None, :], mask=own, other=0.0)
        x = tl.load(X + rows[:, None] * x_row + cols[None, :], mask=inside[:, None], other=0.0)
        if NOISE:
            first = (rows[:, None] * (C // 8) + tile * (BLOCK_C // 8)).to(tl.uint32)
            x = _noisy(x, seed, winner[:, None].to(tl.uint32), std, first, BLOCK_T, BLOCK_C, FAST)
        if UPCAST:
            x, dh = x.to(tl.float32), dh.to(tl.float32)
        acc = tl.dot(tl.trans(dh), x, acc, input_precision=PRECISION)
    out = DW1 + ((split * E + expert[:, None]).to(tl.int64) * M + unit[:, None]) * C + cols[None, :]
    tl.store(out, acc, mask=good[:, None])


# ------------------------------------------------------------------------------------------------ launchers


def _constants(kernel: str, x: Tensor, w1: Tensor) -> tuple[dict[str, int], dict[str, Any]]:
    experts, hidden, channels = w1.shape
    block = triton.next_power_of_2(hidden)
    options, tiles = settings(kernel, x, M=block, T=len(x))
    divisor = channels & -channels  # the largest power of two that divides C
    blocks = {k: min(v, divisor) if k in ("BLOCK_C", "BLOCK_OUT") else v for k, v in tiles.items()}
    return options, {
        "E": experts,
        "C": channels,
        "M": hidden,
        "BLOCK_M": block,
        "UPCAST": INTERPRET and x.dtype != torch.float32,
        "PRECISION": product_precision(x),
        **blocks,
    }


def _drawing(std: float) -> dict[str, bool]:
    return {"NOISE": std > 0, "FAST": not INTERPRET}


def _group(constants: dict[str, Any]) -> dict[str, int]:
    """GROUP: a power of two of experts whose hidden units stand side by side, in up to 256 columns."""
    return {"GROUP": min(triton.next_power_of_2(constants["E"]), max(256 // constants["BLOCK_M"], 1))}


def forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, expert_scale: Tensor, seed: Tensor, std: float,
    y: Tensor, a: Tensor, winner: Tensor, hidden: Tensor | None,
) -> list[Launch]:  # fmt: skip
    """Launches that fill y [T, C], a [T] float32, winner [T] int8 and, unless None, hidden [T, M] from x [T, C]; w1 in
    x's dtype."""
    options, constants = _constants("moe_forward", x, w1)
    outputs = (y, a, winner, hidden)
    args = (x, w1, b1, w2, b2, expert_scale, seed, *outputs, float(std), x.shape[0], x.stride(0), y.stride(0))
    grid = (triton.cdiv(x.shape[0], constants["BLOCK_T"]),)
    return [Launch(moe_forward, grid, args, {**constants, **_drawing(std)}, options)]


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, b2: Tensor, expert_scale: Tensor, seed: Tensor,
    std: float, a: Tensor, winner: Tensor, hidden: Tensor, dx: Tensor,
) -> tuple[list[Launch], Tensor, Tensor]:  # fmt: skip
    """Launches that fill dx [T, C] and two partial sums, and these sums: [P, E, 2 M + 2] and [S, E, M, C] (dW1)."""
    total, (experts, units, channels) = x.shape[0], w1.shape
    options, constants = _constants("moe_backward_rows", x, w1)
    programs = triton.cdiv(total, constants["BLOCK_T"])
    partial = x.new_empty(programs, experts, 2 * units + 2, dtype=torch.float32)
    dh = x.new_empty(total, units)
    strides = (x.stride(0), dy.stride(0), dx.stride(0))
    args = (x, w1, w2, b2, expert_scale, dy, a, winner, hidden, dx, dh, partial, total, *strides)
    launches = [Launch(moe_backward_rows, (programs,), args, {**constants, **_group(constants)}, options)]
    options, constants = _constants("moe_backward_weight", x, w1)
    constants |= {**_drawing(std), **_group(constants)}
    # just enough splits to fill a large GPU with (column, split, group) programs
    columns, groups = channels // constants["BLOCK_C"], triton.cdiv(experts, constants["GROUP"])
    block = constants["BLOCK_T"]
    splits = max(1, min(triton.cdiv(total, block), constants.pop("PROGRAMS") // (columns * groups)))
    steps = triton.next_power_of_2(triton.cdiv(total, splits * block))  # few values: few recompilations
    splits = triton.cdiv(total, steps * block)
    dw1 = x.new_empty(splits, experts, units, channels, dtype=torch.float32)
    weight_args = (x, seed, winner, dh, dw1, float(std), total, x.stride(0))
    constants["STEPS"] = steps
    launches.append(Launch(moe_backward_weight, (columns, splits, groups), weight_args, constants, options))
    return launches, partial, dw1


def finish(partial: Tensor, dw1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w1, b1, w2, b2 and expert_scale in float32 from the partial sums of :func:`backward`."""
    hidden = dw1.shape[2]
    small = partial.sum(0)  # [E, 2 M + 2]
    return dw1.sum(0), small[:, :hidden], small[:, hidden : 2 * hidden], small[:, 2 * hidden], small[:, 2 * hidden + 1]
