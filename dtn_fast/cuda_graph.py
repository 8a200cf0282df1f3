"""CUDA graphs: GPU work captured once and replayed without launching its kernels one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Number of calls before a capture, for compilation, cuDNN's algorithm search and lazy initialisation."""


_CAPTURING = threading.Lock()


def warm_up(call: Callable[[], Any], times: int = WARM_UP, stream: torch.cuda.Stream | None = None) -> Any:
    """Calls ``call`` on a side stream, as the default stream cannot be captured; returns the last result."""
    side, current = stream or torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(times):
            result = call()
    current.wait_stream(side)
    return result


def capture(call: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Captures ``call``, already warmed up; returns the function that replays it and the tensors that a replay fills.
    pool: memory that it shares with other captures (``torch.cuda.graph_pool_handle()``); None: its own.

    Other threads may use the GPU during the capture (a loader copies, a server scores), but one captures at a time.
    """
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails would leave its own stream current
    with _CAPTURING, here, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = call()
    return graph.replay, result
