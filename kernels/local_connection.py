"""The local connection in training as a torch operator: checks, schema, autograd (Eq. 23)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtn_fast.kernels import batch_norm, reference
from dtn_fast.kernels.dispatch import (
    LIBRARY,
    autocast,
    fake,
    implement,
    map_like,
    requested,
    traced_as_torch,
    use_triton,
)

LIBRARY.define(
    "lc_forward(Tensor m, Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor var)"
)
LIBRARY.define(
    "lc_backward(Tensor grad, Tensor m, Tensor weight, Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor mean,"
    " Tensor var, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)


def unsupported(m: Tensor) -> str | None:
    """Reason why these kernels cannot take m [B, C, H, W], or None if they can."""
    return batch_norm.unsupported(m, pool=False)


def _lc_triton(path: str, m: Tensor) -> bool:
    return use_triton(path, "local_connection", m, unsupported(m), products=False)


@implement("lc_forward")
def _lc_forward(m, x, weight, bias, norm_weight, norm_bias, eps):
    from dtn_fast.kernels import local_connection_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    y, z = map_like(x), map_like(m)
    mean, var = (m.new_empty(m.shape[1], dtype=torch.float32) for _ in range(2))
    maps = [rows_of(t) for t in (m, x, z, y)]
    column = (_window_first(weight), bias, norm_weight, norm_bias)
    for launch in kernels.forward(*maps[:2], *column, eps, tuple(m.shape[2:]), *maps[2:], mean, var):
        launch.run()
    return y, z, mean, var


@implement("lc_backward")
def _lc_backward(grad, m, weight, z, norm_weight, norm_bias, mean, var, eps):
    from dtn_fast.kernels import local_connection_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    dm, dy, rows = map_like(m), rows_of(grad), rows_of(z)
    norm = (norm_weight, norm_bias, mean, var, eps)
    launch, partial = kernels.backward_stats(dy, rows, *norm)
    launch.run()
    sums = partial.sum(0)
    inputs = (dy, rows_of(m), _window_first(weight), rows)
    launch, partial = kernels.backward(*inputs, *norm, tuple(m.shape[2:]), sums, rows_of(dm))
    launch.run()
    dw = partial.sum(0).t().contiguous().view(weight.shape).to(weight.dtype)
    return dm, dw, sums[0].to(norm_weight.dtype), sums[1].to(norm_bias.dtype, copy=True)


def _window_first(weight: Tensor) -> Tensor:
    """Weight [C, 1, 3, 3] as [9, C], so that neighbouring channels load at once."""
    return weight.reshape(-1, 9).t().contiguous()


@fake("lc_forward")
def _(m, x, weight, bias, norm_weight, norm_bias, eps):
    column = m.new_empty(m.shape[1], dtype=torch.float32)
    return map_like(x), map_like(m), column, torch.empty_like(column)


@fake("lc_backward")
def _(grad, m, weight, z, norm_weight, norm_bias, mean, var, eps):
    return map_like(m), *(t.new_empty(t.shape) for t in (weight, norm_weight, norm_bias))


class _LocalConnection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, x, weight, bias, norm_weight, norm_bias, eps):
        y, z, mean, var = torch.ops.dtn_fast.lc_forward(m, x, weight, bias, norm_weight, norm_bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(m, weight, z, norm_weight, norm_bias, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _var):
        dm, dw, *norm = torch.ops.dtn_fast.lc_backward(grad, *ctx.saved_tensors, ctx.eps)
        return dm, grad, dw, torch.zeros_like(norm[1]), *norm, None  # BN cancels the bias: its gradient is zero


def local_connection(
    m: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    *,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + BN(depthwise 3x3 convolution of m) in training (Eq. 23), zero-padded.

    m, x: [B, C, H, W] of one dtype, preferably channels_last.  weight: [C, 1, 3, 3]; bias, norm_weight, norm_bias: [C].
    Returns y like x, and the convolution's mean and biased variance [C] float32, which carry no gradient.  Raises
    ValueError naming the argument on a wrong shape or dtype.
    """
    path = requested(path)
    m, x = autocast(m, x)
    if m.dim() != 4 or not m.is_floating_point() or m.shape != x.shape or m.dtype != x.dtype:
        raise ValueError(
            f"m, x: got {tuple(m.shape)} {m.dtype}, {tuple(x.shape)} {x.dtype}; "
            "they must be floating-point [B, C, H, W] of one shape and dtype"
        )
    channels = m.shape[1]
    named = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor, shape in (
        ("weight", weight, (channels, 1, 3, 3)),
        *((n, t, (channels,)) for n, t in named.items()),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; it must be {list(shape)}")
    if traced_as_torch() or not _lc_triton(path, m):
        return reference.local_connection(m, x, weight.to(m.dtype), bias.to(m.dtype), norm_weight, norm_bias, eps)
    return _LocalConnection.apply(m, x, *(t.contiguous() for t in (weight, bias, norm_weight, norm_bias)), float(eps))


def fuses_local_connection(m: Tensor) -> bool:
    """Whether :func:`local_connection` moves fewer bytes than torch's operators on ``m``: true if its kernels run."""
    return not traced_as_torch() and _lc_triton(requested(None), m)
