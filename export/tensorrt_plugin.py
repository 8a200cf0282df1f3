"""TensorRT plugins of the operators: an engine holds the Triton kernels as PTX and needs no Python to run.

``register(tensorrt)`` registers dtn::MASAttention and dtn::MoEGate (shapes: see onnx_nodes) as TensorRT's quickly
deployable plugins, compiled ahead of time.  Each plugin offers several tactics; the builder times them and keeps the
fastest.  TensorRT passes a kernel its inputs, integers and outputs, in this order, and nothing else: Triton's trailing
scratch pointers are therefore removed, and kernels that need scratch memory, clusters, cooperative launches, tensor
descriptors or more than 48 KiB of shared memory are refused.

    python -m dtn_fast.export.tensorrt_plugin MASAttention --arch 89 --dtype float16 --shape 64 8 64

lists the tactics.  ``register`` compiles by this command, in a separate process, because a wrong PTX version aborts the
compiling process.
"""

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dtn_fast.kernels import compile_check, launch_values
from dtn_fast.kernels.launch import Launch
from dtn_fast.kernels.mas_attention import unsupported_head_dim
from dtn_fast.kernels.mas_attention_kernel import LOG2E, mas_flash_forward, mas_small_forward
from dtn_fast.kernels.moe_gate import MAX_EXPERTS, MAX_HIDDEN
from dtn_fast.kernels.moe_gate_kernel import moe_forward

PTX_VERSION = 87
"""PTX version x 10 that drivers from 570 (CUDA 12.8) on accept."""
SHARED = 48 * 1024
"""Largest shared memory of a block without opting in to more, in bytes."""
TACTICS = 4
DTYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


class Image(NamedTuple):
    """One compiled kernel, offered as one tactic."""

    kernel: str
    ptx: str
    threads: int
    """Threads per block."""
    shared: int
    """Shared memory per block in bytes."""
    rows: int
    """Rows that one block computes: for MASAttention queries of one (batch, head), 0 for all; for MoEGate positions."""
    values: dict[str, int]
    """Launch values that the kernel was compiled with."""


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def mas_attention_small(
    QKV, HEAD_SCALE, O,
    SCALE: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """MAS attention on packed QKV, N <= 128.  Grid (B H,).  SCALE = log2(e) / sqrt(D)."""
    mas_small_forward(
        QKV, QKV + H * D, QKV + 2 * H * D, HEAD_SCALE, O, N, SCALE,
        3 * N * H * D, 3 * H * D, D, 3 * N * H * D, 3 * H * D, D, 3 * N * H * D, 3 * H * D, D, N * H * D, H * D, D,
        H, D, BLOCK, EXACT, False, PRECISION,
    )  # fmt: skip


@triton.jit
def mas_attention_flash(
    QKV, HEAD_SCALE, O,
    SCALE: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """MAS attention on packed QKV, any N.  Grid (ceil(N / BLOCK_M) B H,)."""
    mas_flash_forward(
        QKV, QKV + H * D, QKV + 2 * H * D, HEAD_SCALE, O, None, SCALE,
        3 * N * H * D, 3 * H * D, D, 3 * N * H * D, 3 * H * D, D, 3 * N * H * D, 3 * H * D, D, N * H * D, H * D, D,
        N, H, D, BLOCK_M, BLOCK_N, False, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_total"])
def moe_gate(
    X, W1, B1, W2, B2, EXPERT_SCALE, rows_total, Y,
    E: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Expert gate, without noise because engines do not train.  Grid (ceil(rows_total / BLOCK_T),)."""
    moe_forward(
        X, W1, B1, W2, B2, EXPERT_SCALE, None, Y, None, None, None, 0.0, rows_total, C, C,
        E, C, M, BLOCK_T, BLOCK_C, BLOCK_M, BLOCK_OUT, False, False, False, PRECISION,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ compiling


def unsupported(operator: str, shape: tuple[int, ...]) -> str | None:
    """Reason why there is no kernel for MASAttention (N, H, D) or MoEGate (E, M, C), or None if there is one."""
    if any(size < 1 for size in shape):
        return f"shape {shape} is not fixed; only the batch may vary"
    if operator == "MASAttention":
        return unsupported_head_dim(shape[2])
    if operator == "MoEGate":
        experts, hidden, channels = shape
        if experts > MAX_EXPERTS or hidden > MAX_HIDDEN or channels % 32:
            return (
                f"E={experts} M={hidden} C={channels}; kernels take E up to {MAX_EXPERTS}, M up to {MAX_HIDDEN} and "
                "multiples of 32 channels"
            )
    return None


def launches(operator: str, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> list[tuple[Launch, int]]:
    """Launches to compile, tuned values first, each with the number of rows that a block computes."""
    empty = lambda *size: torch.empty(*size, dtype=dtype, device="meta")
    precision = {"PRECISION": "tf32" if dtype == torch.float32 else "ieee"}
    made: list[tuple[Launch, int]] = []
    if operator == "MASAttention":
        n, heads, dim = shape
        args = (empty(2, n, 3, heads, dim), empty(heads), empty(2, n, heads, dim))
        common = {"SCALE": scale * LOG2E, "N": n, "H": heads, "D": dim, **precision}
        first = (
            launch_values.settings("mas_small_forward", args[0], D=dim, N=n)
            if n <= launch_values.SMALL
            else ({}, {"STREAM": 1})
        )
        if not first[1].get("STREAM"):
            block = max(16, triton.next_power_of_2(n))
            more = [{"num_warps": w, "num_stages": 1} for w in (4, 8, 2)]
            for options in _distinct([first[0], *more]):
                constants = {**common, "BLOCK": block, "EXACT": block == n}
                made.append((Launch(mas_attention_small, (1,), args, constants, options), 0))
        options, tiles = launch_values.settings("mas_flash_forward", args[0], D=dim)
        more = [{"BLOCK_M": m, "BLOCK_N": k, "num_warps": 4, "num_stages": 2} for m in (64, 32) for k in (64, 32)]
        for values in _distinct([{**options, **tiles}, *more]):
            constants = {**common, "BLOCK_M": values["BLOCK_M"], "BLOCK_N": values["BLOCK_N"]}
            made.append((Launch(mas_attention_flash, (1, 1), args, constants, _options(values)), values["BLOCK_M"]))
        return made
    experts, hidden, channels = shape
    small = [empty(experts, hidden), empty(experts, hidden), empty(experts), empty(experts)]
    rows: tuple[Any, ...] = (
        empty(4096, channels),
        empty(experts, hidden, channels),
        *small,
        4096,
        empty(4096, channels),
    )
    options, tiles = launch_values.settings("moe_forward", rows[0])
    more = [
        {"BLOCK_T": t, "BLOCK_C": 32, "BLOCK_OUT": 64, "num_warps": w, "num_stages": s}
        for t, w, s in ((64, 8, 2), (64, 4, 1), (32, 4, 2), (16, 4, 2))
    ]
    for values in _distinct([{**options, **tiles}, *more]):
        divides = lambda size: next(b for b in (size, 32) if channels % b == 0)
        constants = {"E": experts, "C": channels, "M": hidden, **precision, "BLOCK_T": values["BLOCK_T"],
                     "BLOCK_C": divides(values["BLOCK_C"]), "BLOCK_OUT": divides(values["BLOCK_OUT"]),
                     "BLOCK_M": max(16, triton.next_power_of_2(hidden))}  # fmt: skip
        made.append((Launch(moe_gate, (1,), rows, constants, _options(values)), values["BLOCK_T"]))
    return made


def _options(values: dict[str, int]) -> dict[str, int]:
    return {k: values[k] for k in launch_values.OPTIONS}


def _distinct(values: list[dict[str, int]]) -> list[dict[str, int]]:
    return [dict(items) for items in dict.fromkeys(tuple(sorted(v.items())) for v in values)]


def compile_images(
    operator: str, arch: int, dtype: torch.dtype, shape: tuple[int, ...], scale: float = 0.0
) -> list[Image]:
    """Compiles, in this process, up to TACTICS kernels for ``arch``, a compute capability x 10.

    MASAttention: shape (N, H, D) and the scale of its scores; MoEGate: shape (E, M, C).  Raises ValueError when there
    is no kernel, or none that an engine can hold.
    """
    reason = unsupported(operator, shape)
    if reason:
        raise ValueError(f"dtn::{operator}: {reason}; use --attention native")
    images, refused = [], []
    with compile_check.target(arch):
        for launch, rows in launches(operator, shape, scale, dtype):
            options = {**launch.options, "ptx_version": PTX_VERSION}
            compiled = launch._replace(options=options).compile()
            why = refusal(compiled)
            if why:
                refused.append(why)
                continue
            values = {**launch.options, **{k: v for k, v in launch.constants.items() if k.startswith("BLOCK")}}
            ptx = strip_scratch(compiled.asm["ptx"], len(launch.args))
            threads = 32 * compiled.metadata.num_warps
            images.append(Image(compiled.metadata.name, ptx, threads, compiled.metadata.shared, rows, values))
            if len(images) == TACTICS:
                break
    if not images:
        raise ValueError(f"dtn::{operator} {shape} on sm_{arch}: no kernel fits an engine ({'; '.join(refused)})")
    return images


def refusal(compiled: Any) -> str | None:
    """Reason why TensorRT cannot launch this kernel, or None if it can."""
    meta = compiled.metadata
    if meta.shared > SHARED:
        return f"{meta.shared} bytes of shared memory"
    if getattr(meta, "global_scratch_size", 0) or getattr(meta, "profile_scratch_size", 0):
        return "needs scratch memory"
    if meta.num_ctas > 1:
        return "needs a cluster"
    if getattr(meta, "launch_cooperative_grid", False):
        return "needs a cooperative launch"
    if getattr(meta, "tensordesc_meta", None):
        return "needs tensor descriptors"
    return None


def strip_scratch(ptx: str, parameters: int) -> str:
    """PTX whose entry keeps only its first ``parameters`` parameters.  Raises ValueError if the body reads another."""
    entry = re.search(r"(\.visible \.entry \w+\()(.*?)\n\)", ptx, re.DOTALL)
    if entry is None:
        raise ValueError("the compiled kernel has no entry; this version of Triton writes PTX in another form")
    listed = [line.strip().rstrip(",") for line in entry[2].strip().splitlines()]
    if len(listed) < parameters:
        raise ValueError(f"the compiled kernel takes {len(listed)} parameters, {parameters} were expected")
    body = ptx[entry.end() :]
    for line in listed[parameters:]:
        if line.split()[-1] in body:
            raise ValueError(f"the compiled kernel reads {line.split()[-1]}, which TensorRT does not pass")
    return ptx[: entry.start(2)] + "\n\t" + ",\n\t".join(listed[:parameters]) + ptx[entry.end(2) :]


@functools.lru_cache
def images_of(operator: str, arch: int, dtype: str, shape: tuple[int, ...], scale: float = 0.0) -> tuple[Image, ...]:
    """Runs :func:`compile_images` in a separate process and caches the result."""
    command = [sys.executable, "-m", "dtn_fast.export.tensorrt_plugin", operator, "--arch", str(arch), "--dtype", dtype,
               "--scale", repr(scale), "--json", "--shape", *map(str, shape)]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"the compiler ended with {done.returncode}"])[-1])
    return tuple(Image(**row) for row in json.loads(done.stdout))


# ------------------------------------------------------------------------------------------------ registration

_registered: set[str] = set()


def target_arch() -> int:
    """Compute capability x 10 that plugins are compiled for: ``launch_values.target`` if set, else that of the GPU."""
    if launch_values.target is not None:
        return launch_values.target
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def register(trt: Any) -> None:
    """Registers both plugins with ``trt`` (the module tensorrt, 10.13 or newer), once a process."""
    if trt.__name__ in _registered:
        return
    offers = _Offers(trt)
    _register_attention(offers)
    _register_gate(offers)
    _registered.add(trt.__name__)


class _Offers:
    """The compiled kernels in the words of TensorRT's plugin interface."""

    def __init__(self, trt: Any) -> None:
        self.trtp = importlib.import_module(f"{trt.__name__}.plugin")
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
        self._dtypes = {getattr(trt.DataType, names[dtype]): dtype for dtype in DTYPES}

    def attention(self, qkv: Any, scale: float) -> tuple[Image, ...]:
        _, n, _, heads, dim = qkv.shape
        return images_of("MASAttention", target_arch(), self._dtypes[qkv.dtype], (n, heads, dim), float(scale))

    def gate(self, x: Any, w1: Any) -> tuple[Image, ...]:
        return images_of("MoEGate", target_arch(), self._dtypes[x.dtype], tuple(w1.shape))

    def tactics(self, images: tuple[Image, ...], dtype: Any, count: int) -> list[Any]:
        """A tactic for each image, for ``count`` inputs and outputs of one dtype."""
        kinds = ", ".join([DTYPES[self._dtypes[dtype]]] * count)
        return [self.trtp.AutoTuneCombination(kinds, "LINEAR", range(1, len(images) + 1))]

    def kernel(self, image: Image, programs: Any, extra: tuple[Any, ...]) -> Any:
        """An image with its number of programs and the integers that it takes after its inputs."""
        params = self.trtp.KernelLaunchParams(grid_x=programs, block_x=image.threads, shared_mem=image.shared)
        numbers = self.trtp.SymIntExprs(len(extra))
        for position, value in enumerate(extra):
            numbers[position] = self.trtp.SymInt32(value)
        return image.kernel, image.ptx, params, numbers


def _register_attention(offers: _Offers) -> None:
    trtp = offers.trtp
    Desc = trtp.TensorDesc
    Kernel = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

    @trtp.register("dtn::MASAttention")
    def mas_desc(qkv: Desc, head_scale: Desc, scale: float) -> Desc:
        s = qkv.shape_expr
        return trtp.from_shape_expr((s[0], s[1], s[3], s[4]), qkv.dtype)

    @trtp.autotune("dtn::MASAttention")
    def mas_autotune(qkv: Desc, head_scale: Desc, scale: float, outputs: tuple[Desc]) -> list[trtp.AutoTuneCombination]:
        return offers.tactics(offers.attention(qkv, scale), qkv.dtype, 3)

    @trtp.aot_impl("dtn::MASAttention")
    def mas_kernel(qkv: Desc, head_scale: Desc, scale: float, outputs: tuple[Desc], tactic: int) -> Kernel:
        image = offers.attention(qkv, scale)[max(tactic - 1, 0)]
        pairs = qkv.shape_expr[0] * qkv.shape[3]
        return offers.kernel(image, pairs * -(-qkv.shape[1] // image.rows) if image.rows else pairs, ())


def _register_gate(offers: _Offers) -> None:
    trtp = offers.trtp
    Desc = trtp.TensorDesc
    Kernel = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]

    @trtp.register("dtn::MoEGate")
    def moe_desc(x: Desc, w1: Desc, b1: Desc, w2: Desc, b2: Desc, expert_scale: Desc) -> Desc:
        return x.like()

    @trtp.autotune("dtn::MoEGate")
    def moe_autotune(
        x: Desc, w1: Desc, b1: Desc, w2: Desc, b2: Desc, expert_scale: Desc, outputs: tuple[Desc]
    ) -> list[trtp.AutoTuneCombination]:
        return offers.tactics(offers.gate(x, w1), x.dtype, 7)

    @trtp.aot_impl("dtn::MoEGate")
    def moe_kernel(
        x: Desc, w1: Desc, b1: Desc, w2: Desc, b2: Desc, expert_scale: Desc, outputs: tuple[Desc], tactic: int
    ) -> Kernel:
        image = offers.gate(x, w1)[max(tactic - 1, 0)]
        rows = x.shape_expr[0] * x.shape_expr[1]
        return offers.kernel(image, trtp.cdiv(rows, image.rows), (rows,))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dtn_fast.export.tensorrt_plugin",
        description="Compile the kernels that an engine would hold, without a GPU, and list its tactics.",
        epilog="Example: python -m dtn_fast.export.tensorrt_plugin MoEGate --arch 89 --dtype float16 --shape 2 128 512",
    )
    parser.add_argument("operator", choices=("MASAttention", "MoEGate"))
    parser.add_argument("--arch", type=int, choices=sorted(compile_check.SHARED_LIMIT), default=90,
                        help="compute capability x 10")  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="dtype of inputs and outputs")
    parser.add_argument("--shape", type=int, nargs=3, required=True, help="MASAttention: N H D; MoEGate: E M C")
    parser.add_argument("--scale", type=float, default=0.0, help="scale of the attention scores; default: 1 / sqrt(D)")
    parser.add_argument("--json", action="store_true", help="print JSON, with the PTX, instead of a list")
    options = parser.parse_args(arguments)
    shape = tuple(options.shape)
    try:
        images = compile_images(
            options.operator, options.arch, getattr(torch, options.dtype), shape, options.scale or shape[2] ** -0.5
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([image._asdict() for image in images]))
        return 0
    for number, image in enumerate(images, 1):
        serves = f"{image.rows} rows" if image.rows else "a (batch, head)"
        print(f"tactic {number}: {image.kernel}, {image.threads} threads, {image.shared / 1024:.1f} KiB, a block "
              f"computes {serves}, {image.values}, {len(image.ptx):,} bytes of PTX")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
