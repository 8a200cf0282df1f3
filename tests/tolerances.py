"""How close a kernel must be to float64, in one place, each number with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

NORM = {
    torch.float32: 3e-6,  # some 25 roundings of 2^-24 in a row, summed over a few thousand terms
    torch.float16: 2e-3,  # operands and result rounded to 2^-11
    torch.bfloat16: 1.2e-2,  # operands and result rounded to 2^-8; Triton's interpreter truncates instead of rounding
}
"""Largest |error| / |result| (2-norms) of any output or gradient."""

SUM = 8.0
"""Times that for a gradient summed over batch and positions: terms of both signs cancel."""

PEER = 2.0
"""And at most this times the error that torch's own operators make in the same dtype."""


def relative(got: Tensor, expected: Tensor) -> float:
    """2-norm of the error over that of ``expected``, NaN-proof: a NaN anywhere gives infinity."""
    if not got.isfinite().all():
        return float("inf")
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(
    name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, peer: Tensor | None = None, summed: bool = False
) -> None:
    """``got`` (computed in ``dtype``) against float64 ``expected`` and against torch's own result ``peer``."""
    error = relative(got, expected)
    limit = NORM[dtype] * (SUM if summed else 1.0)
    assert error <= limit, f"{name}: relative error {error:.2e} over {limit:.0e}"
    if peer is not None and dtype != torch.float32:
        bound = max(PEER * relative(peer, expected), 2 * torch.finfo(dtype).eps / 4)
        assert error <= bound, f"{name}: relative error {error:.2e}, torch's own {relative(peer, expected):.2e}"
