"""The choice between the Triton kernels and plain torch, and the registration of operators with torch.library.

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
from torch import Tensor

from dtn_fast.device import tf32_allowed

PATHS = ("auto", "triton", "reference")
VARIABLE = "DTN_FAST_KERNELS"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels take; the reference also takes float64."""

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


def traced_as_torch() -> bool:
    """Whether an exporter traces: operators are then plain torch, or nodes."""
    return _plain


def traced_as_nodes() -> bool:
    """Whether an exporter traces and wants the operators as ONNX nodes."""
    return _nodes


def requested(path: str | None) -> str:
    path = path or os.environ.get(VARIABLE) or "auto"
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}; allowed are {', '.join(PATHS)} (argument or {VARIABLE})")
    return path


def use_triton(path: str, operator: str, x: Tensor, refusal: str | None, products: bool = True) -> bool:
    """Whether ``operator``, of matrix products or none, runs its Triton kernels on ``x``; ``refusal`` says why they
    cannot take the shapes."""
    if path == "reference":
        return False
    if x.device.type == "cpu":
        why = None if interpreting() else "a CPU tensor without TRITON_INTERPRET=1"
    elif x.device.type != "cuda" or torch.version.hip:
        why = f"device {x.device.type}"
    elif torch.cuda.get_device_capability(x.device) < (8, 0):
        why = "a GPU of compute capability under 8.0"
    elif products and x.dtype == torch.float32 and not tf32_allowed() and path == "auto":
        why = "float32 without TF32 (torch.backends.cuda.matmul.fp32_precision)"
    else:
        why = None
    why = why or refusal
    if path == "triton" and why:
        raise ValueError(f"{operator}: path 'triton' was forced, but the kernels do not take {why}")
    if why and x.device.type != "cpu":
        _notice(operator, why)
    return why is None


def interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from dtn_fast.kernels.launch import INTERPRET

    return INTERPRET


@functools.cache
def _notice(operator: str, why: str) -> None:
    warnings.warn(f"{operator}: the Triton kernels do not take {why}; using the torch reference", stacklevel=3)


def autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in autocast's dtype where it is on."""
    if _autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        others = tuple(t.to(x.dtype) for t in others)
    return x, *others


def _autocasting(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


# ------------------------------------------------------------------------------------------------ registration

LIBRARY = torch.library.Library("dtn_fast", "DEF")
_KEY = "CompositeExplicitAutograd"  # one implementation for every device; it looks where its tensors are


def implement(name: str):
    """Decorates the implementation of the operator ``dtn_fast::name``."""

    def register(function):
        LIBRARY.impl(name, function, _KEY)
        return function

    return register


def fake(name: str):
    """Decorates the function that gives shapes and dtypes of ``dtn_fast::name`` while torch traces."""
    return torch.library.register_fake(f"dtn_fast::{name}", lib=LIBRARY)


def map_like(x: Tensor) -> Tensor:
    """An unfilled map [B, C, H, W] in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)
