"""Choice of the device, of a number format that it supports, and of the number of threads on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
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


def choose_threads(requested: int, root: Path = Path("/")) -> int:
    """Number of threads for work on the CPU: ``requested``, or for 0 one per core that this process may use, within
    the CPU quota of its container (cgroup v1 or v2, whole CPUs) and OMP_NUM_THREADS.

    root: folder that holds proc/ and sys/.  Raises UsageError when more are requested than that allows.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    limits = {"the CPU set of this process": len(usable)}
    if (quota := _cpu_quota(root)) is not None:
        limits["the CPU quota of this container"] = max(int(quota), 1)
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of a list, one per nested level
    if first.isdecimal() and int(first):
        limits["OMP_NUM_THREADS"] = int(first)
    reason = min(limits, key=lambda name: limits[name])
    if requested > limits[reason]:
        raise UsageError(f"--threads {requested}: {reason} allows {limits[reason]}; give fewer, or leave it out")
    return requested or min(limits[reason], _cores(usable, root))


def _cores(cpus: set[int], root: Path) -> int:
    """Number of cores that ``cpus`` belong to; several CPUs of one core compute no faster than one."""
    files = [root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus]
    try:
        return len({file.read_text(encoding="utf-8") for file in files})
    except OSError:  # not Linux
        return len(cpus)


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control groups of this process grant, the least of its group and those above; None: any number."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):  # a container may see its own as the top
            where = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / folder.relative_to("/")
            try:
                quota, period = " ".join((where / file).read_text(encoding="utf-8") for file in files).split()
                found += [int(quota) / int(period)] if int(quota) > 0 else []
            except (OSError, ValueError):  # no such group here, or "max": no quota
                continue
    return min(found, default=None)


def cpu_name() -> str:
    """The processor's name; "CPU" if the system does not give it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


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
