"""The one face of the operators: torch.library registration, autograd, autocast, and the choice of path.

Paths: ``triton`` (the kernels; on a CPU under TRITON_INTERPRET=1 their interpreter) and ``reference`` (plain torch).
``auto`` takes triton on CUDA devices of compute capability 8.0 and up where the kernels support the inputs, else the
reference, and says so once on a GPU.  Float32 on a GPU goes to the kernels when torch allows TF32, else attention is
torch's scaled_dot_product_attention times the gate.  The argument ``path`` or the environment variable
DTN_FAST_KERNELS force one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import onnx_nodes, reference

PATHS = ("auto", "triton", "reference")
VARIABLE = "DTN_FAST_KERNELS"
SMALL = 128  # up to this N the attention's backward needs nothing of its forward


# ------------------------------------------------------------------------------------------------ the choice of path

_plain = _nodes = False


@contextlib.contextmanager
def tracing(nodes: bool) -> Iterator[None]:
    """Within it the operators are traced for an exporter: as the reference's own torch calls, or, with ``nodes``, as
    the ONNX nodes of ``onnx_nodes`` (3x3 experts have none)."""
    global _plain, _nodes
    before = _plain, _nodes
    _plain, _nodes = True, nodes
    try:
        yield
    finally:
        _plain, _nodes = before


def _requested(path: str | None) -> str:
    path = path or os.environ.get(VARIABLE) or "auto"
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}; allowed are {', '.join(PATHS)} (argument or {VARIABLE})")
    return path


def _use_triton(path: str, operator: str, x: Tensor, refusal: str | None, products: bool = True) -> bool:
    """Whether ``operator``, of matrix products or none, runs its Triton kernels on ``x``; ``refusal`` says why they
    cannot take the shapes."""
    if path == "reference":
        return False
    if x.device.type == "cpu":
        why = None if _interpreting() else "a CPU tensor without TRITON_INTERPRET=1"
    elif x.device.type != "cuda" or torch.version.hip:
        why = f"device {x.device.type}"
    elif torch.cuda.get_device_capability(x.device) < (8, 0):
        why = "a GPU of compute capability under 8.0"
    elif (
        products and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" and path == "auto"
    ):
        why = "float32 without TF32 (torch.backends.cuda.matmul.fp32_precision)"
    else:
        why = None
    why = why or refusal
    if path == "triton" and why:
        raise ValueError(f"{operator}: path 'triton' was forced, but the kernels do not take {why}")
    if why and x.device.type != "cpu":
        _notice(operator, why)
    return why is None


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from .launch import INTERPRET

    return INTERPRET


@functools.cache
def _notice(operator: str, why: str) -> None:
    warnings.warn(f"{operator}: the Triton kernels do not take {why}; using the torch reference", stacklevel=3)


def _autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in autocast's dtype where it is on."""
    if _autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        others = tuple(t.to(x.dtype) for t in others)
    return x, *others


def _autocasting(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


# ------------------------------------------------------------------------------------------------ registration

_library = torch.library.Library("dtn_fast", "DEF")
_library.define(
    "mas_forward(Tensor q, Tensor k, Tensor v, Tensor head_scale, str path) -> (Tensor out, Tensor log_sum)"
)
_library.define(
    "mas_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor head_scale, Tensor out, Tensor log_sum, str path)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define("mas_packed_forward(Tensor qkv, Tensor head_scale, str path) -> (Tensor out, Tensor log_sum)")
_library.define(
    "mas_packed_backward(Tensor grad, Tensor qkv, Tensor head_scale, Tensor out, Tensor log_sum, str path)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "moe_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor expert_scale, Tensor? seed,"
    " float noise_std, str path) -> (Tensor out, Tensor attention, Tensor winner)"
)
_library.define(
    "bn_forward(Tensor x, Tensor weight, Tensor bias, float eps, bool pool) -> (Tensor y, Tensor mean, Tensor var)"
)
_library.define(
    "lc_forward(Tensor m, Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps)"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor var)"
)
_library.define(
    "lc_backward(Tensor grad, Tensor m, Tensor weight, Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor mean,"
    " Tensor var, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "bn_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, bool pool)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "moe_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor expert_scale, Tensor? seed,"
    " float noise_std, Tensor attention, Tensor winner, str path) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_KEY = "CompositeExplicitAutograd"  # one implementation for every device; it looks where its tensors are


def _implement(name: str):
    def register(function):
        _library.impl(name, function, _KEY)
        return function

    return register


def _fake(name: str):
    return torch.library.register_fake(f"dtn_fast::{name}", lib=_library)


# ------------------------------------------------------------------------------------------------ MAS attention


def _log_sum(q: Tensor) -> Tensor:
    """What the forward keeps for the backward: nothing up to SMALL, else a float32 value per query [B, H, N]."""
    batch, count, heads, _ = q.shape
    return q.new_empty((0,) if count <= SMALL else (batch, heads, count), dtype=torch.float32)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@_implement("mas_forward")
def _mas_forward(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, path: str) -> tuple[Tensor, Tensor]:
    if not _mas_triton(path, q):
        out, log_sum = reference.mas_attention_forward(q, k, v, head_scale)
        return out, log_sum if q.shape[1] > SMALL else _log_sum(q)
    from . import mas_attention as kernels

    out, log_sum = q.new_empty(q.shape), _log_sum(q)
    for launch in kernels.forward(q, k, v, head_scale, out, log_sum):
        launch.run()
    return out, log_sum


@_implement("mas_backward")
def _mas_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor, out: Tensor, log_sum: Tensor, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _mas_triton(path, q):
        return reference.mas_attention_backward(grad, q, k, v, head_scale)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv, _mas_launch_backward(grad, (q, k, v), head_scale, out, log_sum, (dq, dk, dv))


@_implement("mas_packed_forward")
def _mas_packed_forward(qkv: Tensor, head_scale: Tensor, path: str) -> tuple[Tensor, Tensor]:
    return _mas_forward(*qkv.unbind(2), head_scale, path)


@_implement("mas_packed_backward")
def _mas_packed_backward(
    grad: Tensor, qkv: Tensor, head_scale: Tensor, out: Tensor, log_sum: Tensor, path: str
) -> tuple[Tensor, Tensor]:
    parts = qkv.unbind(2)
    if not _mas_triton(path, parts[0]):
        *grads, dscale = reference.mas_attention_backward(grad, *parts, head_scale)
        return torch.stack(grads, 2), dscale
    packed = qkv.new_empty(qkv.shape)  # one gradient, each third written in place
    return packed, _mas_launch_backward(grad, parts, head_scale, out, log_sum, packed.unbind(2))


def _mas_triton(path: str, q: Tensor) -> bool:
    if path == "reference" or (path == "auto" and q.device.type == "cpu" and not _interpreting()):
        return False
    from . import mas_attention as kernels

    return _use_triton(path, "mas_attention", q, kernels.unsupported(q))


def _mas_launch_backward(grad, parts, head_scale, out, log_sum, grads) -> Tensor:
    from . import mas_attention as kernels

    partial = kernels.partial_like(parts[0])
    for launch in kernels.backward(_contiguous(grad), *parts, head_scale, out, log_sum, *grads, partial):
        launch.run()
    return kernels.finish(partial, head_scale)


@_fake("mas_forward")
def _(q, k, v, head_scale, path):
    return q.new_empty(q.shape), _log_sum(q)


@_fake("mas_backward")
def _(grad, q, k, v, head_scale, out, log_sum, path):
    return *(t.new_empty(t.shape) for t in (q, k, v)), torch.empty_like(head_scale)


@_fake("mas_packed_forward")
def _(qkv, head_scale, path):
    q = qkv.select(2, 0)
    return q.new_empty(q.shape), _log_sum(q)


@_fake("mas_packed_backward")
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
    [B, H, N, N], through the reference.  Gradients for all four, deterministic; autocast casts q, k and v.
    Raises ValueError naming the argument on unequal shapes, dtypes or devices and on other ranks or dtypes.
    """
    path = _requested(path)
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, head_scale, "q")
    for name, tensor in (("k", k), ("v", v)):
        for what in ("shape", "dtype", "device"):
            if getattr(tensor, what) != getattr(q, what):
                raise ValueError(
                    f"{name}: {what} is {_show(getattr(tensor, what))}, q's is {_show(getattr(q, what))}; "
                    "q, k and v must be alike"
                )
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: strides are {tensor.stride()}; the last dimension must be contiguous")
    if return_maps or _plain:
        return reference.mas_attention(q, k, v, head_scale, return_maps=return_maps)
    if path == "auto" and _strict_float32(q):
        return _sdpa(q, k, v, head_scale)
    return _MAS.apply(q, k, v, head_scale, path)


def mas_attention_packed(qkv: Tensor, head_scale: Tensor, *, path: str | None = None) -> Tensor:
    """:func:`mas_attention` of a packed [B, N, 3, H, D], read in place; its gradient is written as one tensor."""
    path = _requested(path)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: shape is {tuple(qkv.shape)}; it must be [B, N, 3, H, D]")
    (qkv,) = _autocast(qkv)
    _check_qkv(qkv.select(2, 0), head_scale, "qkv")
    if _nodes:
        return onnx_nodes.mas_attention(qkv, head_scale)
    if _plain:
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
        raise ValueError(f"head_scale: dtype is {head_scale.dtype}; it must be a floating dtype")


def _show(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _strict_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cuda" and not _tf32()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor) -> Tensor:
    """Strict float32 on a GPU: torch's attention times the gate."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return out * head_scale.sigmoid()[:, None]


# ------------------------------------------------------------------------------------------------ MoE gate


def _moe_triton(path: str, x: Tensor, w1: Tensor) -> bool:
    if path == "reference" or (path == "auto" and x.device.type == "cpu" and not _interpreting()):
        return False
    from . import moe_gate as kernels

    return _use_triton(path, "moe_gate", x, kernels.unsupported(x, w1))


def _map_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@_implement("moe_forward")
def _moe_forward(x, w1, b1, w2, b2, expert_scale, seed, noise_std, path):
    batch, _, height, width = x.shape
    if not _moe_triton(path, x, w1):
        out, attention, winner = reference.moe_gate_forward(x, w1, b1, w2, b2, expert_scale, noise_std, seed)
        return out.contiguous(memory_format=torch.channels_last), attention.to(torch.float32), winner
    from . import moe_gate as kernels

    out = _map_like(x)
    attention = x.new_empty((batch, height, width), dtype=torch.float32)
    winner = x.new_empty((batch, height, width), dtype=torch.int8)
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if seed is None else seed
    weights = (w1.to(x.dtype).contiguous(), *(t.contiguous() for t in (b1, w2, b2, expert_scale)))
    rows = kernels.rows_of(x)
    for launch in kernels.forward(rows, *weights, seed, noise_std, kernels.rows_of(out), attention, winner):
        launch.run()
    return out, attention, winner


@_implement("moe_backward")
def _moe_backward(grad, x, w1, b1, w2, b2, expert_scale, seed, noise_std, attention, winner, path):
    if not _moe_triton(path, x, w1):
        grads = reference.moe_gate_backward(grad, x, w1, b1, w2, b2, expert_scale, noise_std, seed, winner)
        return grads[0].contiguous(memory_format=torch.channels_last), *grads[1:]
    from . import moe_gate as kernels

    dx = _map_like(x)
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if seed is None else seed
    weights = (w1.to(x.dtype).contiguous(), *(t.contiguous() for t in (b1, w2, b2, expert_scale)))
    rows = (kernels.rows_of(grad), kernels.rows_of(x))
    launches, partial, dw1 = kernels.backward(*rows, *weights, seed, noise_std, attention, winner, kernels.rows_of(dx))
    for launch in launches:
        launch.run()
    small = (w1, b1, w2, b2, expert_scale)
    return dx, *(g.to(p.dtype).contiguous() for g, p in zip(kernels.finish(partial, dw1), small, strict=True))


@_fake("moe_forward")
def _(x, w1, b1, w2, b2, expert_scale, seed, noise_std, path):
    shape = (x.shape[0], x.shape[2], x.shape[3])
    return _map_like(x), x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int8)


@_fake("moe_backward")
def _(grad, x, w1, b1, w2, b2, expert_scale, seed, noise_std, attention, winner, path):
    return _map_like(x), *(t.new_empty(t.shape) for t in (w1, b1, w2, b2, expert_scale))


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, expert_scale, seed, noise_std, path):
        out, attention, winner = torch.ops.dtn_fast.moe_forward(x, w1, b1, w2, b2, expert_scale, seed, noise_std, path)
        ctx.noise_std, ctx.path, ctx.has_seed = noise_std, path, seed is not None
        kept = () if seed is None else (seed,)
        ctx.save_for_backward(x, w1, b1, w2, b2, expert_scale, attention, winner, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, attention, winner = ctx.saved_tensors[:8]
        seed = ctx.saved_tensors[8] if ctx.has_seed else None
        grads = torch.ops.dtn_fast.moe_backward(grad, *inputs, seed, ctx.noise_std, attention, winner, ctx.path)
        return *grads, None, None, None


def moe_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    expert_scale: Tensor,
    noise_std: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    path: str | None = None,
) -> Tensor:
    """Noisy expert gate (Eq. 10-12): F' = F * sigmoid(max_e sigmoid(s_e) * E_e(F + n_e)).

    x: [B, C, H, W], best channels_last (another layout is copied).  w1: [E, M, C], b1 and w2: [E, M], b2 and
    expert_scale: [E]; 3x3 experts (w1 [E, M, C, 3, 3], w2 [E, M, 3, 3]) take the reference.  noise_std: standard
    deviation of the Gaussian noise, 0 for none.  seed: int or int64 scalar tensor that fixes the noise on every device;
    None draws one from torch's default generator.  Returns [B, C, H, W], channels_last.  Gradients for x, both weight
    pairs and the scales, deterministic; autocast casts x and the weights.  Raises ValueError naming the argument.
    """
    path = _requested(path)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}; it must be a floating [B, C, H, W]")
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    experts, hidden = w1.shape[:2] if w1.dim() in (3, 5) else (0, 0)
    window = tuple(w1.shape[3:])
    if not experts or w1.shape[2] != x.shape[1] or window not in ((), (1, 1), (3, 3)):
        raise ValueError(f"w1: shape is {tuple(w1.shape)}; it must be [E, M, {x.shape[1]}] or that and (3, 3)")
    if x.shape[1] % 16 or hidden % 16:
        name, value = ("x", x.shape[1]) if x.shape[1] % 16 else ("w1", hidden)
        raise ValueError(f"{name}: {value} {'channels' if name == 'x' else 'hidden units'}; a multiple of 16 is needed")
    wanted = {"b1": (b1, (experts, hidden)), "w2": (w2, (experts, hidden, *window)), "b2": (b2, (experts,))}
    for name, (tensor, shape) in {**wanted, "expert_scale": (expert_scale, (experts,))}.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; it must be {list(shape)}")
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2), ("expert_scale", expert_scale)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, x on {x.device}; they must be on one device")
    if noise_std < 0:
        raise ValueError(f"noise_std: got {noise_std}; it must be >= 0")
    if noise_std == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    elif isinstance(seed, int):
        seed = torch.tensor(seed, device=x.device)
    if _nodes and w1.dim() == 3 and not noise_std:
        return onnx_nodes.moe_gate(x, w1, b1, w2, b2, expert_scale)
    if _plain:
        return reference.moe_gate(x, w1, b1, w2, b2, expert_scale, float(noise_std), seed)
    return _MoE.apply(x, w1, b1, w2, b2, expert_scale, seed, float(noise_std), path)


# ------------------------------------------------------------------------------------------------ BN, ReLU, pool


def _bn_triton(path: str, x: Tensor, pool: bool) -> bool:
    if path == "reference" or (path == "auto" and x.device.type == "cpu" and not _interpreting()):
        return False
    from . import batch_norm as kernels

    return _use_triton(path, "bn_relu", x, kernels.unsupported(x, pool), products=False)


@_implement("bn_forward")
def _bn_forward(x, weight, bias, eps, pool):
    from . import batch_norm as kernels

    y, mean, var = _bn_outputs(x, pool)
    rows = kernels.rows_of(x), kernels.rows_of(y)
    for launch in kernels.forward(rows[0], weight, bias, eps, tuple(x.shape[2:]), rows[1], mean, var):
        launch.run()
    return y, mean, var


@_implement("bn_backward")
def _bn_backward(grad, x, weight, bias, mean, var, eps, pool):
    from . import batch_norm as kernels

    dx = _map_like(x)
    inputs = (kernels.rows_of(grad), kernels.rows_of(x), weight, bias, mean, var, eps, tuple(x.shape[2:]))
    launch, partial = kernels.backward_stats(*inputs)
    launch.run()
    sums = partial.sum(0)
    kernels.backward_apply(*inputs, sums, kernels.rows_of(dx)).run()
    return dx, sums[0].to(weight.dtype), sums[1].to(bias.dtype, copy=True)  # outputs may not share memory


def _bn_outputs(x: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    size = (batch, channels, height // 2, width // 2) if pool else x.shape
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(channels, dtype=torch.float32), x.new_empty(channels, dtype=torch.float32)


@_fake("bn_forward")
def _(x, weight, bias, eps, pool):
    return _bn_outputs(x, pool)


@_fake("bn_backward")
def _(grad, x, weight, bias, mean, var, eps, pool):
    return _map_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


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

    x: [B, C, H, W], best channels_last.  weight, bias: [C].  Returns y, [B, C, H, W] or [B, C, H / 2, W / 2], and the
    batch's mean and biased variance [C] float32, which carry no gradient.  Raises ValueError naming the argument.
    """
    path = _requested(path)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}; it must be a floating [B, C, H, W]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; it must be [{x.shape[1]}]")
    if _plain or not _bn_triton(path, x, pool):
        return reference.bn_relu(x, weight, bias, eps, pool)
    return _BnRelu.apply(x, weight.contiguous(), bias.contiguous(), float(eps), pool)


def fuses_bn(x: Tensor, pool: bool) -> bool:
    """Whether :func:`bn_relu` wins over torch's own operators on ``x``: by bytes, everywhere but where torch.compile
    fuses as much, which is all that is not pooled."""
    return (pool or not torch.compiler.is_compiling()) and not _plain and _bn_triton(_requested(None), x, pool)


# ------------------------------------------------------------------------------------------------ local connection


def _lc_triton(path: str, m: Tensor) -> bool:
    if path == "reference" or (path == "auto" and m.device.type == "cpu" and not _interpreting()):
        return False
    from . import local_connection as kernels

    return _use_triton(path, "local_connection", m, kernels.unsupported(m), products=False)


@_implement("lc_forward")
def _lc_forward(m, x, weight, bias, norm_weight, norm_bias, eps):
    from . import local_connection as kernels

    y, z = _map_like(x), _map_like(m)
    mean, var = (m.new_empty(m.shape[1], dtype=torch.float32) for _ in range(2))
    maps = [kernels.rows_of(t) for t in (m, x, z, y)]
    column = (weight.reshape(-1, 9), bias, norm_weight, norm_bias)
    for launch in kernels.forward(*maps[:2], *column, eps, tuple(m.shape[2:]), *maps[2:], mean, var):
        launch.run()
    return y, z, mean, var


@_implement("lc_backward")
def _lc_backward(grad, m, weight, z, norm_weight, norm_bias, mean, var, eps):
    from . import local_connection as kernels

    dm, dy, rows = _map_like(m), kernels.rows_of(grad), kernels.rows_of(z)
    norm = (norm_weight, norm_bias, mean, var, eps)
    launch, partial = kernels.backward_stats(dy, rows, *norm)
    launch.run()
    sums = partial.sum(0)
    inputs = (dy, kernels.rows_of(m), weight.reshape(-1, 9), rows)
    launch, partial = kernels.backward(*inputs, *norm, tuple(m.shape[2:]), sums, kernels.rows_of(dm))
    launch.run()
    dw = partial.sum(0).view(weight.shape).to(weight.dtype)
    return dm, dw, sums[0].to(norm_weight.dtype), sums[1].to(norm_bias.dtype, copy=True)


@_fake("lc_forward")
def _(m, x, weight, bias, norm_weight, norm_bias, eps):
    column = m.new_empty(m.shape[1], dtype=torch.float32)
    return _map_like(x), _map_like(m), column, torch.empty_like(column)


@_fake("lc_backward")
def _(grad, m, weight, z, norm_weight, norm_bias, mean, var, eps):
    return _map_like(m), *(t.new_empty(t.shape) for t in (weight, norm_weight, norm_bias))


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
        return dm, grad, dw, torch.zeros_like(norm[1]), *norm, None  # BN takes the bias out: no gradient


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
    """x + BN(depthwise 3x3 of m) in training (Eq. 23), zeros around the map.

    m, x: [B, C, H, W] of one dtype, best channels_last.  weight: [C, 1, 3, 3]; bias, norm_weight, norm_bias: [C].
    Returns y like x, and the convolution's mean and biased variance [C] float32, which carry no gradient.  Raises
    ValueError naming the argument.
    """
    path = _requested(path)
    m, x = _autocast(m, x)
    if m.dim() != 4 or not m.is_floating_point() or m.shape != x.shape or m.dtype != x.dtype:
        raise ValueError(f"m, x: got {tuple(m.shape)} {m.dtype}, {tuple(x.shape)} {x.dtype}; one floating [B, C, H, W]")
    channels = m.shape[1]
    named = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor, shape in (
        ("weight", weight, (channels, 1, 3, 3)),
        *((n, t, (channels,)) for n, t in named.items()),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; it must be {list(shape)}")
    if _plain or not _lc_triton(path, m):
        return reference.local_connection(m, x, weight.to(m.dtype), bias.to(m.dtype), norm_weight, norm_bias, eps)
    return _LocalConnection.apply(m, x, *(t.contiguous() for t in (weight, bias, norm_weight, norm_bias)), float(eps))


def fuses_local_connection(m: Tensor) -> bool:
    """Whether :func:`local_connection` wins over torch's own operators on ``m``: by bytes, wherever its kernels run."""
    return not _plain and _lc_triton(_requested(None), m)
