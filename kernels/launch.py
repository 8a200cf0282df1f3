"""What a launcher produces: kernel, grid and arguments, so that running and compiling ahead of time share one path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dtn_fast.device import tf32_allowed

INTERPRET: bool = triton.knobs.runtime.interpret
"""Whether kernels are interpreted on the CPU; fixed when they are decorated (TRITON_INTERPRET=1 before the import).

The interpreter multiplies bfloat16 wrongly and knows no inline assembly, so kernels take this as a constexpr.
"""


class Launch(NamedTuple):
    """One kernel launch, complete: ``kernel[grid](*args, **constants, **options)``."""

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
        """Compiles for the active driver's target without running, as :meth:`run` would; returns Triton's kernel."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.constants, **self.options)


def product_precision(x: Tensor) -> str:
    """Triton's input_precision of products of ``x``: tf32 for float32 where torch allows it, never interpreted."""
    return "tf32" if x.dtype == torch.float32 and not INTERPRET and tf32_allowed() else "ieee"


def rows_of(x: Tensor) -> Tensor:
    """[B, C, H, W] as the matrix [B H W, C] whose rows are contiguous; a map that is not channels_last is copied."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()
