"""Timing of contenders: in turns, as medians with quartiles, with errors and rates of work."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtn_fast.cuda_graph import capture, warm_up
from dtn_fast.timing import in_turns

CALLS = 10
"""Calls in one replay of a CUDA graph, so that launching it costs nothing beside them."""
HELD = 6e9
"""Bytes that the forward passes of one contender's backward passes may hold; where ten take more, fewer are timed."""
ROTATED = 180e6
"""Bytes of inputs that the calls of a case with a cold L2 rotate over: three times the cache of an H200."""


class Compiled(NamedTuple):
    """Work of torch.compile on one contender: both are 0 where it compiled everything, once."""

    breaks: int
    recompiled: int


@dataclass(frozen=True)
class Timed:
    """Calls of one contender that are timed together."""

    run: Callable[[], Any]
    calls: int
    """Number of calls that one ``run`` makes."""
    before: Callable[[], Any] = lambda: None
    """Untimed work before each ``run``, such as the forward passes before backward ones."""
    how: str = ""
    """Text for the contender's row where it was not captured."""

    def __call__(self) -> Any:
        self.before()
        return self.run()


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
    compiled: Mapping[str, Compiled] = field(default_factory=dict)
    """What torch.compile made of a contender; absent where nothing is compiled."""
    rounds: int = 9
    tail: bool = False
    """Whether to report the 99th percentile too, for latency."""


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
    breaks: int | None = None
    """Graph breaks of torch.compile; None where nothing is compiled."""
    recompiled: int | None = None


def measure(case: Case, rounds: int | None = None, base: float | None = None) -> list[Measurement]:
    """Times every contender of ``case``: once to warm up, then ``rounds`` times in turns.

    base: seconds that ratios are relative to; None: the baseline's.
    """
    peaks: dict[str, float] = {}
    gpu = torch.cuda.is_available()
    for name, call in case.contenders.items():  # the warm-up
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        call()
        if gpu:
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    timed = {name: call if isinstance(call, Timed) else Timed(call, 1) for name, call in case.contenders.items()}
    runs = {name: call.run for name, call in timed.items()}
    times = in_turns(runs, rounds or case.rounds, 0, lambda name: timed[name].before())
    times = {name: [value / timed[name].calls for value in values] for name, values in times.items()}
    base = base or statistics.median(times[case.baseline])
    return [_row(case, name, values, base, peaks.get(name)) for name, values in times.items()]


def _row(case: Case, name: str, times: list[float], base: float, peak: float | None) -> Measurement:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    compiled = case.compiled.get(name)
    return Measurement(
        case.suite, case.title, name, median, low, high, base / median,
        images_per_second=case.images / median if case.images else None,
        tflops=case.flops / median / 1e12 if case.flops else None,
        gbytes=case.bytes / median / 1e9 if case.bytes else None,
        share=case.lower_bound / median if case.lower_bound else None,
        error=case.errors.get(name), ours=name == case.ours, peak_mib=peak,
        breaks=compiled.breaks if compiled else None, recompiled=compiled.recompiled if compiled else None,
        p99=sorted(times)[math.ceil(0.99 * len(times)) - 1] if case.tail else None,
    )  # fmt: skip


@contextmanager
def compilations(made: dict[str, Compiled], name: str) -> Iterator[None]:
    """Counts what torch.compile does inside, and sets ``made[name]`` if it compiles anything.  Raises RuntimeError past
    its limit of recompilations, where it would go on eagerly: a rival must not lose that way."""
    if "torch._dynamo" not in sys.modules:  # nothing compiled exists
        yield
        return
    from torch._dynamo import config, utils
    from torch._dynamo.exc import FailOnRecompileLimitHit

    utils.counters.clear()
    utils.clear_compilation_metrics()
    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise RuntimeError("compiled again and again, past torch.compile's limit") from error
    done = {str(one.compile_id) for one in utils.get_compilation_metrics()}  # frame/number of its compilation
    if done:
        again = sum(not re.search(r"/0(_|$)", one) for one in done)
        made[name] = Compiled(sum(utils.counters["graph_break"].values()), again)


Call = Callable[..., Tensor]
"""Function of a set of inputs."""


def rotation(make: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Sets of inputs of a call, so many that their tensors do not fit into the L2 cache together; on a CPU one set."""
    sets = [make()]
    size = sum(t.numel() * t.element_size() for t in sets[0])
    more = min(int(ROTATED // size), 1000) if torch.cuda.is_available() else 0
    return sets + [make() for _ in range(more)]


def forward_passes(call: Call, sets: list[list[Tensor]]) -> Timed:
    """Forward passes over ``sets`` in turn without gradients, at least ``CALLS`` of them."""

    def one(inputs: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    if not torch.cuda.is_available():
        return Timed(lambda: one(sets[0]), 1)
    todo = sets * -(-CALLS // len(sets))

    def every() -> None:
        for inputs in todo:
            one(inputs)

    warm_up(lambda: one(sets[0]))
    try:
        return Timed(capture(every)[0], len(todo))
    except RuntimeError:  # not every rival can be captured
        torch.cuda.synchronize()
        return Timed(every, len(todo), how=ONE_BY_ONE)


def backward_passes(call: Call, sets: list[list[Tensor]]) -> Timed:
    """Backward passes.  Their forward passes run before them, untimed, so that the L2 cache is cold."""
    gpu, grads, outs = torch.cuda.is_available(), [torch.randn_like(call(*s).detach()) for s in sets], list[Tensor]()

    def forward(passes: int) -> None:
        outs[:] = [call(*sets[place % len(sets)]) for place in range(passes)]

    def backward() -> None:
        for place in range(len(outs)):
            out, outs[place] = outs[place], outs[place].detach()  # what was saved for it is free after its pass
            torch.autograd.grad(out, [t for t in sets[place % len(sets)] if t.requires_grad], grads[place % len(sets)])

    if not gpu:
        return Timed(backward, 1, lambda: forward(1))
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    warm_up(lambda: (forward(1), backward()))
    one = torch.cuda.max_memory_allocated() - held
    passes = int(min(max(CALLS, len(sets)), max(HELD // max(one, 1), 1)))
    try:
        pool = torch.cuda.graph_pool_handle()
        ahead, _ = capture(lambda: forward(passes), pool)
        return Timed(capture(backward, pool)[0], passes, ahead)
    except RuntimeError:
        torch.cuda.synchronize()
        return Timed(backward, passes, lambda: forward(passes), ONE_BY_ONE)


ONE_BY_ONE = ", launched one by one"


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
        parts += [f"{row.breaks} graph breaks, {row.recompiled} recompilations"] if row.breaks is not None else []
        yield "  ".join(parts) + ("  *" if row.ours else "")


def seconds(value: float) -> str:
    """``value`` in seconds as text in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2g} us"
