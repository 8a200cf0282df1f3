"""Crops per second and latency of a model on Triton Inference Server, by batch and concurrency: ``dtn-fast bench
server``.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dtn_fast.bench.results import environment, write_json
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.config import parse_config
from dtn_fast.ranges import positive
from dtn_fast.runtime.triton_server import Address, Connection, Unreachable, parse_address


class Point(NamedTuple):
    """Measurement at one batch size and concurrency."""

    batch: int
    """Number of crops in a request."""
    concurrency: int
    """Number of requests under way at a time."""
    crops_per_second: float
    p50: float
    """Milliseconds that half the requests stay under, seen by the client; p95 and p99 alike."""
    p95: float
    p99: float
    queue: float
    """Share of its time on the server that a request waits for others or for the model."""
    compute: float
    """Share of its time on the server that a request spends in the model."""
    crops_per_execution: float
    """Number of crops that the server's dynamic batching runs together, on average."""


HEADER = "batch  at a time   crops/s    p50 ms    p95 ms    p99 ms  queue  compute  crops a run"


def row(point: Point) -> str:
    return (f"{point.batch:5d}  {point.concurrency:9d}  {point.crops_per_second:8.1f}  {point.p50:8.1f}  "
            f"{point.p95:8.1f}  {point.p99:8.1f}  {point.queue:5.0%}  {point.compute:7.0%}  "
            f"{point.crops_per_execution:11.1f}")  # fmt: skip


def sweep(address: Address, batches: list[int], concurrency: list[int], seconds: float) -> Iterator[Point]:
    """Measures the model at every batch size and concurrency for ``seconds`` each.

    Raises UsageError when there is no such model or it takes smaller batches, DtnError when a request fails.
    """
    try:
        connection = Connection(address)
        served = connection.describe()
        if max(batches) > served.batch:
            raise UsageError(f"--batches {max(batches)}: {address} takes at most {served.batch} crops a request")
        side = parse_config(served.parameters["dtn_config"], str(address)).image_size
        for batch in batches:
            crops = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
            for count in concurrency:
                yield _measure(connection, crops, count, seconds)
    except Unreachable as error:
        raise DtnError(f"{address.server}: cannot be reached ({error}); start the server") from error


def _measure(connection: Connection, crops: np.ndarray, concurrency: int, seconds: float) -> Point:
    together = threading.Barrier(concurrency + 1)

    def work() -> list[tuple[float, float]]:
        """Starts and ends of the requests of one client."""
        try:
            own, times = Connection(connection.address), list[tuple[float, float]]()
            own.infer(crops, ["logits"])
            together.wait()  # all have connected: the server's counts are read
            together.wait()
        except Exception:
            together.abort()
            raise
        until = time.perf_counter() + seconds
        while not times or times[-1][1] < until:
            start = time.perf_counter()
            own.infer(crops, ["logits"])
            times.append((start, time.perf_counter()))
        return times

    with ThreadPoolExecutor(concurrency) as pool:
        clients = [pool.submit(work) for _ in range(concurrency)]
        try:
            together.wait()
            before = connection.statistics()
            together.wait()
        except threading.BrokenBarrierError:
            pass  # the client's own error is raised below
        failed = [error for client in clients if (error := client.exception()) is not None]
        for error in failed:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        times = [pair for client in clients for pair in client.result()]
    spent = {name: value - before[name] for name, value in connection.statistics().items()}
    elapsed = max(end for _, end in times) - min(start for start, _ in times)
    p50, p95, p99 = np.percentile([1e3 * (end - start) for start, end in times], (50, 95, 99)).tolist()
    queue, compute = (spent[name] / max(spent["total"], 1) for name in ("queue", "compute"))
    return Point(len(crops), concurrency, len(times) * len(crops) / elapsed, p50, p95, p99, queue, compute,
                 spent["crops"] / max(spent["executions"], 1))  # fmt: skip


def best(points: list[Point], max_ms: float) -> str:
    """The point of most crops per second whose p95 is at most ``max_ms``, in words."""
    within = [point for point in points if point.p95 <= max_ms]
    if not within:
        return f"no point has a p95 of at most {max_ms:g} ms; the least is {min(point.p95 for point in points):.1f} ms"
    top = max(within, key=lambda point: point.crops_per_second)
    return (f"most with a p95 of at most {max_ms:g} ms: {top.crops_per_second:.1f} crops/s at batch {top.batch}, "
            f"{top.concurrency} requests at a time")  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="dtn-fast bench server",
        description="Measure a model on Triton Inference Server by batch and concurrency.",
        epilog="Example: dtn-fast bench server http://localhost:8000/dtn --batches 1 8 --concurrency 1 4 --max-ms 50",
    )
    parser.add_argument("address", help="http://host:port[/model] or grpc://host:port[/model]")
    parser.add_argument("--batches", type=_count, nargs="+", default=[1, 8, 32], help="crops in a request (1 8 32)")
    parser.add_argument("--concurrency", type=_count, nargs="+", default=[1, 2, 4, 8],
                        help="requests at a time (1 2 4 8)")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=3.0, help="time for each pair of the two (3)")
    parser.add_argument("--max-ms", type=positive, default=100.0, help="latency that p95 must keep (100)")
    parser.add_argument("--out", type=Path, default=Path("bench-server.json"), help="results file (bench-server.json)")
    options = parser.parse_args(arguments)
    address, points = parse_address(options.address), list[Point]()
    for point in sweep(address, options.batches, options.concurrency, options.seconds):
        print(*([] if points else [HEADER]), row(point), sep="\n", flush=True)
        points.append(point)
        rows = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in p._asdict().items()} for p in points]
        write_json(options.out, {"address": str(address), "client": environment(), "rows": rows})
    print(best(points, options.max_ms))
    print(f"results: {options.out}")
    return 0


def _count(text: str) -> int:
    if not 1 <= (number := int(text)) <= 4096:
        raise ValueError(text)
    return number
