"""Batch normalisation in training, ReLU and max-pool as one torch operator: checks, schema, autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtn_fast.kernels import reference
from dtn_fast.kernels.dispatch import (
    DTYPES,
    LIBRARY,
    fake,
    implement,
    map_like,
    requested,
    traced_as_torch,
    use_triton,
)

LIBRARY.define(
    "bn_forward(Tensor x, Tensor weight, Tensor bias, float eps, bool pool) -> (Tensor y, Tensor mean, Tensor var)"
)
LIBRARY.define(
    "bn_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, bool pool)"
    " -> (Tensor, Tensor, Tensor)"
)


def unsupported(x: Tensor, pool: bool) -> str | None:
    """Reason why these kernels cannot take x [B, C, H, W], or None if they can."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if x.numel() // x.shape[1] >= 2**31:
        return f"{x.numel() // x.shape[1]} positions (must be under 2**31)"
    if pool and (x.shape[2] % 2 or x.shape[3] % 2):
        return f"a pool of {x.shape[2]}x{x.shape[3]} (height and width must be even)"
    return None


def _bn_triton(path: str, x: Tensor, pool: bool) -> bool:
    return use_triton(path, "bn_relu", x, unsupported(x, pool), products=False)


@implement("bn_forward")
def _bn_forward(x, weight, bias, eps, pool):
    from dtn_fast.kernels import batch_norm_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    y, mean, var = _bn_outputs(x, pool)
    rows = rows_of(x), rows_of(y)
    for launch in kernels.forward(rows[0], weight, bias, eps, tuple(x.shape[2:]), rows[1], mean, var):
        launch.run()
    return y, mean, var


@implement("bn_backward")
def _bn_backward(grad, x, weight, bias, mean, var, eps, pool):
    from dtn_fast.kernels import batch_norm_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    dx = map_like(x)
    inputs = (rows_of(grad), rows_of(x), weight, bias, mean, var, eps, tuple(x.shape[2:]))
    launch, partial = kernels.backward_stats(*inputs)
    launch.run()
    sums = partial.sum(0)
    kernels.backward_apply(*inputs, sums, rows_of(dx)).run()
    return dx, sums[0].to(weight.dtype), sums[1].to(bias.dtype, copy=True)  # an operator's outputs may not share memory


def _bn_outputs(x: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    size = (batch, channels, height // 2, width // 2) if pool else x.shape
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(channels, dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)


@fake("bn_forward")
def _(x, weight, bias, eps, pool):
    return _bn_outputs(x, pool)


@fake("bn_backward")
def _(grad, x, weight, bias, mean, var, eps, pool):
    return map_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, pool):
        y, mean, var = torch.ops.dtn_fast.bn_forward(x, weight, bias, eps, pool)
        ctx.eps, ctx.pool = eps, pool
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _var):
        return *torch.ops.dtn_fast.bn_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.pool), None, None


def bn_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, pool: bool = False, *, path: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in training, ReLU and, with ``pool``, a 2x2 max-pool, in one pass after the statistics.

    x: [B, C, H, W], preferably channels_last.  weight, bias: [C].  Returns y [B, C, H, W] or [B, C, H / 2, W / 2], and
    the batch's mean and biased variance [C] float32, which carry no gradient.  Raises ValueError naming the argument
    on a wrong shape or dtype.
    """
    path = requested(path)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}; it must be a floating-point [B, C, H, W]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; it must be [{x.shape[1]}]")
    if traced_as_torch() or not _bn_triton(path, x, pool):
        return reference.bn_relu(x, weight, bias, eps, pool)
    return _BnRelu.apply(x, weight.contiguous(), bias.contiguous(), float(eps), pool)


def fuses_bn(x: Tensor, pool: bool) -> bool:
    """Whether :func:`bn_relu` moves fewer bytes than torch's own operators on ``x``: true wherever its kernels run,
    except without a pool under torch.compile, which then fuses the operators as well as the kernels do."""
    return (
        (pool or not torch.compiler.is_compiling()) and not traced_as_torch() and _bn_triton(requested(None), x, pool)
    )
