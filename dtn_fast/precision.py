"""Number formats by name, and which of them a device computes in."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast on ``device``; float32 means none.

    A CPU without bf16 instructions gets float32 from ``auto``: autocast to bf16 is about ten times slower there.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if computes_in("bf16") else torch.float32


def computes_in(precision: str) -> bool:
    """Whether this CPU has instructions for it; without them a 16-bit convolution is ten times slower than float32."""
    known: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return precision == "fp32" or bool(known.get(f"avx512_{precision}") or known.get(f"amx_{precision}"))
