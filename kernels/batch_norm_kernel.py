"""Batch normalisation in training with the ReLU, and the 2x2 max-pool, that follow it, in Triton.

Rows are positions: x [T, C] with T = B H W (a channels_last map seen as a matrix).  With mu and v the mean and the
biased variance of a column, r = 1 / sqrt(v + eps) and xhat = (x - mu) r:

    y = relu(w xhat + b)                      pooled: y = max of the four y of a 2x2 window
    dw = sum g xhat     db = sum g            g = dy where the output is positive; pooled: at the window's first maximum
    dx = w r (g - db / T - xhat dw / T)

Memory traffic in passes over x (with a pool in brackets).  Forward reads x for the statistics, reads it again and
writes y: three passes (2.25) where BN, ReLU and pool as separate operators take five (6.25 and the pool's indices).
Backward reads x and dy twice and writes dx: five passes (3.5) where the operators take eight (11).  Only x and the
statistics are saved for backward: signs and maxima are recomputed, so neither the normalised map nor the indices are
written to memory.  torch.compile fuses layers without a pool as well as these kernels do, so under torch.compile only
pooled layers use the kernels (``dtn_fast.model.backbone``).

Statistics are summed as deviations from the column's first value, which avoids cancellation when the mean is far from
zero, and merged in a fixed order: no atomics, bitwise equal results in every run.  All arithmetic is float32.  A NaN or
an infinity in a column makes the whole column NaN, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtn_fast.kernels.launch import Launch
from dtn_fast.kernels.launch_values import settings

# ------------------------------------------------------------------------------------------------ device functions


@triton.jit
def _corner(out, WIDTH: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr):
    """Row of x at the upper left corner of the 2x2 window of each pooled row ``out``."""
    image, inside = out // (HALF_H * HALF_W), out % (HALF_H * HALF_W)
    return (image * 2 * HALF_H + inside // HALF_W * 2) * WIDTH + inside % HALF_W * 2


@triton.jit
def _centred(X, rows, cols, mask, mean, C: tl.constexpr):
    """x - mean: xhat before its division by the deviation, which the columns' factors hold."""
    x = tl.load(X + rows[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return x - mean[None, :]


@triton.jit
def _better(z, best):
    """Mask where z replaces the maximum ``best``: it is strictly greater (the first of equals stays), or one is NaN."""
    return (z <= best) == 0


@triton.jit
def column_of(W, B, MEAN, VAR, cols, eps, C: tl.constexpr):
    """mean, r = 1 / sqrt(v + eps), w r and b of the columns: BN(x) = (x - mean) w r + b."""
    good = cols < C
    mean = tl.load(MEAN + cols, mask=good, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(VAR + cols, mask=good, other=1.0) + eps)
    w = tl.load(W + cols, mask=good, other=0.0).to(tl.float32)
    b = tl.load(B + cols, mask=good, other=0.0).to(tl.float32)
    return mean, r, w * r, b


@triton.jit
def _window(
    X, DY, out, rows_out, cols, mean, scale, b,
    C: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    WIDTH: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr,
):  # fmt: skip
    """Gradient g, index in the window (0 to 3) and x - mean of the input that gave each output."""
    mask = (out[:, None] < rows_out) & (cols[None, :] < C)
    dy = tl.load(DY + out[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    first = out
    if POOL:
        first = _corner(out, WIDTH, HALF_H, HALF_W)
    x = _centred(X, first, cols, mask, mean, C)
    best = x * scale[None, :] + b[None, :]
    pick = tl.full(x.shape, 0, tl.int32)
    if POOL:
        for k in tl.static_range(1, 4):
            other = _centred(X, first + (k // 2) * WIDTH + k % 2, cols, mask, mean, C)
            z = other * scale[None, :] + b[None, :]
            more = _better(z, best)
            best, x, pick = tl.where(more, z, best), tl.where(more, other, x), tl.where(more, k, pick)
    if RELU:
        dy = tl.where((best <= 0.0) | (mask == 0), 0.0, dy)
    return dy, pick, x


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def bn_stats(
    X, PARTIAL, total,
    C: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes mean and sum of squared deviations of this program's rows to PARTIAL [splits, 2, C]."""
    split = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    shift = tl.load(X + cols, mask=good, other=0.0).to(tl.float32)
    s1 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):  # so many loads are under way at once
        rows = ((split * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (rows[:, None] < total) & good[None, :]
        x = tl.load(X + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift[None, :], 0.0)
        s1 += d
        s2 += d * d
    count = tl.minimum(total - split * STEPS * BLOCK_T, STEPS * BLOCK_T).to(tl.float32)
    mean = tl.sum(s1, 0) / count
    out = PARTIAL + split.to(tl.int64) * 2 * C + cols
    tl.store(out, shift + mean, mask=good)
    tl.store(out + C, tl.sum(s2, 0) - mean * mean * count, mask=good)


@triton.jit
def bn_merge(
    PARTIAL, MEAN, VAR, total, splits, each,
    C: tl.constexpr, STEPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the statistics of splits of ``each`` rows into the mean and biased variance [C] of all rows."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    sums = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        part = step * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (part[:, None] < splits) & good[None, :]
        count = tl.minimum(total - part * each, each).to(tl.float32)
        mean = tl.load(PARTIAL + part[:, None] * 2 * C + cols[None, :], mask=mask, other=0.0)
        sums += tl.sum(tl.where(mask, mean * count[:, None], 0.0), 0)
    centre = sums / total
    squares = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        part = step * BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (part[:, None] < splits) & good[None, :]
        count = tl.minimum(total - part * each, each).to(tl.float32)
        mean = tl.load(PARTIAL + part[:, None] * 2 * C + cols[None, :], mask=mask, other=0.0)
        square = tl.load(PARTIAL + part[:, None] * 2 * C + C + cols[None, :], mask=mask, other=0.0)
        d = mean - centre[None, :]
        squares += tl.sum(tl.where(mask, square + d * d * count[:, None], 0.0), 0)
    tl.store(MEAN + cols, centre, mask=good)
    tl.store(VAR + cols, squares / total, mask=good)


@triton.jit
def bn_apply(
    X, W, B, MEAN, VAR, RESIDUAL, Y, eps, rows_out,
    C: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    WIDTH: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_T outputs: relu(w xhat + b), with POOL each window's maximum; without RELU w xhat + b + RESIDUAL."""
    out = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (out[:, None] < rows_out) & (cols[None, :] < C)
    mean, _, scale, b = column_of(W, B, MEAN, VAR, cols, eps, C)
    first = out
    if POOL:
        first = _corner(out, WIDTH, HALF_H, HALF_W)
    best = _centred(X, first, cols, mask, mean, C) * scale[None, :] + b[None, :]
    if POOL:
        for k in tl.static_range(1, 4):
            z = _centred(X, first + (k // 2) * WIDTH + k % 2, cols, mask, mean, C) * scale[None, :] + b[None, :]
            best = tl.where(_better(z, best), z, best)
    at = out[:, None].to(tl.int64) * C + cols[None, :]
    if RELU:
        y = tl.where(best <= 0.0, 0.0, best)
    else:
        y = best + tl.load(RESIDUAL + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def bn_backward_stats(
    X, W, B, MEAN, VAR, DY, PARTIAL, eps, rows_out,
    C: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    WIDTH: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the sums of g xhat and of g over this program's outputs to PARTIAL [splits, 2, C]."""
    split = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, r, scale, b = column_of(W, B, MEAN, VAR, cols, eps, C)
    dw = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        out = (split * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        g, _, x = _window(X, DY, out, rows_out, cols, mean, scale, b, C, RELU, POOL, WIDTH, HALF_H, HALF_W)
        dw += g * x
        db += g
    at = PARTIAL + split.to(tl.int64) * 2 * C + cols
    tl.store(at, tl.sum(dw, 0) * r, mask=cols < C)
    tl.store(at + C, tl.sum(db, 0), mask=cols < C)


@triton.jit
def bn_backward_apply(
    X, W, B, MEAN, VAR, DY, SUMS, DX, eps, rows_out, total,
    C: tl.constexpr, POOL: tl.constexpr, WIDTH: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dx of the inputs of BLOCK_T outputs; SUMS [2, C] holds dw and db."""
    out = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (out[:, None] < rows_out) & (cols[None, :] < C)
    mean, r, scale, b = column_of(W, B, MEAN, VAR, cols, eps, C)
    # dx = scale g + (x - mean) from_x + constant
    from_x = (-scale * r * tl.load(SUMS + cols, mask=cols < C, other=0.0) / total)[None, :]
    constant = (-scale * tl.load(SUMS + C + cols, mask=cols < C, other=0.0) / total)[None, :]
    g, pick, x = _window(X, DY, out, rows_out, cols, mean, scale, b, C, True, POOL, WIDTH, HALF_H, HALF_W)
    g *= scale[None, :]
    if POOL:
        first = _corner(out, WIDTH, HALF_H, HALF_W)
        for k in tl.static_range(4):
            rows = first + (k // 2) * WIDTH + k % 2
            own = _centred(X, rows, cols, mask, mean, C)  # read again, from cache
            dx = own * from_x + tl.where(pick == k, g + constant, constant)
            tl.store(DX + rows[:, None].to(tl.int64) * C + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
    else:
        dx = x * from_x + (g + constant)
        tl.store(DX + out[:, None].to(tl.int64) * C + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------ launchers


def tiles(kernel: str, x: Tensor, pool: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Launch options and block sizes of ``kernel`` for x [..., C]."""
    options, values = settings(kernel, x, C=x.shape[-1], POOL=int(pool))
    return options, {**values, "BLOCK_C": min(values["BLOCK_C"], triton.next_power_of_2(x.shape[-1]))}


def share_rows(rows: int, columns: int, constants: dict[str, int]) -> int:
    """Sets STEPS so that about PROGRAMS programs share the rows; returns the number of splits of the rows."""
    block = constants["BLOCK_T"]
    wanted = max(1, min(triton.cdiv(rows, block), constants.pop("PROGRAMS") // columns))
    constants["STEPS"] = triton.next_power_of_2(triton.cdiv(rows, wanted * block))  # few values: few recompilations
    return triton.cdiv(rows, constants["STEPS"] * block)


def _shape(size: tuple[int, int], channels: int, pool: bool) -> dict[str, Any]:
    height, width = size if pool else (2, 2)  # unused without a pool; constants avoid a recompilation
    return {"C": channels, "POOL": pool, "WIDTH": width, "HALF_H": height // 2, "HALF_W": width // 2}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, size: tuple[int, int], y: Tensor, mean: Tensor, var: Tensor
) -> list[Launch]:
    """Launches that fill y [T or T / 4, C], mean and var [C] float32 from x [T, C]; pooled if y is shorter than x.

    size: height and width of a map, so that T = B height width.
    """
    total, channels = x.shape
    options, constants = tiles("bn_stats", x)
    columns = triton.cdiv(channels, constants["BLOCK_C"])
    splits = share_rows(total, columns, constants)
    partial = x.new_empty(splits, 2, channels, dtype=torch.float32)
    each = constants["STEPS"] * constants["BLOCK_T"]
    launches = [Launch(bn_stats, (splits, columns), (x, partial, total), {"C": channels, **constants}, options)]
    return [*launches, merge(partial, each, total, mean, var), apply(x, weight, bias, mean, var, eps, size, None, y)]


def merge(partial: Tensor, each: int, total: int, mean: Tensor, var: Tensor) -> Launch:
    """Launch that fills mean and var [C] from ``partial`` [splits, 2, C], the statistics of splits of ``each`` rows."""
    splits, _, channels = partial.shape
    options, constants = tiles("bn_merge", partial)
    constants["STEPS"] = triton.next_power_of_2(triton.cdiv(splits, constants["BLOCK_S"]))  # few recompilations
    grid = (triton.cdiv(channels, constants["BLOCK_C"]),)
    return Launch(bn_merge, grid, (partial, mean, var, total, splits, each), {"C": channels, **constants}, options)


def apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, size: tuple[int, int],
    residual: Tensor | None, y: Tensor,
) -> Launch:  # fmt: skip
    """Launch that fills y: relu(BN(x)), pooled if y is shorter than x; with ``residual``, BN(x) + residual."""
    options, constants = tiles("bn_apply", x, len(y) < len(x))
    constants = {"RELU": residual is None, **_shape(size, x.shape[1], len(y) < len(x)), **constants}
    grid = (triton.cdiv(len(y), constants["BLOCK_T"]), triton.cdiv(x.shape[1], constants["BLOCK_C"]))
    args = (x, weight, bias, mean, var, y if residual is None else residual, y, float(eps), len(y))
    return Launch(bn_apply, grid, args, constants, options)


def backward_stats(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    size: tuple[int, int], relu: bool = True,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """Launch that fills partial sums, and these sums [splits, 2, C]; their sum over splits is (dw, db)."""
    options, constants = tiles("bn_backward_stats", x, len(dy) < len(x))
    channels = x.shape[1]
    columns = triton.cdiv(channels, constants["BLOCK_C"])
    splits = share_rows(len(dy), columns, constants)
    partial = x.new_empty(splits, 2, channels, dtype=torch.float32)
    constants = {"RELU": relu, **_shape(size, channels, len(dy) < len(x)), **constants}
    args = (x, weight, bias, mean, var, dy, partial, float(eps), len(dy))
    return Launch(bn_backward_stats, (splits, columns), args, constants, options), partial


def backward_apply(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    size: tuple[int, int], sums: Tensor, dx: Tensor,
) -> Launch:  # fmt: skip
    """Launch that fills dx [T, C] from ``sums`` [2, C], which holds dw and db."""
    options, constants = tiles("bn_backward_apply", x, len(dy) < len(x))
    constants = {**_shape(size, x.shape[1], len(dy) < len(x)), **constants}
    grid = (triton.cdiv(len(dy), constants["BLOCK_T"]), triton.cdiv(x.shape[1], constants["BLOCK_C"]))
    args = (x, weight, bias, mean, var, dy, sums, dx, float(eps), len(dy), len(x))
    return Launch(bn_backward_apply, grid, args, constants, options)
