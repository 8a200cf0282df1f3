"""Timing of contenders: in turns, as medians with quartiles, with errors and rates of work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dtn_fast.cuda_graph import capture, warm_up
from dtn_fast.timing import in_turns

FLUSH = 256 * 2**20
"""Bytes written between calls so that the next finds a cold L2 (an H200 has 50 MiB)."""


@dataclass(frozen=True)
class Case:
    """A benchmark case: contenders for the same work, and the amount of that work."""

    suite: str
    title: str
    contenders: Mapping[str, Callable[[], Any]]
    ours: str
    """This project's own contender."""
    baseline: str
    """The contender that ratios are relative to."""
    images: int = 0
    """Images (or frames) per call; 0 if there are none."""
    flops: float = 0.0
    bytes: float = 0.0
    """Least bytes moved to and from memory; 0 if unknown."""
    lower_bound: float = 0.0
    """Least seconds per call by this machine's roofline; 0 if unknown."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Largest error of each contender's result, checked before anything is timed."""
    notes: tuple[str, ...] = ()
    rounds: int = 9
    tail: bool = False
    """Whether to report the 99th percentile too, for latency."""
    cold: bool = False
    """Whether to flush the L2 cache between calls (GPU only)."""


@dataclass(frozen=True)
class Measurement:
    """Measured values of one contender; a row of a results file."""

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
    """Speed relative to the case's baseline."""
    images_per_second: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    """Least bytes divided by the time, GB/s."""
    share: float | None = None
    """Lower bound divided by the time."""
    error: float | None = None
    ours: bool = False
    p99: float | None = None
    """99th percentile of the calls, seconds; with few calls the slowest."""
    peak_mib: float | None = None
    """Peak GPU memory during the call, MiB."""


def measure(case: Case, rounds: int | None = None) -> list[Measurement]:
    """Times every contender of ``case``: once to warm up, then ``rounds`` times in turns."""
    peaks: dict[str, float] = {}
    gpu = torch.cuda.is_available()
    for name, call in case.contenders.items():  # the warm-up
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        call()
        if gpu:
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    before = flush if gpu and case.cold else lambda: None
    times = in_turns(case.contenders, rounds or case.rounds, 0, before)
    base = statistics.median(times[case.baseline])
    return [_row(case, name, values, base, peaks.get(name)) for name, values in times.items()]


def _row(case: Case, name: str, times: list[float], base: float, peak: float | None) -> Measurement:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Measurement(
        case.suite, case.title, name, median, low, high, base / median,
        images_per_second=case.images / median if case.images else None,
        tflops=case.flops / median / 1e12 if case.flops else None,
        gbytes=case.bytes / median / 1e9 if case.bytes else None,
        share=case.lower_bound / median if case.lower_bound else None,
        error=case.errors.get(name), ours=name == case.ours, peak_mib=peak,
        p99=sorted(times)[math.ceil(0.99 * len(times)) - 1] if case.tail else None,
    )  # fmt: skip


def flush() -> None:
    """Fills the L2 cache with other data."""
    torch.empty(FLUSH, dtype=torch.uint8, device="cuda").zero_()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as the replay of a CUDA graph, to time small shapes without launch cost; on a CPU ``call`` itself."""
    if not torch.cuda.is_available():
        return call
    warm_up(call)
    replay, result = capture(call)
    kept = (call, result)  # keeps the tensors alive that the graph reads and writes

    def run() -> Any:
        replay()
        return kept[1]

    return run


def lines(rows: list[Measurement]) -> Iterator[str]:
    """Measurements of one case as aligned lines of text."""
    for row in rows:
        parts = [f"{row.contender:44s} {seconds(row.median):>9s} ({seconds(row.low)} - {seconds(row.high)})"]
        parts += [f"p99 {seconds(row.p99)}"] if row.p99 else []
        parts.append(f"{row.ratio:5.2f}x")
        parts += [f"{row.images_per_second:,.0f} images/s"] if row.images_per_second else []
        parts += [f"{row.tflops:.2f} TFLOP/s"] if row.tflops else []
        parts += [f"{row.gbytes:,.1f} GB/s"] if row.gbytes else []
        parts += [f"{row.share:.0%} of the lower bound"] if row.share else []
        parts += [f"error {row.error:.1e}"] if row.error is not None else []
        parts += [f"peak {row.peak_mib:,.0f} MiB"] if row.peak_mib else []
        yield "  ".join(parts) + ("  *" if row.ours else "")


def seconds(value: float) -> str:
    """``value`` in seconds as text in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2g} us"
