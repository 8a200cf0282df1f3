"""Benchmark of every operator, forward and backward, against the alternatives.  Run: dtn-fast bench kernels

On a GPU the contenders are this package's kernels, torch's SDPA on each backend that accepts the shape followed by the
head scales, FlexAttention, the compiled reference and the eager one; without a GPU small shapes show that the suite
works and how the reference path compares.  Attention takes packed [B, N, 3, 8, 64], the expert gate has the paper's 2
experts, BN with ReLU and pooling takes the maps of the paper's backbone, and the local connection those of its blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtn_fast.bench.machine import Machine
from dtn_fast.bench.measure import (
    Call,
    Case,
    Compiled,
    Timed,
    backward_passes,
    compilations,
    forward_passes,
    rotation,
)
from dtn_fast.bench.roofline import attention_work, bn_work, connection_work, gate_work
from dtn_fast.device import exact_products, tf32_allowed
from dtn_fast.errors import DtnError
from dtn_fast.kernels import ops, reference

SUITE = "kernels"
HEADS, DIM = 8, 64
GPU_SHAPES = [(256, 64), (32, 64), (1, 64), (1024, 64), (128, 197), (32, 577), (8, 1024), (2, 4096)]
CPU_SHAPES = [(1, 64), (8, 64), (2, 197)]
BN_SHAPES = [(256, 32, 256), (256, 64, 128), (256, 128, 64), (256, 512, 16), (32, 32, 256)]
"""Batch, channels and side of the backbone's maps."""
BATCHES = [256, 32, 1, 1024]
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error allowed for timing, relative to the largest value; float32 may be TF32 on a GPU."""


def cases(machine: Machine | None = None, quick: bool = False) -> Iterator[Case]:
    """Cases of every operator, shape and dtype for this machine: what trains first, because the budget may end.  Raises
    DtnError at the end if this package's own operators failed or were wrong."""
    gpu = torch.cuda.is_available()
    dtypes = (
        [torch.bfloat16, torch.float16, torch.float32]
        if gpu and not quick
        else [torch.bfloat16 if gpu else torch.float32]
    )
    shapes = (GPU_SHAPES if gpu else CPU_SHAPES)[: 2 if quick else None]
    batches = (BATCHES if gpu else [1, 8])[: 2 if quick else None]
    maps = (BN_SHAPES if gpu else [(2, 16, 32)])[: 1 if quick else None]
    failed: list[str] = []
    for dtype in dtypes:
        for shape, batch, each in itertools.zip_longest(shapes, batches, maps):  # the operators in turns
            todo = [gate_cases(batch, dtype, machine), connection_cases(batch, dtype, machine)] if batch else []
            todo += [attention_cases(*shape, dtype, machine)] if shape else []
            todo += [bn_cases(*each, pool, dtype, machine) for pool in (True, False)] if each else []
            for operator in todo:
                try:
                    yield from operator
                except (DtnError, RuntimeError) as error:  # the others are measured first
                    failed.append(str(error).splitlines()[0])
    if failed:
        raise DtnError("; ".join(failed))


class Operator(NamedTuple):
    """One operator at one shape, and everything that computes it."""

    title: str
    shape: str
    contenders: dict[str, Call]
    make: Callable[[], list[Tensor]]
    """Draws a set of inputs."""
    exact: Call
    few: int
    """Number of images to compare: as many as the result of one depends on, or a few."""
    baselines: tuple[str, ...]
    """Contenders that ratios are relative to, the first that is right."""
    work: Callable[[bool], tuple[float, float]]
    """FLOPs and least bytes, of the forward or the backward pass."""
    notes: tuple[str, ...] = ()
    same_backward: bool = False
    """Whether to compare the input's gradient too: where maxima are taken, 16-bit results may tie."""


def cases_of(operator: Operator, dtype: torch.dtype, machine: Machine | None) -> Iterator[Case]:
    """Cases of the forward pass, with a warm and a cold L2 cache, and of the backward pass.  Contenders that fail or
    give wrong results are noted, not timed.  Raises DtnError if this package's own is wrong."""
    torch.manual_seed(0)
    sets = rotation(operator.make)
    right, notes, errors, compiled = _right(operator, dtype, sets[0])

    def case(back: bool, inputs: list[list[Tensor]], suffix: str) -> Case:
        calls: dict[str, Timed] = {}
        for name, call in right.items():
            try:
                with compilations(compiled[back], name) if back else nullcontext():
                    calls[name] = backward_passes(call, inputs) if back else forward_passes(call, inputs)
            except RuntimeError as error:
                if name == "dtn_fast":
                    raise
                notes.append(f"{name}{', backward' * back}: failed ({str(error).splitlines()[0][:80]})")
        shown = {name: name + call.how for name, call in calls.items()}
        ours, base = "dtn_fast", next((name for name in operator.baselines if name in calls), "dtn_fast")
        work = operator.work(back)
        bound = max(work[0] / machine.flops, work[1] / machine.bandwidth) if machine else 0.0
        return Case(
            SUITE, f"{operator.title} {'backward ' * back}{operator.shape} {_name(dtype)}{suffix}",
            {shown[name]: call for name, call in calls.items()}, shown[ours], shown[base], 0, *work, bound,
            {shown[name]: value for name, value in errors[back].items() if name in shown}, tuple(notes),
            compiled={shown[name]: value for name, value in compiled[back].items() if name in shown},
        )  # fmt: skip

    forward = [case(False, sets[:1], "")]
    if len(sets) > 1:  # one set that fills the cache is cold by itself
        forward.append(case(False, sets, " cold L2"))
    while forward:
        yield forward.pop(0)
    if torch.cuda.is_available():
        torch.compiler.reset()  # compiling for gradients is no recompilation
    yield case(True, sets, "")


def _right(
    operator: Operator, dtype: torch.dtype, inputs: list[Tensor]
) -> tuple[dict[str, Call], list[str], tuple[dict[str, float], ...], tuple[dict[str, Compiled], ...]]:
    """The contenders that compute the right thing, notes on the others, and by pass (forward, backward) the errors, and
    what torch.compile did for the forward one."""
    right, notes = dict[str, Call](), list(operator.notes)
    errors, compiled = (dict[str, float](), dict[str, float]()), (dict[str, Compiled](), dict[str, Compiled]())
    wide = [t.detach()[: operator.few] if t is inputs[0] else t.detach() for t in inputs]
    wide = [t.double() if operator.same_backward else t.float() for t in wide]
    wide[0].requires_grad_(operator.same_backward)
    with exact_products():
        exact = operator.exact(*wide)
        slope = torch.randn_like(exact).to(dtype)
        dexact = torch.autograd.grad(exact, wide[0], slope.to(exact.dtype))[0] if operator.same_backward else exact
    exact, dexact = exact.detach().double(), dexact.detach().double()
    for name, call in operator.contenders.items():
        try:
            with compilations(compiled[0], name), torch.no_grad():
                errors[0][name] = _error(call(*inputs)[: operator.few], exact)
            if operator.same_backward:
                (got,) = torch.autograd.grad(call(*inputs)[: operator.few], inputs[0], slope)
                errors[1][name] = _error(got[: operator.few], dexact)
        except (RuntimeError, ValueError) as error:
            if name == "dtn_fast":
                raise
            notes.append(f"{name}: failed ({str(error).splitlines()[0][:80]})")
            continue
        whys = [_wrong(f"{name}{', backward' * back}", errors[back].get(name, 0.0), dtype) for back in (False, True)]
        if any(whys):
            notes.append(next(filter(None, whys)))
            continue
        right[name] = call
    return right, notes, errors, compiled


def _name(dtype: torch.dtype) -> str:
    text = str(dtype).removeprefix("torch.")
    return f"{text} (TF32)" if dtype == torch.float32 and torch.cuda.is_available() and tf32_allowed() else text


def _own(operator: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """This package's operator; on a GPU always its kernels, never what they fall back to."""
    return functools.partial(operator, path="triton" if torch.cuda.is_available() else None, **how)


def sdpa_gate(qkv: Tensor, scale: Tensor) -> Tensor:
    """torch's attention, then the head scales: the two calls that the MAS kernel replaces."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * scale.sigmoid()[:, None].to(qkv.dtype)


def _eager(qkv: Tensor, scale: Tensor) -> Tensor:
    return reference.mas_attention(*qkv.unbind(2), scale)


def attention_contenders() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Attention functions by name: (qkv [B, N, 3, H, D], head_scale [H]) -> [B, N, H, D]."""
    contenders: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dtn_fast": _own(ops.mas_attention_packed)}
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
    """Cases of MAS attention over packed projections [batch, n, 3, 8, 64]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make() -> list[Tensor]:
        qkv = torch.randn(batch, n, 3, HEADS, DIM, device=device).to(dtype).requires_grad_()
        return [qkv, torch.randn(HEADS, device=device, requires_grad=True)]

    contenders, notes = attention_contenders(), []
    for name in [name for name in contenders if "eager" in name or "math" in name]:
        if n * n * batch * HEADS * 8 > 8e9:
            del contenders[name]
            notes.append(f"{name}: not run, its scores do not fit in memory")
    yield from cases_of(
        Operator(
            "MAS attention", f"B={batch} N={n} H={HEADS} D={DIM}", contenders, make, _eager,
            min(batch, 4), ("SDPA flash + gate", "SDPA efficient + gate", "SDPA + gate", "eager reference"),
            lambda back: attention_work(batch, n, HEADS, DIM, dtype.itemsize, back), tuple(notes), same_backward=True,
        ), dtype, machine,
    )  # fmt: skip


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
    """Cases of the expert gate at 64 positions per image, with and without noise."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = torch.tensor(1, device=device)

    def make() -> list[Tensor]:
        x = torch.randn(batch, 512, 8, 8, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        weights = [torch.randn(s, device=device) * 0.05 for s in ((2, 128, 512), (2, 128), (2, 128), (2,), (2,))]
        return [t.requires_grad_() for t in (x, weights[0].to(dtype), *weights[1:])]

    for std in (0.1, 0.0):
        noise: dict[str, Any] = {"noise_std": std, "seed": seed if std else None}
        plain = functools.partial(reference.moe_gate, **noise)
        contenders: dict[str, Call] = {"dtn_fast": _own(ops.moe_gate, **noise), "eager reference": plain}
        if device == "cuda":
            contenders["torch.compile of the reference"] = torch.compile(plain)
        yield from cases_of(
            Operator(
                "Expert gate", f"B={batch} 512x8x8 E=2 M=128 noise {std}", contenders, make, plain, min(batch, 4),
                ("eager reference",), lambda back: gate_work(batch * 64, 2, 128, 512, dtype.itemsize, back),
            ), dtype, machine,
        )  # fmt: skip


def _bn_eager(x: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5).relu()
    return F.max_pool2d(y, 2) if pool else y


def bn_cases(
    batch: int, channels: int, side: int, pool: bool, dtype: torch.dtype, machine: Machine | None
) -> Iterator[Case]:
    """Cases of BN in training with ReLU and optional pooling on one of the backbone's maps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make() -> list[Tensor]:
        x = torch.randn(batch, channels, side, side, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return [x.requires_grad_(), *(torch.randn(channels, device=device).requires_grad_() for _ in range(2))]

    own, plain = _own(ops.bn_relu, eps=1e-5, pool=pool), functools.partial(_bn_eager, pool=pool)
    contenders: dict[str, Call] = {"dtn_fast": lambda *t: own(*t)[0], "torch, one operator after another": plain}
    if device == "cuda":
        contenders["torch.compile"] = torch.compile(plain)
    yield from cases_of(
        Operator(
            "BN + ReLU + pool" if pool else "BN + ReLU", f"B={batch} {channels}x{side}x{side}", contenders, make, plain,
            batch, ("torch, one operator after another",),
            lambda back: bn_work(batch * channels * side * side, dtype.itemsize, pool, back),
        ), dtype, machine,
    )  # fmt: skip


def _connection_eager(m: Tensor, x: Tensor, weight: Tensor, *columns: Tensor) -> Tensor:
    bias, norm_weight, norm_bias = columns
    z = F.conv2d(m, weight.to(m.dtype), bias.to(m.dtype), padding=1, groups=m.shape[1])
    return x + F.batch_norm(z, None, None, norm_weight, norm_bias, True, 0.0, 1e-5)


def connection_cases(batch: int, dtype: torch.dtype, machine: Machine | None) -> Iterator[Case]:
    """Cases of the local connection in training, x + BN(depthwise convolution of m), at the model's 512x8x8."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make() -> list[Tensor]:
        maps = [torch.randn(batch, 512, 8, 8, device=device).to(dtype) for _ in range(2)]
        maps = [t.contiguous(memory_format=torch.channels_last) for t in maps]
        columns = [torch.randn(s, device=device) for s in ((512, 1, 3, 3), 512, 512, 512)]
        return [t.requires_grad_() for t in (*maps, *columns)]

    own, plain = _own(ops.local_connection, eps=1e-5), _connection_eager
    contenders: dict[str, Call] = {"dtn_fast": lambda *t: own(*t)[0], "torch, one operator after another": plain}
    if device == "cuda":
        contenders["torch.compile"] = torch.compile(plain)
    yield from cases_of(
        Operator(
            "Local connection", f"B={batch} 512x8x8", contenders, make, plain, batch,
            ("torch, one operator after another",),
            lambda back: connection_work(batch * 512 * 64, dtype.itemsize, back), same_backward=True,
        ), dtype, machine,
    )  # fmt: skip


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


@pytest.mark.parametrize("batch", [1, 8])
def bench_local_connection(compare, batch: int) -> None:
    for case in connection_cases(batch, torch.bfloat16 if torch.cuda.is_available() else torch.float32, None):
        compare(case)
