"""What a launcher produces: kernel, grid and arguments, so that running and compiling ahead of time share one path."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

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


def tf32_allowed() -> bool:
    """Whether float32 products may run in TF32: torch's own switch, and never in the interpreter."""
    return not INTERPRET and torch.backends.cuda.matmul.fp32_precision == "tf32"
