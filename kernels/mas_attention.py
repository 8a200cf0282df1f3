"""MAS attention as a torch operator: checks, schema, autograd (Eq. 17-21)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtn_fast.device import tf32_allowed
from dtn_fast.kernels import onnx_nodes, reference
from dtn_fast.kernels.dispatch import (
    DTYPES,
    LIBRARY,
    autocast,
    fake,
    implement,
    requested,
    traced_as_nodes,
    traced_as_torch,
    use_triton,
)
from dtn_fast.kernels.launch_values import SMALL

LIBRARY.define("mas_forward(Tensor q, Tensor k, Tensor v, Tensor head_scale, str path) -> (Tensor out, Tensor log_sum)")
LIBRARY.define(
    "mas_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor head_scale, Tensor out, Tensor log_sum, str path)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("mas_packed_forward(Tensor qkv, Tensor head_scale, str path) -> (Tensor out, Tensor log_sum)")
LIBRARY.define(
    "mas_packed_backward(Tensor grad, Tensor qkv, Tensor head_scale, Tensor out, Tensor log_sum, str path)"
    " -> (Tensor, Tensor)"
)

HEAD_DIMS = (32, 64, 128)


def unsupported_head_dim(dim: int) -> str | None:
    """Reason why the kernels cannot take heads of ``dim`` channels, or None if they can."""
    return None if dim in HEAD_DIMS else f"head dimension {dim} (kernels take {', '.join(map(str, HEAD_DIMS))})"


def unsupported(q: Tensor) -> str | None:
    """Reason why these kernels cannot take inputs like ``q`` [B, N, H, D], or None if they can."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}"
    return unsupported_head_dim(q.shape[3])


def _log_sum(q: Tensor) -> Tensor:
    """Uninitialised log-sums that the backward needs: empty up to N = SMALL, else float32 [B, H, N], one per query."""
    batch, count, heads, _ = q.shape
    return q.new_empty((0,) if count <= SMALL else (batch, heads, count), dtype=torch.float32)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@implement("mas_forward")
def _mas_forward(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, path: str) -> tuple[Tensor, Tensor]:
    if not _mas_triton(path, q):
        out, log_sum = reference.mas_attention_forward(q, k, v, head_scale)
        return out, log_sum if q.shape[1] > SMALL else _log_sum(q)
    from dtn_fast.kernels import mas_attention_kernel as kernels

    out, log_sum = q.new_empty(q.shape), _log_sum(q)
    for launch in kernels.forward(q, k, v, head_scale, out, log_sum):
        launch.run()
    return out, log_sum


@implement("mas_backward")
def _mas_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, out: Tensor, log_sum: Tensor, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _mas_triton(path, q):
        return reference.mas_attention_backward(grad, q, k, v, head_scale)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv, _mas_launch_backward(grad, (q, k, v), head_scale, out, log_sum, (dq, dk, dv))


@implement("mas_packed_forward")
def _mas_packed_forward(qkv: Tensor, head_scale: Tensor, path: str) -> tuple[Tensor, Tensor]:
    return _mas_forward(*qkv.unbind(2), head_scale, path)


@implement("mas_packed_backward")
def _mas_packed_backward(
    grad: Tensor, qkv: Tensor, head_scale: Tensor, out: Tensor, log_sum: Tensor, path: str
) -> tuple[Tensor, Tensor]:
    parts = qkv.unbind(2)
    if not _mas_triton(path, parts[0]):
        *grads, dscale = reference.mas_attention_backward(grad, *parts, head_scale)
        return torch.stack(grads, 2), dscale
    packed = qkv.new_empty(qkv.shape)  # one packed gradient; dq, dk and dv are written into it
    return packed, _mas_launch_backward(grad, parts, head_scale, out, log_sum, packed.unbind(2))


def _mas_triton(path: str, q: Tensor) -> bool:
    return use_triton(path, "mas_attention", q, unsupported(q))


def _mas_launch_backward(grad, parts, head_scale, out, log_sum, grads) -> Tensor:
    from dtn_fast.kernels import mas_attention_kernel as kernels

    partial = kernels.partial_like(parts[0])
    for launch in kernels.backward(_contiguous(grad), *parts, head_scale, out, log_sum, *grads, partial):
        launch.run()
    return kernels.finish(partial, head_scale)


@fake("mas_forward")
def _(q, k, v, head_scale, path):
    return q.new_empty(q.shape), _log_sum(q)


@fake("mas_backward")
def _(grad, q, k, v, head_scale, out, log_sum, path):
    return *(t.new_empty(t.shape) for t in (q, k, v)), torch.empty_like(head_scale)


@fake("mas_packed_forward")
def _(qkv, head_scale, path):
    q = qkv.select(2, 0)
    return q.new_empty(q.shape), _log_sum(q)


@fake("mas_packed_backward")
def _(grad, qkv, head_scale, out, log_sum, path):
    return qkv.new_empty(qkv.shape), torch.empty_like(head_scale)


class _MAS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, head_scale, path):
        out, log_sum = torch.ops.dtn_fast.mas_forward(q, k, v, head_scale, path)
        ctx.path = path
        ctx.save_for_backward(q, k, v, head_scale, out if q.shape[1] > SMALL else log_sum, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *torch.ops.dtn_fast.mas_backward(grad, *ctx.saved_tensors, ctx.path), None


class _MASPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, head_scale, path):
        out, log_sum = torch.ops.dtn_fast.mas_packed_forward(qkv, head_scale, path)
        ctx.path = path
        ctx.save_for_backward(qkv, head_scale, out if qkv.shape[1] > SMALL else log_sum, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *torch.ops.dtn_fast.mas_packed_backward(grad, *ctx.saved_tensors, ctx.path), None


def mas_attention(
    q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, *, path: str | None = None, return_maps: bool = False
):
    """Multi-attention scaling (Eq. 17-21): O_h = sigmoid(s_h) * softmax(Q_h K_h^T / sqrt(D)) V_h.

    q, k, v: [B, N, H, D], fp16, bf16, fp32 (or fp64, by the reference), any strides with a contiguous last dimension.
    head_scale: [H], before the sigmoid.  Returns [B, N, H, D]; with ``return_maps`` also the gated attention maps
    [B, H, N, N], through the reference.  Gradients for all four tensors, deterministic; autocast casts q, k and v.
    Raises ValueError naming the argument on unequal shapes, dtypes or devices and on other ranks or dtypes.
    """
    path = requested(path)
    q, k, v = autocast(q, k, v)
    _check_qkv(q, head_scale, "q")
    for name, tensor in (("k", k), ("v", v)):
        for what in ("shape", "dtype", "device"):
            if getattr(tensor, what) != getattr(q, what):
                raise ValueError(
                    f"{name}: {what} is {_show(getattr(tensor, what))}, q's is {_show(getattr(q, what))}; "
                    "q, k and v must have one shape, dtype and device"
                )
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides are {tensor.stride()}; the last dimension must be contiguous")
    if return_maps or traced_as_torch():
        return reference.mas_attention(q, k, v, head_scale, return_maps=return_maps)
    if path == "auto" and _strict_float32(q):
        return _sdpa(q, k, v, head_scale)
    return _MAS.apply(q, k, v, head_scale, path)


def mas_attention_packed(qkv: Tensor, head_scale: Tensor, *, path: str | None = None) -> Tensor:
    """Runs :func:`mas_attention` on a packed qkv [B, N, 3, H, D], read in place; the gradient is one packed tensor."""
    path = requested(path)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: shape is {tuple(qkv.shape)}; it must be [B, N, 3, H, D]")
    (qkv,) = autocast(qkv)
    _check_qkv(qkv.select(2, 0), head_scale, "qkv")
    if traced_as_nodes():
        return onnx_nodes.mas_attention(qkv, head_scale)
    if traced_as_torch():
        return reference.mas_attention(*qkv.unbind(2), head_scale)
    if path == "auto" and _strict_float32(qkv):
        return _sdpa(*qkv.unbind(2), head_scale)
    return _MASPacked.apply(qkv, head_scale, path)


def _check_qkv(q: Tensor, head_scale: Tensor, name: str) -> None:
    if q.dim() != 4:
        raise ValueError(f"{name}: shape is {tuple(q.shape)}; it must be [B, N, H, D]")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name}: dtype is {q.dtype}; allowed are float16, bfloat16, float32 and float64")
    if min(q.shape) < 1:
        raise ValueError(f"{name}: shape is {tuple(q.shape)}; no dimension may be empty")
    if q.stride(-1) != 1:
        raise ValueError(f"{name}: strides are {q.stride()}; the last dimension must be contiguous")
    if head_scale.shape != (q.shape[2],):
        raise ValueError(f"head_scale: shape is {tuple(head_scale.shape)}; it must be [{q.shape[2]}], one per head")
    if head_scale.device != q.device:
        raise ValueError(f"head_scale: on {head_scale.device}, {name} on {q.device}; they must be on one device")
    if not head_scale.is_floating_point():
        raise ValueError(f"head_scale: dtype is {head_scale.dtype}; it must be a floating-point dtype")


def _show(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _strict_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cuda" and not tf32_allowed()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention times the gate, for float32 on a GPU without TF32."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return out * head_scale.sigmoid()[:, None]
