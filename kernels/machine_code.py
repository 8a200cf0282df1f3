"""Counts of what a compiled kernel executes, read from its machine code, and the least time that this takes on a GPU.

nvdisasm lists the instructions of a program; loops are weighted by their trips, which Triton's own code states, in the
same order.  A kernel takes at least as long as the slowest of these: all its instructions through the schedulers, four
a clock; those of each pipe through that pipe (lanes from the CUDA Programming Guide, "Arithmetic Instructions"); its
products through the tensor cores, and their tiles out of the second-level cache; each tensor argument once through
memory; the loads in flight, each waiting for memory (Little's law).  These are predictions: nothing here was timed.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from dtn_fast.kernels import compile_check
from dtn_fast.kernels.launch import Launch


class Machine(NamedTuple):
    """A GPU as the prediction sees it."""

    name: str
    processors: int
    clock: float
    """Hz under load (assumed, as all that follows but H200's bandwidth)."""
    bandwidth: float
    """Bytes/s of a copy, read and written."""
    tensor: float
    """FLOP/s of 16-bit products that libraries reach."""
    latency: float
    """Seconds that a load from memory takes under load."""
    cache: float
    """Bytes/s between the multiprocessors and the second-level cache."""
    fp32: int
    """Lanes a clock and multiprocessor of float32 arithmetic."""


MACHINES = {
    80: Machine("A100", 108, 1.41e9, 1.75e12, 2.6e14, 6e-7, 4.0e12, 64),
    90: Machine("H200", 132, 1.75e9, 4.3e12, 7.9e14, 7e-7, 5.5e12, 128),
    100: Machine("B200", 148, 1.85e9, 7.0e12, 1.6e15, 8e-7, 9.0e12, 128),
}
"""GPUs for which times are predicted, by compute capability x 10."""
BATCH = 256
"""Images of a training batch for which times are predicted."""
LANES = {"special": 16, "integer": 64, "shared": 32}
"""Lanes a clock and multiprocessor of the pipes that are alike on all of them; float32 arithmetic differs."""
_SPECIAL = re.compile(r"MUFU|I2F(?!P)|F2I|F2F\.F64|POPC|FLO|BREV")
_FLOAT = re.compile(r"F(ADD|MUL|FMA|CHK|SWZADD)|HADD|HMUL|HFMA")
_INTEGER = re.compile(r"I(MAD|ADD|SETP|MNMX|ABS|DP)|F(SEL|SETP|MNMX)|[FI]2FP|LOP|SHF|LEA|SEL|PRMT|VIADD|PLOP|SGXT|BMSK")
_SHARED = re.compile(r"LDS|STS|ATOMS|SHFL|LDG|STG|LD\b|ST\b")


class Work(NamedTuple):
    """Work of one program of a kernel, in warp instructions executed by all its warps."""

    instructions: float
    special: float
    """Special functions and slow conversions."""
    float32: float
    integer: float
    shared: float
    """Shared and global memory instructions, and shuffles."""
    flops: float
    """Floating-point operations of the products."""
    loaded: float
    """Bytes of global loads, those that a cache serves included."""
    stored: float
    """Bytes of global stores."""
    in_flight: float
    """Bytes of loads that a program has under way at once."""


class Prediction(NamedTuple):
    """Least time of one launch on one GPU."""

    arch: int
    kernel: str
    programs: int
    resident: int
    """Programs that fit on a multiprocessor."""
    bytes: int
    """Size of all tensor arguments."""
    per_element: float
    """Instructions (of a lane) for each element of the largest tensor argument."""
    limit: str
    """The slowest resource."""
    seconds: float
    floor: float
    """Seconds that memory alone needs."""


def count(compiled: Any, launch: Launch) -> Work:
    """Counts the work of one program of ``launch``.  Raises ValueError when loops cannot be told apart."""
    code = disassemble(compiled.asm["cubin"])
    loops = _loops(code)
    trips, flops = _trips(compiled.asm["ttir"], launch)
    while len(trips) > len(loops):  # the compiler unrolls the shortest
        trips.remove(min(trips))
    if len(loops) > len(trips):
        raise ValueError(f"{launch.name}: {len(loops)} loops in the machine code, {len(trips)} in Triton's")
    warps, ahead = launch.options["num_warps"], launch.options["num_stages"] - 1
    kinds = {"special": _SPECIAL, "float32": _FLOAT, "integer": _INTEGER, "shared": _SHARED}
    sums = dict.fromkeys(kinds, 0.0)
    tiles, _ = _described(compiled.asm["ttir"], launch)
    moved = {"LDG": tiles * max([1.0, *trips]), "STG": 0.0}
    total = 0.0
    for place, (name, _) in enumerate(code):
        around = [times for (first, last), times in zip(loops, trips, strict=True) if first <= place <= last]
        times = math.prod(around)
        total += times
        if kind := next((kind for kind, pattern in kinds.items() if pattern.match(name)), None):
            sums[kind] += times
        if name.startswith("LDGSTS"):  # a pipelined loop's last copies ahead are masked out
            times = math.prod(max(each - ahead, 0) for each in around)
        if name[:3] in moved:
            moved[name[:3]] += times * _width(name) * warps * 32
    return Work(
        total * warps, *(sums[kind] * warps for kind in kinds), flops, moved["LDG"], moved["STG"],
        _in_flight(code, loops, compiled.asm["ttir"], launch),
    )  # fmt: skip


def predict(launch: Launch, compiled: Any, arch: int, resident: int) -> Prediction:
    """Least time of ``launch`` on the GPU of ``arch``; resident: programs that fit on a multiprocessor."""
    machine, work = MACHINES[arch], count(compiled, launch)
    programs = math.prod(launch.grid)
    given = [t for t in (getattr(a, "base", a) for a in launch.args) if isinstance(t, torch.Tensor)]
    tensors = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in given}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    share = -(-programs // machine.processors) / machine.clock  # programs of the busiest multiprocessor, a clock
    lanes = {**LANES, "float32": machine.fp32}
    parts = {"issue": work.instructions / 4 * share}
    parts |= {pipe: getattr(work, pipe) * 32 / width * share for pipe, width in lanes.items()}
    if work.flops:  # tiles of a product pass the first-level cache once; other kernels' loads often hit it
        parts["tensor cores"] = work.flops * programs / machine.tensor
        parts["cache"] = (work.loaded + work.stored) * programs / machine.cache
    parts["memory"] = moved / machine.bandwidth
    busy = min(resident, -(-programs // machine.processors)) * machine.processors
    reads = work.loaded / (work.loaded + work.stored)
    parts["latency"] = moved * reads * machine.latency / (busy * max(work.in_flight, 1))
    limit = max(parts, key=lambda k: parts[k])
    per_element = work.instructions * 32 * programs / max(t.numel() for t in tensors.values())
    return Prediction(arch, launch.name, programs, resident, moved, per_element, limit, parts[limit], parts["memory"])


def predictions(archs: tuple[int, ...] = tuple(MACHINES), batch: int = BATCH) -> list[tuple[str, Prediction]]:
    """Kernels of the paper's model in bfloat16 training on ``batch`` images, each with its operator's name."""
    half, found = torch.bfloat16, list[tuple[str, Prediction]]()
    operators = {
        "MAS attention": lambda: compile_check.mas_launches(64, 64, half, batch),
        "expert gate": lambda: compile_check.moe_launches(2, 128, 512, 0.1, half, batch),
        "BN + ReLU + pool, 32x256x256": lambda: compile_check.bn_launches(32, 256, True, half, batch),
        "BN + ReLU, 512x16x16": lambda: compile_check.bn_launches(512, 16, False, half, batch),
        "local connection": lambda: compile_check.lc_launches(512, 8, half, batch),
    }
    for arch in archs:
        for operator, launches in operators.items():
            with compile_check.target(arch):
                for launch in launches():
                    row = compile_check.inspect(launch, arch, operator, half)
                    found.append((operator, predict(launch, launch.compile(), arch, row.resident())))
    return found


def disassemble(cubin: bytes) -> list[tuple[str, str]]:
    """The instructions of a compiled kernel in order, as (name, operands).  A branch's operands hold its
    target's place; a conditional one's name ends in a question mark."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            conditional = found[2].startswith("BRA") and (found[1] or "UP" in found[3])
            code.append((found[2] + "?" * bool(conditional), found[3]))
    return [(n, re.sub(r"`\((\.L_x_\d+)\)", lambda m: f"@{labels[m[1]]}", o)) for n, o in code]


def _loops(code: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """First and last instruction of every loop, in order, but those that only wait."""
    found = []
    for place, (name, operands) in enumerate(code):
        target = re.search(r"@(\d+)", operands)
        if not name.startswith("BRA") or not target or int(target[1]) >= place:
            continue
        body = [n for n, _ in code[int(target[1]) : place]]
        # Blackwell waits in short loops, some behind the program's end, from where it jumps back
        waits = body[-8:] if name.endswith("?") else body[-2:]
        if (len(body) > 8 and name.endswith("?")) or not any(n.startswith(("SYNCS", "NANOSLEEP")) for n in waits):
            found.append((int(target[1]), place))
    return sorted(found)


def _trips(ttir: str, launch: Launch) -> tuple[list[float], float]:
    """Trips of every loop that turns more than once, and the floating-point operations of all products."""
    values: dict[str, int] = {}
    trips: list[float] = []
    stack: list[tuple[int, float]] = []  # indentation and trips of the loops around a line
    flops = 0.0
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        while stack and indent <= stack[-1][0] and line.strip().startswith("}"):
            stack.pop()
        if constant := re.match(r"\s*(%\S+) = arith\.constant (-?\d+) : i\d+", line):
            values[constant[1]] = int(constant[2])
        if loop := re.search(r"scf\.for \S+ = (\S+) to (\S+) step (\S+)", line):
            bounds = [values[b] for b in loop.groups() if b in values]
            if len(bounds) == 3:
                times = -(-(bounds[1] - bounds[0]) // bounds[2])
            else:  # a persistent kernel's, over its tiles
                times = -(-given["tiles"] // given["programs"])
            stack.append((indent, times))
            if times > 1:
                trips.append(times)
        if product := re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line):
            size = 2.0
            for factor in (*map(int, product.groups()), *(t for _, t in stack)):
                size *= factor
            flops += size
    return trips, flops


def _in_flight(code: list[tuple[str, str]], loops: list[tuple[int, int]], ttir: str, launch: Launch) -> float:
    """Bytes of a program's loads that are under way at once: those issued before the first use of one of them, or the
    tiles that a pipelined loop copies ahead."""
    lanes = launch.options["num_warps"] * 32
    most = now = 0
    waiting: set[int] = set()
    copies = dict.fromkeys(loops, 0)
    outside = 0
    for place, (name, operands) in enumerate(code):
        width = _width(name)
        if name.startswith("LDGSTS"):
            around = [loop for loop in loops if loop[0] <= place <= loop[1]]
            if around:
                copies[around[-1]] += width
            else:
                outside += width
            continue
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        load = name.startswith("LDG")
        if waiting.intersection(registers[1:] if load else registers):
            most, now, waiting = max(most, now), 0, set()
        if load and registers:
            now += width
            waiting.update(range(registers[0], registers[0] + width // 4))
    tiles, ahead = _described(ttir, launch)
    copied = max([*copies.values(), 0]) * ahead or outside
    return max(most * lanes, now * lanes, copied * lanes, tiles * ahead)


def _width(name: str) -> int:
    """Bytes that a lane's load or store moves."""
    return next((int(bits) // 8 for bits in re.findall(r"\.[US]?(128|64|16|8)\b", name)), 4)


def _described(ttir: str, launch: Launch) -> tuple[int, int]:
    """Bytes of the tiles that tensor descriptors load in one trip, and the number of trips that a loop loads ahead."""
    tiles = re.findall(r"tt\.descriptor_load .*-> tensor<([\dx]+)x[a-z]+(\d+)>", ttir)
    size = sum(math.prod(map(int, shape.split("x"))) * int(bits) // 8 for shape, bits in tiles)
    return size, max(launch.constants.get("STAGES", launch.options["num_stages"]) - 1, 1)
