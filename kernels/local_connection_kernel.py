"""The local connection of a LEVT block in training (paper Eq. 23), in Triton: x + BN(depthwise 3x3 of m).

Rows are positions: m, x, y [T, C] with T = B H W (channels_last maps seen as matrices); w [C, 9] and b [C] of the
convolution, which pads with zeros.  With z the convolution's output in m's dtype and BN as in ``batch_norm``:

    y = x + BN(z)      dz = BN'(dy)      dm_i = sum_k w_k dz_(i - k)      dw_k = sum_i dz_i m_(i + k)      dx = dy

and b has no gradient, as BN subtracts the mean.  Memory traffic in passes over a map.  Forward reads m and writes z
with its statistics, then reads z and x and writes y: five passes where separate operators take eight and torch.compile
six.  Backward reads dy and z for BN's sums, then reads dy, z (neighbours from cache) and m and writes dm, but never dz:
six passes where separate operators take nine.

Statistics are summed as deviations from b and merged in a fixed order; all arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dtn_fast.kernels import batch_norm_kernel
from dtn_fast.kernels.batch_norm_kernel import column_of, share_rows, tiles
from dtn_fast.kernels.launch import Launch

# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _neighbour(rows, total, dh, dw, H: tl.constexpr, W: tl.constexpr):
    """Rows that lie dh below and dw to the right, and a mask of those on the same map."""
    h, w = rows // W % H + dh, rows % W + dw
    return rows + dh * W + dw, (h >= 0) & (h < H) & (w >= 0) & (w < W) & (rows < total)


@triton.jit
def _load(X, rows, there, cols, C: tl.constexpr):
    mask = there[:, None] & (cols[None, :] < C)
    return tl.load(X + rows[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def lc_forward(
    M, WEIGHT, BIAS, Z, PARTIAL, total,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes z of this program's rows, and their mean and sum of squared deviations to PARTIAL [splits, 2, C]."""
    split = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    bias = tl.load(BIAS + cols, mask=good, other=0.0).to(tl.float32)
    s1 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for step in tl.range(0, STEPS):
        rows = (split * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        d = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for k in tl.static_range(9):
            at, there = _neighbour(rows, total, k // 3 - 1, k % 3 - 1, H, W)
            w = tl.load(WEIGHT + cols * 9 + k, mask=good, other=0.0).to(tl.float32)
            d += _load(M, at, there, cols, C) * w[None, :]
        mask = (rows[:, None] < total) & good[None, :]
        z = (d + bias[None, :]).to(Z.dtype.element_ty)
        tl.store(Z + rows[:, None].to(tl.int64) * C + cols[None, :], z, mask=mask)
        d = tl.where(mask, z.to(tl.float32) - bias[None, :], 0.0)
        s1 += d
        s2 += d * d
    count = tl.minimum(total - split * STEPS * BLOCK_T, STEPS * BLOCK_T).to(tl.float32)
    mean = tl.sum(s1, 0) / count
    out = PARTIAL + split.to(tl.int64) * 2 * C + cols
    tl.store(out, bias + mean, mask=good)
    tl.store(out + C, tl.sum(s2, 0) - mean * mean * count, mask=good)


@triton.jit
def _dz(Z, DY, rows, there, cols, mean, r, scale, dw, db, C: tl.constexpr):
    hat = (_load(Z, rows, there, cols, C) - mean[None, :]) * r[None, :]
    dz = scale[None, :] * (_load(DY, rows, there, cols, C) - db[None, :] - hat * dw[None, :])
    return tl.where(there[:, None], dz, 0.0)


@triton.jit
def lc_backward(
    M, WEIGHT, Z, NORM_W, NORM_B, MEAN, VAR, DY, SUMS, DM, PARTIAL, eps, total,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dm of BLOCK_T rows and their part of dw, PARTIAL [programs, C, 9].  SUMS [2, C]: BN's own gradients."""
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    mean, r, norm, _ = column_of(NORM_W, NORM_B, MEAN, VAR, cols, eps, C)
    dw = tl.load(SUMS + cols, mask=good, other=0.0) / total
    db = tl.load(SUMS + C + cols, mask=good, other=0.0) / total
    scale = norm * r
    own = _dz(Z, DY, rows, rows < total, cols, mean, r, scale, dw, db, C)
    dm = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    out = PARTIAL + (pid.to(tl.int64) * C + cols) * 9
    for k in tl.static_range(9):
        at, there = _neighbour(rows, total, k // 3 - 1, k % 3 - 1, H, W)
        tl.store(out + k, tl.sum(own * _load(M, at, there, cols, C), 0), mask=good)
        at, there = _neighbour(rows, total, 1 - k // 3, 1 - k % 3, H, W)
        w = tl.load(WEIGHT + cols * 9 + k, mask=good, other=0.0).to(tl.float32)
        dm += _dz(Z, DY, at, there, cols, mean, r, scale, dw, db, C) * w[None, :]
    mask = (rows[:, None] < total) & good[None, :]
    tl.store(DM + rows[:, None].to(tl.int64) * C + cols[None, :], dm.to(DM.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------ launchers


def forward(
    m: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    size: tuple[int, int], z: Tensor, y: Tensor, mean: Tensor, var: Tensor,
) -> list[Launch]:  # fmt: skip
    """Launches that fill z, y [T, C], mean and var [C] float32 from m and x [T, C]; weight [C, 9], size (H, W)."""
    total, channels = m.shape
    options, constants = tiles("lc_forward", m)
    columns = triton.cdiv(channels, constants["BLOCK_C"])
    splits = share_rows(total, columns, constants)
    partial = m.new_empty(splits, 2, channels, dtype=mean.dtype)
    each = constants["STEPS"] * constants["BLOCK_T"]
    constants = {"C": channels, "H": size[0], "W": size[1], **constants}
    first = Launch(lc_forward, (splits, columns), (m, weight, bias, z, partial, total), constants, options)
    last = batch_norm_kernel.apply(z, norm_weight, norm_bias, mean, var, eps, size, x, y)
    return [first, batch_norm_kernel.merge(partial, each, total, mean, var), last]


def backward_stats(
    dy: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Launch, Tensor]:
    """Launch that fills partial sums, and these sums [splits, 2, C]; their sum over splits is BN's own gradients."""
    return batch_norm_kernel.backward_stats(dy, z, norm_weight, norm_bias, mean, var, eps, (2, 2), relu=False)


def backward(
    dy: Tensor, m: Tensor, weight: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor,
    eps: float, size: tuple[int, int], sums: Tensor, dm: Tensor,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """Launch that fills dm [T, C] and the partial sums of dw, and these sums [programs, C, 9]; ``sums``: [2, C]."""
    total, channels = m.shape
    options, constants = tiles("lc_backward", m)
    programs = triton.cdiv(total, constants["BLOCK_T"])
    partial = m.new_empty(programs, channels, 9, dtype=mean.dtype)
    args = (m, weight, z, norm_weight, norm_bias, mean, var, dy, sums, dm, partial, float(eps), total)
    constants = {"C": channels, "H": size[0], "W": size[1], **constants}
    grid = (programs, triton.cdiv(channels, constants["BLOCK_C"]))
    return Launch(lc_backward, grid, args, constants, options), partial
