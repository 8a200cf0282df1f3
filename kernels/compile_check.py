"""Compiles the project's kernel launches for any GPU architecture, without a GPU, and reports problems.

    python -m dtn_fast.kernels.compile_check --arch 80 90 --json

The report holds for every shipped configuration: registers, spilled bytes, stack, shared memory against the
architecture's limit, tensor-core and vector-load instructions.  Exit code 1 if any configuration spills, does not fit,
or lacks tensor-core or vector-load instructions that it should have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from dtn_fast.kernels import (
    batch_norm_kernel,
    launch_values,
    local_connection_kernel,
    mas_attention_kernel,
    moe_gate_kernel,
)
from dtn_fast.kernels.launch import INTERPRET, Launch

MULTIPROCESSOR = {80: (64, 32, 164), 86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228),
                  120: (48, 24, 100)}  # fmt: skip
"""Warps, blocks and KiB of shared memory per multiprocessor, by compute capability x 10; each has 65,536 registers."""
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Largest shared memory of one block in KiB, by compute capability x 10."""
TENSOR_CORE = re.compile(r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma")
VECTOR_LOAD = re.compile(r"ld\.global[\w.:]*\.v[24]|cp\.async\.c[ag]\.shared\.global[^;]*0x10|cp\.async\.bulk\.tensor")


class CompiledKernel(NamedTuple):
    arch: int
    kernel: str
    shape: str
    dtype: str
    warps: int
    stages: int
    registers: int
    spill: int
    """Bytes of spill stores."""
    stack: int
    shared: int
    """Bytes of shared memory."""
    tensor_core: int
    """Tensor-core instructions in the PTX."""
    vector_load: int
    """Loads of 8 or 16 bytes per thread, asynchronous copies and TMA loads in the PTX."""

    def resident(self) -> int:
        """Blocks that fit on a multiprocessor, given its registers, shared memory and block limit."""
        warps, blocks, shared = MULTIPROCESSOR[self.arch]
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are allocated in units of 256 per warp
        fit = min(blocks, warps // self.warps, 65536 // (per_warp * self.warps))
        return min(fit, shared * 1024 // (self.shared + 1024))  # the system reserves 1 KiB per block

    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that fit."""
        return self.resident() * self.warps / MULTIPROCESSOR[self.arch][0]

    def problems(self) -> list[str]:
        """Reasons why this configuration must not be shipped; empty if there is none."""
        found = []
        if self.spill:
            found.append(f"spills {self.spill} bytes")
        if self.shared > SHARED_LIMIT[self.arch] * 1024:
            found.append(f"needs {self.shared} bytes of shared memory, limit {SHARED_LIMIT[self.arch] * 1024}")
        if not self.tensor_core and not self.kernel.startswith(("bn_", "lc_")):  # these multiply no matrices
            found.append("uses no tensor cores")
        if not self.vector_load and self.kernel != "bn_merge":  # it reads only a few kilobytes
            found.append("uses no vector loads")
        return found


class StubDriver:
    """Stub Triton driver: Triton specialises and compiles kernels for ``arch``; launches do nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches kernels per device, so each architecture is its own device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """Context in which launches compile for ``arch``, with its launch values and TF32 allowed; nothing runs."""
    from triton.runtime import driver

    tf32 = torch.backends.cuda.matmul.fp32_precision
    before = driver._active  # the property would look for a GPU
    driver.set_active(StubDriver(arch))
    launch_values.target = arch
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = tf32
        launch_values.target = None
        driver._active = before


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")  # sizes, strides and alignment, no memory


def mas_launches(n: int, dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 8) -> list[Launch]:
    """Forward and backward launches of MAS attention on a packed QKV projection."""
    qkv = _empty(batch, n, 3, heads, dim, dtype=dtype)
    q, k, v = qkv.unbind(2)
    o, scale, rows = torch.empty_like(q), _empty(heads), mas_attention_kernel.rows_like(q)
    grads, partial = torch.empty_like(qkv).unbind(2), mas_attention_kernel.partial_like(q)
    launches = mas_attention_kernel.forward(q, k, v, scale, o, rows)
    return launches + mas_attention_kernel.backward(o, q, k, v, scale, o, rows, *grads, partial)


def moe_launches(experts: int, hidden: int, channels: int, std: float, dtype: torch.dtype, batch: int) -> list[Launch]:
    """Forward and backward launches of the expert gate on ``batch`` maps of 8x8 positions."""
    total = batch * 64
    x, winner = _empty(total, channels, dtype=dtype), _empty(total, dtype=torch.int8)
    small = [_empty(experts, hidden), _empty(experts, hidden), _empty(experts), _empty(experts)]
    weights = [_empty(experts, hidden, channels, dtype=dtype), *small]
    seed, a = torch.empty((), dtype=torch.int64, device="meta"), _empty(total)
    kept = (a, winner, _empty(total, hidden, dtype=dtype))
    launches = moe_gate_kernel.forward(x, *weights, seed, std, torch.empty_like(x), *kept)
    weights.pop(1)  # b1
    return launches + moe_gate_kernel.backward(x, x, *weights, seed, std, *kept, torch.empty_like(x))[0]


def bn_launches(channels: int, side: int, pool: bool, dtype: torch.dtype, batch: int = 32) -> list[Launch]:
    """Forward and backward launches of BN, ReLU and, with ``pool``, max-pool on a map [batch, channels, side, side]."""
    total = batch * side * side
    x, y = _empty(total, channels, dtype=dtype), _empty(total // 4 if pool else total, channels, dtype=dtype)
    column = [_empty(channels) for _ in range(4)]  # weight, bias, mean, variance
    size = (side, side)
    launches = batch_norm_kernel.forward(x, *column[:2], 1e-5, size, y, *column[2:])
    stats, partial = batch_norm_kernel.backward_stats(y, x, *column, 1e-5, size)
    return [
        *launches,
        stats,
        batch_norm_kernel.backward_apply(y, x, *column, 1e-5, size, partial[0], torch.empty_like(x)),
    ]


def lc_launches(channels: int, side: int, dtype: torch.dtype, batch: int = 32) -> list[Launch]:
    """Forward and backward launches of the local connection on maps [batch, channels, side, side]."""
    rows = [_empty(batch * side * side, channels, dtype=dtype) for _ in range(4)]  # m, x, z, y
    weight, column, size = _empty(9, channels), [_empty(channels) for _ in range(5)], (side, side)
    launches = local_connection_kernel.forward(*rows[:2], weight, *column[:3], 1e-5, size, *rows[2:], *column[3:])
    stats, partial = local_connection_kernel.backward_stats(rows[3], rows[2], *column[1:], 1e-5)
    last, _ = local_connection_kernel.backward(
        rows[3], rows[0], weight, rows[2], *column[1:], 1e-5, size, partial[0], torch.empty_like(rows[0])
    )
    return [*launches, stats, last]


PERSISTENT = {"PERSISTENT": 2, "STAGES": 3, "num_warps": 4, "num_stages": 2}
"""Launch values with which :func:`shipped` compiles the persistent kernels."""


def shipped(arch: int) -> Iterator[tuple[str, torch.dtype, list[Launch]]]:
    """Yields every configuration that is compiled and checked: (shape, dtype, launches)."""
    half, full = torch.bfloat16, torch.float32
    sizes = [(64, 32), (64, 64), (64, 128), (49, 64), (128, 64), (128, 128), (197, 64), (4096, 64), (4096, 128)]
    cases = [(n, d, half) for n, d in sizes] + [
        (64, 64, torch.float16),
        (64, 64, full),
        (197, 64, full),
        (64, 128, full),
    ]
    for n, dim, dtype in cases:
        yield f"N={n} D={dim}", dtype, mas_launches(n, dim, dtype)
    if arch >= 90:
        both = ("mas_small_forward", "mas_small_backward")
        launch_values.override.update(dict.fromkeys(both, PERSISTENT))
        try:
            both_ways = mas_launches(64, 64, half)
            yield "N=64 D=64", half, both_ways if arch < 120 else both_ways[:1]  # the backward spills on sm_120
        finally:
            for kernel in both:
                del launch_values.override[kernel]
    for experts, hidden, channels, std, dtype, batch in [
        *((2, 128, 512, 0.1, half, batch) for batch in (32, 64, 128, 256)),
        (2, 128, 512, 0.0, half, 256),
        (2, 128, 512, 0.1, full, 256),
        (4, 256, 512, 0.1, half, 256),
        (2, 32, 128, 0.1, half, 256),
        (3, 48, 96, 0.1, torch.float16, 256),
    ]:
        launches = moe_launches(experts, hidden, channels, std, dtype, batch)
        yield f"B={batch} E={experts} M={hidden} C={channels}{'' if std else ' no noise'}", dtype, launches
    for channels, side, pool, dtype in [
        (32, 256, True, half),
        (512, 16, False, half),
        (48, 32, True, torch.float16),
        (64, 128, True, full),
    ]:
        name = f"C={channels} {side}x{side}{' pooled' if pool else ''}"
        yield name, dtype, bn_launches(channels, side, pool, dtype)
    for channels, side, dtype in [(512, 8, half), (512, 8, full)]:
        yield f"LC C={channels} {side}x{side}", dtype, lc_launches(channels, side, dtype)


def inspect(launch: Launch, arch: int, shape: str, dtype: torch.dtype) -> CompiledKernel:
    """Compiles ``launch`` and reads the compiler's report; must be called within :func:`target`."""
    compiled = launch.compile()
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [_ptxas(arch), "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spill, log
    assert registers, log
    return CompiledKernel(
        arch=arch,
        kernel=launch.name,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        warps=launch.options["num_warps"],
        stages=launch.options["num_stages"],
        registers=int(registers[1]),
        spill=int(spill[2]),
        stack=int(spill[1]),
        shared=compiled.metadata.shared,
        tensor_core=len(TENSOR_CORE.findall(ptx)),
        vector_load=len(VECTOR_LOAD.findall(ptx)),
    )


def _ptxas(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch).path


def check(arch: int) -> list[CompiledKernel]:
    """Compiles every shipped configuration for ``arch``."""
    with target(arch):
        return [inspect(one, arch, shape, dtype) for shape, dtype, launches in shipped(arch) for one in launches]


def check_all(archs: list[int], processes: int = 2) -> list[CompiledKernel]:
    """Runs :func:`check` for each architecture, spread over worker processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [row for rows in pool.imap(check, archs, chunksize=1) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtn_fast.kernels.compile_check",
        description="Compile every shipped kernel configuration without a GPU and report registers, spills and memory.",
        epilog="Example: python -m dtn_fast.kernels.compile_check --arch 80 90 --json",
    )
    every = sorted(SHARED_LIMIT)
    parser.add_argument("--arch", type=int, nargs="+", choices=every, default=every, help="compute capabilities x 10")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--processes", type=int, default=2, help="number of worker processes")
    options = parser.parse_args(arguments)
    if INTERPRET:
        print("compile_check: unset TRITON_INTERPRET; interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    rows = check_all(options.arch, options.processes)
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        data: dict[str, Any] = {**versions, "rows": [{**r._asdict(), "problems": r.problems()} for r in rows]}
        print(json.dumps(data, indent=1))
    else:
        for r in rows:
            print(
                f"sm_{r.arch:<3} {r.kernel:28} {r.shape:24} {r.dtype:8} warps {r.warps} registers {r.registers:3} "
                f"spill {r.spill} shared {r.shared / 1024:5.1f} KiB tensor {r.tensor_core:3} vector {r.vector_load:3}"
                + "".join(f"  ! {problem}" for problem in r.problems())
            )
    return int(any(r.problems() for r in rows))


if __name__ == "__main__":
    sys.exit(main())
