"""The noisy expert gate as a torch operator: checks, schema, autograd (Eq. 10-12)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtn_fast.kernels import onnx_nodes, reference
from dtn_fast.kernels.dispatch import (
    DTYPES,
    LIBRARY,
    autocast,
    fake,
    implement,
    map_like,
    requested,
    traced_as_nodes,
    traced_as_torch,
    use_triton,
)

LIBRARY.define(
    "moe_forward(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor expert_scale, Tensor? seed,"
    " float noise_std, bool keep, str path) -> (Tensor out, Tensor attention, Tensor winner, Tensor hidden)"
)
LIBRARY.define(
    "moe_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor expert_scale, Tensor? seed,"
    " float noise_std, Tensor attention, Tensor winner, Tensor hidden, str path)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

MAX_EXPERTS, MAX_HIDDEN = 8, 256


def unsupported(x: Tensor, w1: Tensor) -> str | None:
    """Reason why these kernels cannot take x [B, C, H, W] and w1 [E, M, C], or None if they can."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if w1.dim() != 3:
        return f"{w1.shape[-1]}x{w1.shape[-1]} experts (kernels take 1x1)"
    if x.shape[1] % 16 or w1.shape[1] % 16 or w1.shape[1] > MAX_HIDDEN or w1.shape[0] > MAX_EXPERTS:
        return (
            f"C={x.shape[1]}, M={w1.shape[1]}, E={w1.shape[0]} "
            f"(C and M must be multiples of 16, M <= {MAX_HIDDEN}, E <= {MAX_EXPERTS})"
        )
    if x.numel() // 8 >= 2**32:
        return f"{x.numel()} elements (the noise counter allows fewer than 2**35)"
    return None


def _moe_triton(path: str, x: Tensor, w1: Tensor) -> bool:
    return use_triton(path, "moe_gate", x, unsupported(x, w1))


@implement("moe_forward")
def _moe_forward(x, w1, b1, w2, b2, expert_scale, seed, noise_std, keep, path):
    batch, _, height, width = x.shape
    if not _moe_triton(path, x, w1):
        out, attention, winner = reference.moe_gate_forward(x, w1, b1, w2, b2, expert_scale, noise_std, seed)
        out = out.contiguous(memory_format=torch.channels_last)
        return out, attention.to(torch.float32), winner, _hidden_like(x, w1, keep).zero_()  # backward computes it
    from dtn_fast.kernels import moe_gate_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    out, hidden = map_like(x), _hidden_like(x, w1, keep)
    attention = x.new_empty((batch, height, width), dtype=torch.float32)
    winner = x.new_empty((batch, height, width), dtype=torch.int8)
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if seed is None else seed
    weights = (w1.to(x.dtype).contiguous(), *(t.contiguous() for t in (b1, w2, b2, expert_scale)))
    outputs = (rows_of(out), attention, winner, hidden if keep else None)
    for launch in kernels.forward(rows_of(x), *weights, seed, noise_std, *outputs):
        launch.run()
    return out, attention, winner, hidden


@implement("moe_backward")
def _moe_backward(grad, x, w1, b1, w2, b2, expert_scale, seed, noise_std, attention, winner, hidden, path):
    if not _moe_triton(path, x, w1):
        grads = reference.moe_gate_backward(grad, x, w1, b1, w2, b2, expert_scale, noise_std, seed, winner)
        return grads[0].contiguous(memory_format=torch.channels_last), *grads[1:]
    from dtn_fast.kernels import moe_gate_kernel as kernels
    from dtn_fast.kernels.launch import rows_of

    dx = map_like(x)
    seed = torch.zeros((), dtype=torch.int64, device=x.device) if seed is None else seed
    weights = (w1.to(x.dtype).contiguous(), *(t.contiguous() for t in (w2, b2, expert_scale)))
    rows = (rows_of(grad), rows_of(x))
    launches, partial, dw1 = kernels.backward(*rows, *weights, seed, noise_std, attention, winner, hidden, rows_of(dx))
    for launch in launches:
        launch.run()
    first, *others = kernels.finish(partial, dw1)
    small = zip(others, (b1, w2, b2, expert_scale), strict=True)
    # copied, as an operator's outputs may not share memory
    others = [g.to(p.dtype, copy=True, memory_format=torch.contiguous_format) for g, p in small]
    return dx, first.to(w1.dtype), *others


def _hidden_like(x: Tensor, w1: Tensor, keep: bool) -> Tensor:
    """Uninitialised hidden units of the winning experts, [B H W, M] or, unless they are kept for a backward, [0, M]."""
    return x.new_empty((x.numel() // x.shape[1] if keep else 0, w1.shape[1]))


@fake("moe_forward")
def _(x, w1, b1, w2, b2, expert_scale, seed, noise_std, keep, path):
    shape = (x.shape[0], x.shape[2], x.shape[3])
    maps = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int8)
    return map_like(x), *maps, _hidden_like(x, w1, keep)


@fake("moe_backward")
def _(grad, x, w1, b1, w2, b2, expert_scale, seed, noise_std, attention, winner, hidden, path):
    return map_like(x), *(t.new_empty(t.shape) for t in (w1, b1, w2, b2, expert_scale))


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, expert_scale, seed, noise_std, keep, path):
        out, attention, winner, hidden = torch.ops.dtn_fast.moe_forward(
            x, w1, b1, w2, b2, expert_scale, seed, noise_std, keep, path
        )
        ctx.noise_std, ctx.path, ctx.has_seed = noise_std, path, seed is not None
        kept = () if seed is None else (seed,)
        ctx.save_for_backward(x, w1, b1, w2, b2, expert_scale, attention, winner, hidden, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, attention, winner, hidden = ctx.saved_tensors[:9]
        seed = ctx.saved_tensors[9] if ctx.has_seed else None
        grads = torch.ops.dtn_fast.moe_backward(grad, *inputs, seed, ctx.noise_std, attention, winner, hidden, ctx.path)
        return *grads, None, None, None, None


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

    x: [B, C, H, W], preferably channels_last (others are copied).  w1: [E, M, C], b1 and w2: [E, M], b2 and
    expert_scale: [E]; 3x3 experts (w1 [E, M, C, 3, 3], w2 [E, M, 3, 3]) use the reference.  noise_std: standard
    deviation of the Gaussian noise, 0 for none.  seed: int or int64 scalar tensor that fixes the noise on every device;
    None draws one from torch's default generator.  Returns [B, C, H, W], channels_last.  Gradients for x, both weight
    pairs and the scales, deterministic; autocast casts x and the weights.  Raises ValueError naming the argument.
    """
    path = requested(path)
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}; it must be a floating-point [B, C, H, W]")
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    experts, hidden = w1.shape[:2] if w1.dim() in (3, 5) else (0, 0)
    window = tuple(w1.shape[3:])
    if not experts or w1.shape[2] != x.shape[1] or window not in ((), (1, 1), (3, 3)):
        raise ValueError(
            f"w1: shape is {tuple(w1.shape)}; it must be [E, M, {x.shape[1]}] or [E, M, {x.shape[1]}, 3, 3]"
        )
    if x.shape[1] % 16 or hidden % 16:
        name, value = ("x", x.shape[1]) if x.shape[1] % 16 else ("w1", hidden)
        raise ValueError(f"{name}: {value} {'channels' if name == 'x' else 'hidden units'}; use a multiple of 16")
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
    if traced_as_nodes() and w1.dim() == 3 and not noise_std:
        return onnx_nodes.moe_gate(x, w1, b1, w2, b2, expert_scale)
    if traced_as_torch():
        return reference.moe_gate(x, w1, b1, w2, b2, expert_scale, float(noise_std), seed)
    leaves = (x, w1, b1, w2, b2, expert_scale)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    return _MoE.apply(*leaves, seed, float(noise_std), keep, path)
