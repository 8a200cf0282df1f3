"""The choice between the Triton kernels and plain torch, and the registration of operators with torch.library.

Paths: ``triton`` (the kernels; on a CPU with TRITON_INTERPRET=1 in Triton's interpreter) and ``reference`` (plain
torch).  ``auto`` uses triton on CUDA devices of compute capability 8.0 and up if the kernels support the inputs, else
the reference, with one warning on a GPU.  Float32 matrix products on a GPU use the kernels only if torch allows TF32;
otherwise attention is torch's scaled_dot_product_attention times the gate.  The argument ``path`` or the environment
variable DTN_FAST_KERNELS forces a path.
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
"""Dtypes that the kernels take; the reference also takes float64."""

_plain = _nodes = False


@contextlib.contextmanager
def tracing(nodes: bool) -> Iterator[None]:
    """Context in which an exporter traces the operators as the reference's torch calls or, with ``nodes``, as the ONNX
    nodes of ``onnx_nodes`` (3x3 experts have no node)."""
    global _plain, _nodes
    before = _plain, _nodes
    _plain, _nodes = True, nodes
    try:
        yield
    finally:
        _plain, _nodes = before


def traced_as_torch() -> bool:
    """Whether an exporter is tracing: the operators are then plain torch calls or ONNX nodes."""
    return _plain


def traced_as_nodes() -> bool:
    """Whether an exporter is tracing the operators as ONNX nodes."""
    return _nodes


def requested(path: str | None) -> str:
    path = path or os.environ.get(VARIABLE) or "auto"
    if path not in PATHS:
        raise ValueError(f"path: got {path!r}; allowed are {', '.join(PATHS)} (argument or {VARIABLE})")
    return path


def use_triton(path: str, operator: str, x: Tensor, refusal: str | None, products: bool = True) -> bool:
    """Whether ``operator`` runs its Triton kernels on ``x``.

    refusal: reason why the kernels cannot take the inputs, or None.  products: whether the operator multiplies
    matrices, so that float32 needs TF32.  Raises ValueError when ``path`` is triton and the kernels cannot run.
    """
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
        raise ValueError(f"{operator}: path 'triton' was forced, but the kernels do not take {why}; use 'auto'")
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
    """The tensors, cast to autocast's dtype if autocast is on."""
    if _autocasting(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        others = tuple(t.to(x.dtype) for t in others)
    return x, *others


def _autocasting(x: Tensor) -> bool:
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


# ------------------------------------------------------------------------------------------------ registration

LIBRARY = torch.library.Library("dtn_fast", "DEF")
_KEY = "CompositeExplicitAutograd"  # one implementation for every device; it checks where its tensors are


def implement(name: str):
    """Decorator that registers the implementation of the operator ``dtn_fast::name``."""

    def register(function):
        LIBRARY.impl(name, function, _KEY)
        return function

    return register


def fake(name: str):
    """Decorator for the function that gives the output shapes and dtypes of ``dtn_fast::name`` while torch traces."""
    return torch.library.register_fake(f"dtn_fast::{name}", lib=LIBRARY)


def map_like(x: Tensor) -> Tensor:
    """Uninitialised map like ``x`` [B, C, H, W], in channels_last."""
    return torch.empty_like(x, memory_format=torch.channels_last)
