"""Benchmark of every operator, forward and backward, against the alternatives.  Run: dtn-fast bench kernels

On a GPU the contenders are this package's kernels, torch's SDPA on each backend that accepts the shape followed by the
head scales, FlexAttention, the compiled reference and the eager one; without a GPU small shapes show that the suite
works and how the reference path compares.  Attention takes packed [B, N, 3, 8, 64], the expert gate has the paper's 2
experts, and BN with ReLU and pooling takes the maps of the paper's backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import Case, captured
from dtn_fast.bench.roofline import attention_work, bn_work, gate_work
from dtn_fast.errors import DtnError
from dtn_fast.kernels import ops, reference

SUITE = "kernels"
HEADS, DIM = 8, 64
GPU_SHAPES = [(1, 64), (32, 64), (256, 64), (1024, 64), (128, 197), (32, 577), (8, 1024), (2, 4096)]
CPU_SHAPES = [(1, 64), (8, 64), (2, 197)]
BN_SHAPES = [(256, 32, 256), (256, 64, 128), (256, 128, 64), (256, 512, 16), (32, 32, 256)]
"""Batch, channels and side of the backbone's maps."""
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error allowed for timing, relative to the largest value; float32 may be TF32 on a GPU."""
REPLAYED = 2**21
"""Largest number of elements of q for which the forward pass is timed as the replay of a CUDA graph."""


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Cases of every operator, shape and dtype for this machine."""
    gpu = torch.cuda.is_available()
    dtypes = (
        [torch.bfloat16, torch.float16, torch.float32]  # the one that trains first, because the budget may end
        if gpu and not quick
        else [torch.bfloat16 if gpu else torch.float32]
    )
    shapes = (GPU_SHAPES if gpu else CPU_SHAPES)[: 2 if quick else None]
    for dtype in dtypes:
        for batch, n in shapes:
            yield from attention_cases(batch, n, dtype, machine)
        for batch in ([1, 32, 256, 1024] if gpu else [1, 8])[: 2 if quick else None]:
            yield from gate_cases(batch, dtype, machine)
        for shape in (BN_SHAPES if gpu else [(2, 16, 32)])[: 1 if quick else None]:
            for pool in (False, True):
                yield from bn_cases(*shape, pool, dtype, machine)


def _lower_bound(machine: Machine | None, work: tuple[float, float]) -> float:
    return max(work[0] / machine.flops, work[1] / machine.bandwidth) if machine else 0.0


def sdpa_gate(qkv: Tensor, scale: Tensor) -> Tensor:
    """torch's attention, then the head scales: the two calls that the MAS kernel replaces."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * scale.sigmoid()[:, None].to(qkv.dtype)


def _eager(qkv: Tensor, scale: Tensor) -> Tensor:
    return reference.mas_attention(*qkv.unbind(2), scale)


def attention_contenders() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Attention functions by name: (qkv [B, N, 3, H, D], head_scale [H]) -> [B, N, H, D]."""
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dtn_fast": ops.mas_attention_packed}
    if torch.cuda.is_available():
        backends = [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        for backend in backends:

            def one(qkv: Tensor, scale: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return sdpa_gate(qkv, scale)

            contenders[f"SDPA {backend.name.removesuffix('_ATTENTION').lower()} + gate"] = one
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention)

        def flexible(qkv: Tensor, scale: Tensor) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return flex(q, k, v).transpose(1, 2) * scale.sigmoid()[:, None].to(qkv.dtype)

        contenders["FlexAttention + gate"] = flexible
        contenders["torch.compile of the reference"] = torch.compile(_eager)
    else:
        contenders["SDPA + gate"] = sdpa_gate
    contenders["eager reference"] = _eager
    return contenders


def attention_cases(batch: int, n: int, dtype: torch.dtype, machine: Machine | None) -> Iterator[Case]:
    """Cases of one shape, forward and backward; contenders that fail or give wrong results are noted, not timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    qkv = torch.randn(batch, n, 3, HEADS, DIM, device=device).to(dtype).requires_grad_()
    scale = torch.randn(HEADS, device=device, requires_grad=True)
    grad = torch.randn(batch, n, HEADS, DIM, device=device).to(dtype)
    few = min(batch, 4)  # attention of one image does not depend on the others
    wide = qkv.detach()[:few].double().requires_grad_()
    exact = reference.mas_attention(*wide.unbind(2), scale.detach().double())
    (dexact,) = torch.autograd.grad(exact, wide, grad[:few].double())
    forward, backward, errors, derrors, notes = {}, {}, {}, {}, []
    for name, call in attention_contenders().items():
        if n * n * batch * HEADS * 8 > 8e9 and ("eager" in name or "math" in name):
            notes.append(f"{name}: not run, its scores do not fit in memory")
            continue
        try:
            with torch.no_grad():
                errors[name] = _error(call(qkv, scale)[:few], exact)
            out = call(qkv, scale)
            derrors[name] = _error(torch.autograd.grad(out, (qkv, scale), grad, retain_graph=True)[0][:few], dexact)
        except (RuntimeError, ValueError) as error:
            notes.append(f"{name}: failed ({str(error).splitlines()[0][:80]})")
            continue
        if why := _wrong(name, errors[name], dtype) or _wrong(f"{name}, backward", derrors[name], dtype):
            notes.append(why)
            continue
        forward[name] = _inference(call, qkv, scale, batch * n * HEADS * DIM <= REPLAYED)
        backward[name] = lambda out=out: torch.autograd.grad(out, (qkv, scale), grad, retain_graph=True)
    shape = f"B={batch} N={n} H={HEADS} D={DIM} {str(dtype).removeprefix('torch.')}"
    baseline = next(
        (b for b in ("SDPA flash + gate", "SDPA efficient + gate", "SDPA + gate") if b in forward),
        "eager reference" if "eager reference" in forward else "dtn_fast",
    )
    for title, calls, wrong, back in (
        ("MAS attention", forward, errors, False),
        ("MAS attention backward", backward, derrors, True),
    ):
        work = attention_work(batch, n, HEADS, DIM, qkv.element_size(), back)
        for cold in (False, True) if device == "cuda" and not back else (False,):
            yield Case(SUITE, f"{title} {shape}{' cold L2' if cold else ''}", calls, "dtn_fast", baseline, 0, *work,
                       _lower_bound(machine, work), wrong, tuple(notes), cold=cold)  # fmt: skip


def _inference(call: Callable[..., Tensor], qkv: Tensor, scale: Tensor, small: bool) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.no_grad():
            return call(qkv, scale)

    try:
        return captured(run) if small else run
    except RuntimeError:  # not every backend can be captured
        torch.cuda.synchronize()
        return run


def _wrong(name: str, error: float, dtype: torch.dtype) -> str:
    """Reason why a contender is not timed, empty if its result is right.  Raises DtnError if it is this package's."""
    if error <= TOLERANCE[dtype]:  # false for NaN
        return ""
    text = f"{name}: wrong result in {dtype} (error {error:.1e}, allowed {TOLERANCE[dtype]:.0e})"
    if name.startswith("dtn_fast"):
        raise DtnError(f"{text}; nothing was timed")
    return f"{text}, not timed"


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest value."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def gate_cases(batch: int, dtype: torch.dtype, machine: Machine | None) -> Iterator[Case]:
    """Cases of the expert gate at 64 positions per image, with and without noise, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(batch, 512, 8, 8, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(s, device=device) * 0.05 for s in ((2, 128, 512), (2, 128), (2, 128), (2,), (2,))]
    leaves = [t.requires_grad_() for t in (x, weights[0].to(dtype), *weights[1:])]
    grad = torch.randn_like(x)
    seed = torch.tensor(1, device=device)
    contenders: dict[str, Any] = {"dtn_fast": ops.moe_gate, "eager reference": reference.moe_gate}
    if device == "cuda":
        contenders["torch.compile of the reference"] = torch.compile(reference.moe_gate)
    few = min(batch, 4)
    wide = [t.detach()[:few].float() if t is x else t.detach().float() for t in leaves]
    for std in (0.0, 0.1):
        drawn = seed if std else None
        exact = reference.moe_gate(*wide, std, drawn).double()
        forward, backward, errors, notes = {}, {}, {}, []
        for name, call in contenders.items():

            def once(call: Any = call, drawn: Tensor | None = drawn, std: float = std) -> Tensor:
                with torch.no_grad():
                    return call(*leaves, std, drawn)

            errors[name] = _error(once()[:few], exact)
            if why := _wrong(name, errors[name], dtype):
                notes.append(why)
                continue
            out = call(*leaves, std, drawn)
            forward[name] = captured(once)
            backward[name] = lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        shape = f"B={batch} 512x8x8 E=2 M=128 noise {std} {str(dtype).removeprefix('torch.')}"
        baseline = "eager reference" if "eager reference" in forward else "dtn_fast"
        for title, calls, back in (("Expert gate", forward, False), ("Expert gate backward", backward, True)):
            work = gate_work(batch * 64, 2, 128, 512, x.element_size(), back)
            yield Case(SUITE, f"{title} {shape}", calls, "dtn_fast", baseline, 0, *work, _lower_bound(machine, work),
                       {} if back else errors, tuple(notes))  # fmt: skip


def _bn_eager(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5).relu()
    return F.max_pool2d(y, 2) if pool else y


def bn_cases(
    batch: int, channels: int, side: int, pool: bool, dtype: torch.dtype, machine: Machine | None
) -> Iterator[Case]:
    """Cases of BN in training with ReLU and optional pooling on one of the backbone's maps, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *(torch.randn(channels, device=device).requires_grad_() for _ in range(2))]
    contenders: dict[str, Any] = {"dtn_fast": lambda *t: ops.bn_relu(*t, 1e-5, pool)[0]}
    contenders["torch, one operator after another"] = lambda *t: _bn_eager(*t, pool)
    if device == "cuda":
        contenders["torch.compile"] = torch.compile(lambda *t: _bn_eager(*t, pool))
    exact = _bn_eager(*(t.detach().float() for t in leaves), pool).double()
    forward, backward, errors, notes = {}, {}, {}, []
    for name, call in contenders.items():

        def once(call: Any = call) -> Tensor:
            with torch.no_grad():
                return call(*leaves)

        errors[name] = _error(once(), exact)
        if why := _wrong(name, errors[name], dtype):
            notes.append(why)
            continue
        out = call(*leaves)
        forward[name] = captured(once)
        grad = torch.ones_like(out)
        backward[name] = lambda out=out, grad=grad: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    shape = f"B={batch} {channels}x{side}x{side} {str(dtype).removeprefix('torch.')}"
    baseline = "torch, one operator after another"
    baseline = baseline if baseline in forward else "dtn_fast"
    what = "BN + ReLU + pool" if pool else "BN + ReLU"
    for title, calls, back in ((what, forward, False), (f"{what} backward", backward, True)):
        work = bn_work(x.numel(), x.element_size(), pool, back)
        yield Case(SUITE, f"{title} {shape}", calls, "dtn_fast", baseline, 0, *work, _lower_bound(machine, work),
                   {} if back else errors, tuple(notes))  # fmt: skip


@pytest.mark.parametrize("pool", [False, True])
def bench_bn_relu(compare, pool: bool) -> None:
    gpu = torch.cuda.is_available()
    shape = BN_SHAPES[0] if gpu else (2, 16, 32)
    for case in bn_cases(*shape, pool, torch.bfloat16 if gpu else torch.float32, None):
        compare(case)


@pytest.mark.parametrize(("batch", "n"), GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES)
def bench_mas_attention(compare, batch: int, n: int) -> None:
    for case in attention_cases(batch, n, torch.bfloat16 if torch.cuda.is_available() else torch.float32, None):
        compare(case)


@pytest.mark.parametrize("batch", [1, 8])
def bench_moe_gate(compare, batch: int) -> None:
    for case in gate_cases(batch, torch.bfloat16 if torch.cuda.is_available() else torch.float32, None):
        compare(case)
