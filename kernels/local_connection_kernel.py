"""The local connection of a LEVT block in training (paper Eq. 23), in Triton: x + BN(depthwise 3x3 of m).

Rows are positions: m, x, y [T, C] with T = B H W (channels_last maps seen as matrices); w [9, C] and b [C] of the
convolution, which pads with zeros.  With z the convolution's output in m's dtype and BN as in ``batch_norm``:

    y = x + BN(z)      dz = BN'(dy)      dm_i = sum_k w_k dz_(i - k)      dw_k = sum_i m_i dz_(i - k)      dx = dy

and b has no gradient, as BN subtracts the mean.  Memory traffic in passes over a map.  Forward reads m and writes z
with its statistics, then reads z and x and writes y: five passes where separate operators take eight and torch.compile
six.  Backward reads dy and z for BN's sums, then reads dy, z (neighbours from cache) and m and writes dm, but never dz:
six passes where separate operators take nine.

A program walks down whole maps, a line of each at a time, and keeps three lines, each also one to the left and one to
the right, in registers: a value is loaded three times and not nine.  Since dm and dw are sums over the same neighbours
of dz, only m's own value is needed besides them.

Statistics are summed as deviations from b and merged in a fixed order; all arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dtn_fast.kernels import batch_norm_kernel
from dtn_fast.kernels.batch_norm_kernel import column_of, tiles
from dtn_fast.kernels.launch import Launch

# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _place(program, MAPS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Maps of a program's lines [MAPS * WIDE], their columns, and the rows of their first positions."""
    line = tl.arange(0, MAPS * WIDE)
    image, w = program * MAPS + line // WIDE, line % WIDE
    return image, w, image * (H * W) + w


@triton.jit
def _there(image, images, h, w, H: tl.constexpr, W: tl.constexpr):
    """Mask of the positions (h, w) that lie on a map."""
    return (image < images) & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _load(X, rows, there, cols, C: tl.constexpr):
    mask = there[:, None] & (cols[None, :] < C)
    return tl.load(X + rows[:, None].to(tl.int64) * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _line(X, image, images, first, h, w, cols, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """Line h of the maps, one position to the left, as it is, and one to the right; zero outside."""
    rows = first + h * W
    left = _load(X, rows - 1, _there(image, images, h, w - 1, H, W), cols, C)
    here = _load(X, rows, _there(image, images, h, w, H, W), cols, C)
    right = _load(X, rows + 1, _there(image, images, h, w + 1, H, W), cols, C)
    return left, here, right


@triton.jit
def _weights(WEIGHT, cols, line, C: tl.constexpr):
    """Three weights of a column of the window's ``line``, float32 [1, columns] each."""
    good = cols < C
    left = tl.load(WEIGHT + (3 * line) * C + cols, mask=good, other=0.0).to(tl.float32)[None, :]
    here = tl.load(WEIGHT + (3 * line + 1) * C + cols, mask=good, other=0.0).to(tl.float32)[None, :]
    right = tl.load(WEIGHT + (3 * line + 2) * C + cols, mask=good, other=0.0).to(tl.float32)[None, :]
    return left, here, right


@triton.jit
def lc_forward(
    M, WEIGHT, BIAS, Z, PARTIAL, images,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    MAPS: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes z of MAPS maps, and their mean and sum of squared deviations to PARTIAL [programs, 2, C]."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    image, w, first = _place(program, MAPS, H, W, WIDE)
    bias = tl.load(BIAS + cols, mask=good, other=0.0).to(tl.float32)
    k0, k1, k2 = _weights(WEIGHT, cols, 0, C)
    k3, k4, k5 = _weights(WEIGHT, cols, 1, C)
    k6, k7, k8 = _weights(WEIGHT, cols, 2, C)
    a0 = tl.zeros([MAPS * WIDE, BLOCK_C], tl.float32)
    a1, a2, s1, s2 = a0, a0, a0, a0
    b0, b1, b2 = _line(M, image, images, first, 0, w, cols, C, H, W)
    for h in tl.range(0, H):
        c0, c1, c2 = _line(M, image, images, first, h + 1, w, cols, C, H, W)
        d = a0 * k0 + a1 * k1 + a2 * k2 + b0 * k3 + b1 * k4 + b2 * k5 + c0 * k6 + c1 * k7 + c2 * k8
        mask = _there(image, images, h, w, H, W)[:, None] & good[None, :]
        z = (d + bias[None, :]).to(Z.dtype.element_ty)
        tl.store(Z + (first + h * W)[:, None].to(tl.int64) * C + cols[None, :], z, mask=mask)
        d = tl.where(mask, z.to(tl.float32) - bias[None, :], 0.0)
        s1 += d
        s2 += d * d
        a0, a1, a2, b0, b1, b2 = b0, b1, b2, c0, c1, c2
    count = (tl.minimum(images - program * MAPS, MAPS) * (H * W)).to(tl.float32)
    mean = tl.sum(s1, 0) / count
    out = PARTIAL + program.to(tl.int64) * 2 * C + cols
    tl.store(out, bias + mean, mask=good)
    tl.store(out + C, tl.sum(s2, 0) - mean * mean * count, mask=good)


@triton.jit
def _dz(Z, DY, rows, there, cols, mean, from_dy, from_z, constant, C: tl.constexpr):
    z = _load(Z, rows, there, cols, C) - mean[None, :]
    dz = _load(DY, rows, there, cols, C) * from_dy[None, :] + z * from_z[None, :] + constant[None, :]
    return tl.where(there[:, None], dz, 0.0)


@triton.jit
def _dz_line(
    Z, DY, image, images, first, h, w, cols, mean, from_dy, from_z, constant,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Line h of dz, one position to the left, as it is, and one to the right; zero outside."""
    rows = first + h * W
    left = _dz(Z, DY, rows - 1, _there(image, images, h, w - 1, H, W), cols, mean, from_dy, from_z, constant, C)
    here = _dz(Z, DY, rows, _there(image, images, h, w, H, W), cols, mean, from_dy, from_z, constant, C)
    right = _dz(Z, DY, rows + 1, _there(image, images, h, w + 1, H, W), cols, mean, from_dy, from_z, constant, C)
    return left, here, right


@triton.jit
def lc_backward(
    M, WEIGHT, Z, NORM_W, NORM_B, MEAN, VAR, DY, SUMS, DM, PARTIAL, eps, images,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    MAPS: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes dm of MAPS maps and their part of dw, PARTIAL [programs, 9, C].  SUMS [2, C]: BN's own gradients."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    good = cols < C
    image, w, first = _place(program, MAPS, H, W, WIDE)
    mean, r, scale, _ = column_of(NORM_W, NORM_B, MEAN, VAR, cols, eps, C)
    total = images * (H * W)
    # dz = scale (dy - db / T - (z - mean) r dw / T)
    from_z = -scale * r * tl.load(SUMS + cols, mask=good, other=0.0) / total
    constant = -scale * tl.load(SUMS + C + cols, mask=good, other=0.0) / total
    k0, k1, k2 = _weights(WEIGHT, cols, 0, C)
    k3, k4, k5 = _weights(WEIGHT, cols, 1, C)
    k6, k7, k8 = _weights(WEIGHT, cols, 2, C)
    a0 = tl.zeros([MAPS * WIDE, BLOCK_C], tl.float32)
    a1, a2 = a0, a0
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = a0, a0, a0, a0, a0, a0, a0, a0, a0
    b0, b1, b2 = _dz_line(Z, DY, image, images, first, 0, w, cols, mean, scale, from_z, constant, C, H, W)
    for h in tl.range(0, H):
        c0, c1, c2 = _dz_line(Z, DY, image, images, first, h + 1, w, cols, mean, scale, from_z, constant, C, H, W)
        here, rows = _there(image, images, h, w, H, W), first + h * W
        dm = c2 * k0 + c1 * k1 + c0 * k2 + b2 * k3 + b1 * k4 + b0 * k5 + a2 * k6 + a1 * k7 + a0 * k8
        mask = here[:, None] & good[None, :]
        tl.store(DM + rows[:, None].to(tl.int64) * C + cols[None, :], dm.to(DM.dtype.element_ty), mask=mask)
        m = _load(M, rows, here, cols, C)
        w0 += m * c2
        w1 += m * c1
        w2 += m * c0
        w3 += m * b2
        w4 += m * b1
        w5 += m * b0
        w6 += m * a2
        w7 += m * a1
        w8 += m * a0
        a0, a1, a2, b0, b1, b2 = b0, b1, b2, c0, c1, c2
    out = PARTIAL + program.to(tl.int64) * 9 * C + cols
    tl.store(out, tl.sum(w0, 0), mask=good)
    tl.store(out + C, tl.sum(w1, 0), mask=good)
    tl.store(out + 2 * C, tl.sum(w2, 0), mask=good)
    tl.store(out + 3 * C, tl.sum(w3, 0), mask=good)
    tl.store(out + 4 * C, tl.sum(w4, 0), mask=good)
    tl.store(out + 5 * C, tl.sum(w5, 0), mask=good)
    tl.store(out + 6 * C, tl.sum(w6, 0), mask=good)
    tl.store(out + 7 * C, tl.sum(w7, 0), mask=good)
    tl.store(out + 8 * C, tl.sum(w8, 0), mask=good)


# ------------------------------------------------------------------------------------------------ launchers


def _shape(kernel: str, m: Tensor, size: tuple[int, int]) -> tuple[dict[str, int], dict[str, int], tuple[int, int]]:
    """Launch options, constants and grid for maps of ``size`` (H, W): BLOCK_T positions are a line of MAPS maps."""
    options, constants = tiles(kernel, m)
    wide = triton.next_power_of_2(size[1])
    maps = max(constants.pop("BLOCK_T") // wide, 1)
    constants = {"C": m.shape[1], "H": size[0], "W": size[1], "MAPS": maps, "WIDE": wide, **constants}
    grid = (triton.cdiv(len(m) // (size[0] * size[1]), maps), triton.cdiv(m.shape[1], constants["BLOCK_C"]))
    return options, constants, grid


def forward(
    m: Tensor, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    size: tuple[int, int], z: Tensor, y: Tensor, mean: Tensor, var: Tensor,
) -> list[Launch]:  # fmt: skip
    """Launches that fill z, y [T, C], mean and var [C] float32 from m and x [T, C]; weight [9, C], size (H, W)."""
    options, constants, grid = _shape("lc_forward", m, size)
    partial = m.new_empty(grid[0], 2, m.shape[1], dtype=mean.dtype)
    each = constants["MAPS"] * size[0] * size[1]
    args = (m, weight, bias, z, partial, len(m) // (size[0] * size[1]))
    first = Launch(lc_forward, grid, args, constants, options)
    last = batch_norm_kernel.apply(z, norm_weight, norm_bias, mean, var, eps, size, x, y)
    return [first, batch_norm_kernel.merge(partial, each, len(m), mean, var), last]


def backward_stats(
    dy: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Launch, Tensor]:
    """Launch that fills partial sums, and these sums [splits, 2, C]; their sum over splits is BN's own gradients."""
    return batch_norm_kernel.backward_stats(dy, z, norm_weight, norm_bias, mean, var, eps, (2, 2), relu=False)


def backward(
    dy: Tensor, m: Tensor, weight: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, var: Tensor,
    eps: float, size: tuple[int, int], sums: Tensor, dm: Tensor,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """Launch that fills dm [T, C] and the partial sums of dw, and these sums [programs, 9, C]; ``sums``: [2, C]."""
    options, constants, grid = _shape("lc_backward", m, size)
    partial = m.new_empty(grid[0], 9, m.shape[1], dtype=mean.dtype)
    images = len(m) // (size[0] * size[1])
    args = (m, weight, z, norm_weight, norm_bias, mean, var, dy, sums, dm, partial, float(eps), images)
    return Launch(lc_backward, grid, args, constants, options), partial
