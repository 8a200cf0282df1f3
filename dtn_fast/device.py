"""Choice of the device, and of a number format that it supports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype for ``device``; float32 means no autocast.

    ``auto`` gives float32 on a CPU without bf16 instructions, where bf16 autocast is about ten times slower.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if computes_in("bf16") else torch.float32


def computes_in(precision: str) -> bool:
    """Whether this CPU has instructions for ``precision``; a 16-bit convolution without them is ten times slower than
    in float32."""
    known: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return precision == "fp32" or bool(known.get(f"avx512_{precision}") or known.get(f"amx_{precision}"))


Device = Literal["auto", "cpu", "cuda"]


def choose_device(device: Device) -> str:
    """Resolves ``device`` to cpu or cuda.  Raises UsageError when a GPU is requested and there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if device == "cuda" or (device == "auto" and available) else "cpu"


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on ``device``, without waiting for a GPU: the copy is from pinned memory, because one
    from other memory first waits for the work before it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes float32 products and convolutions on a GPU in float32 inside, and not in TF32."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def tf32_allowed() -> bool:
    """Whether torch lets float32 products on a GPU run in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compile reads it once, because torch 2.11 cannot trace the getter, and compiles anew when TF32 changes
tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # importing the public way takes 3 s
