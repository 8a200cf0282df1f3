"""This machine's name and measured ceilings of arithmetic and memory."""

from __future__ import annotations

import functools
import operator
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch

from dtn_fast.device import cpu_name
from dtn_fast.timing import seconds_of


class Machine(NamedTuple):
    name: str
    flops: float
    """FLOP/s of a large matrix product, measured."""
    bandwidth: float
    """Bytes/s (read and written) of a large copy, measured."""
    dtype: str
    datasheet: tuple[float, float] | None = None
    """The vendor's (FLOP/s without sparsity, bytes/s)."""

    def ceilings(self) -> str:
        text = f"{self.flops / 1e12:.2f} TFLOP/s {self.dtype}, {self.bandwidth / 1e9:,.0f} GB/s"
        if self.datasheet:
            shares = self.flops / self.datasheet[0], self.bandwidth / self.datasheet[1]
            text += f" ({shares[0]:.0%} and {shares[1]:.0%} of the data sheet)"
        return f"{self.name}: {text}"


DATASHEETS = {"NVIDIA H200": (989e12, 4.8e12), "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
              "NVIDIA H100 PCIe": (756e12, 2.0e12), "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12)}  # fmt: skip
"""bf16 tensor-core peak and memory bandwidth, from the vendor's data sheets."""


def measure_machine(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Machine:
    """Measures this machine's ceilings: the best of several large products and copies."""
    gpu = device.type == "cuda"
    side = 8192 if gpu and not quick else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = best_seconds(lambda: a @ b, device)
    source = torch.empty((2**30 if gpu and not quick else 2**26), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name(device) if gpu else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return Machine(
        name, 2 * side**3 / product, 2 * source.numel() / copy, str(dtype).removeprefix("torch."), DATASHEETS.get(name)
    )


def best_seconds(call: Callable[[], object], device: torch.device, rounds: int = 12) -> float:
    """Least seconds of ``call``; on a GPU in tens, so that the host's work for one call hides behind another."""
    calls = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(rounds):
        times.append(seconds_of(lambda: [call() for _ in range(calls)]) / calls)
    return min(times)


class Clocks:
    """Samples of the GPU's clock, power and temperature by nvidia-smi while a suite runs; nothing without a GPU."""

    FIELDS = "utilization.gpu,clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
    IDLE = 0x1
    """Bit of the last field that is no reason for a lower clock."""

    def __enter__(self) -> Clocks:
        self.file = tempfile.TemporaryFile("w+")
        tool = shutil.which("nvidia-smi") if torch.cuda.is_available() else None
        command = [str(tool), f"--query-gpu={self.FIELDS}", "--format=csv,noheader,nounits", "--loop-ms=250"]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL) if tool else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.file.close()

    def __str__(self) -> str:
        """Ranges over the samples in which the GPU worked; empty where there are none."""
        file = self.file.fileno()  # nvidia-smi shares its place, from where it writes on: reading must not move it
        text = os.pread(file, os.fstat(file).st_size, 0).decode()
        rows = [line.split(", ") for line in text.splitlines()]
        try:
            busy = [[float(cell) for cell in row[:4]] + [int(row[4], 16)] for row in rows if float(row[0]) >= 50]
        except (ValueError, IndexError):
            return "unreadable"
        if not busy:
            return ""
        clocks, power, heat = ([row[place] for row in busy] for place in (1, 2, 3))
        slowed = functools.reduce(operator.or_, (row[4] for row in busy)) & ~self.IDLE
        text = f"SM {min(clocks):.0f} to {max(clocks):.0f} MHz, at most {max(power):.0f} W and {max(heat):.0f} C"
        return text + (f", slowed down (event reasons 0x{slowed:x})" if slowed else "")
