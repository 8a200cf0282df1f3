"""Timing of several calls in turns, on a GPU with events on its stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call; on a GPU from events on the current stream, so that launches overlap as in real use."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call, measured ``rounds`` times in turns after ``warm_up`` turns that are not counted.

    ``before`` is called with a call's name before each of its calls, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            before(name)
            taken = seconds_of(call)
            if turn >= warm_up:
                times[name].append(taken)
    return times
