"""A kernel launch as an object (kernel, grid, arguments): it can be run, or compiled without running."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dtn_fast.device import tf32_allowed

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether kernels are interpreted on the CPU; fixed at import, by TRITON_INTERPRET=1.

The interpreter multiplies bfloat16 wrongly and has no inline assembly, so kernels take constexprs that depend on this.
"""


class Launch(NamedTuple):
    """One complete kernel launch: ``kernel[grid](*args, **constants, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    """The kernel's constexpr arguments."""
    options: dict[str, int]
    """num_warps and num_stages."""

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        """Enqueues the kernel on the current stream; does not wait."""
        options = {} if INTERPRET else self.options
        self.kernel[self.grid](*self.args, **self.constants, **options)

    def compile(self) -> Any:
        """Compiles what :meth:`run` would launch, without running it; returns Triton's compiled kernel."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.constants, **self.options)


def product_precision(x: Tensor) -> str:
    """Triton's input_precision for products of ``x``: tf32 for float32 if torch allows it, ieee in the interpreter."""
    return "tf32" if x.dtype == torch.float32 and not INTERPRET and tf32_allowed() else "ieee"


def rows_of(x: Tensor) -> Tensor:
    """Map x [B, C, H, W] as a matrix [B H W, C] with contiguous rows; copied unless x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()
