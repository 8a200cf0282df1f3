"""How this project times: contenders in turns, medians with quartiles, correctness first, work beside each figure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FLUSH = 256 * 2**20
"""Bytes written between calls so that the next finds a cold L2 (an H200 has 50 MiB)."""


@dataclass(frozen=True)
class Case:
    """Contenders for the same work, and what that work is."""

    suite: str
    title: str
    contenders: Mapping[str, Callable[[], Any]]
    ours: str
    """This project's own contender."""
    baseline: str
    """The contender that ratios are taken to."""
    images: int = 0
    """Images (or frames) per call; 0 where the work has none."""
    flops: float = 0.0
    bytes: float = 0.0
    """Least bytes moved to and from memory; 0 where unknown."""
    floor: float = 0.0
    """Least seconds per call by the roofline of the machine at hand; 0 where unknown."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Per contender, the largest error of its answer, checked before anything is timed."""
    notes: tuple[str, ...] = ()
    rounds: int = 9
    tail: bool = False
    """Also give the 99th percentile: latency that somebody waits for."""
    cold: bool = False
    """Flush the L2 between calls (GPU only)."""


@dataclass(frozen=True)
class Row:
    """One contender's figures; what results files hold."""

    suite: str
    case: str
    contender: str
    median: float
    """Seconds per call."""
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    ratio: float
    """Times the speed of the case's baseline."""
    images_per_second: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    """Least bytes over the time, GB/s."""
    share: float | None = None
    """Floor over the time."""
    error: float | None = None
    ours: bool = False
    p99: float | None = None
    """99th percentile of the calls, seconds; of few calls the slowest."""
    peak_mib: float | None = None
    """Largest memory that the call took on the GPU, MiB."""


def measure(case: Case, rounds: int | None = None) -> list[Row]:
    """Times every contender of ``case``: once to warm up, then ``rounds`` times in turns."""
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    peaks: dict[str, float] = {}
    for turn in range((rounds or case.rounds) + 1):
        for name, call in case.contenders.items():
            if turn == 0 and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = _time(call, case.cold)
            if turn:
                times[name].append(seconds)
            elif torch.cuda.is_available():
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    base = statistics.median(times[case.baseline])
    return [_row(case, name, values, base, peaks.get(name)) for name, values in times.items()]


def _row(case: Case, name: str, times: list[float], base: float, peak: float | None) -> Row:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Row(
        case.suite, case.title, name, median, low, high, base / median,
        images_per_second=case.images / median if case.images else None,
        tflops=case.flops / median / 1e12 if case.flops else None,
        gbytes=case.bytes / median / 1e9 if case.bytes else None,
        share=case.floor / median if case.floor else None,
        error=case.errors.get(name), ours=name == case.ours, peak_mib=peak,
        p99=sorted(times)[math.ceil(0.99 * len(times)) - 1] if case.tail else None,
    )  # fmt: skip


def _time(call: Callable[[], Any], cold: bool) -> float:
    """Seconds of one call; on a GPU between events on the stream, so that launches overlap as in use."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    if cold:
        torch.empty(FLUSH, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph's replay: what small shapes cost without launching; on a CPU ``call`` itself."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def lines(rows: list[Row]) -> Iterator[str]:
    """The figures of one case as aligned text."""
    for row in rows:
        parts = [f"{row.contender:44s} {seconds(row.median):>9s} ({seconds(row.low)} - {seconds(row.high)})"]
        parts += [f"p99 {seconds(row.p99)}"] if row.p99 else []
        parts.append(f"{row.ratio:5.2f}x")
        parts += [f"{row.images_per_second:,.0f} images/s"] if row.images_per_second else []
        parts += [f"{row.tflops:.2f} TFLOP/s"] if row.tflops else []
        parts += [f"{row.gbytes:,.1f} GB/s"] if row.gbytes else []
        parts += [f"{row.share:.0%} of the floor"] if row.share else []
        parts += [f"error {row.error:.1e}"] if row.error is not None else []
        parts += [f"peak {row.peak_mib:,.0f} MiB"] if row.peak_mib else []
        yield "  ".join(parts) + ("  *" if row.ours else "")


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2g} us"
