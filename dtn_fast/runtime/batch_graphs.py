"""One CUDA graph per batch size."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class BatchGraphs:
    """``function`` on a GPU as one CUDA graph per batch size, captured at its first use; one call at a time, all on the
    same stream.

    Sizes are powers of two up to ``largest``: a batch is padded with what lay there before, and its rows cut off.
    """

    def __init__(self, function: Any, largest: int, smallest: int = 1) -> None:
        self._function, self._largest, self._smallest = function, largest, smallest
        self._lock = threading.Lock()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """``function`` of a host batch [B, ...]; the result is the caller's own."""
        size = min(max(1 << (len(batch) - 1).bit_length(), self._smallest), self._largest)
        with self._lock:
            if size not in self._captured:
                self._captured[size] = self._capture(batch, size)
            graph, given, result = self._captured[size]
            given[: len(batch)].copy_(batch, non_blocking=True)
            graph.replay()
            return result[: len(batch)].clone()

    def _capture(self, batch: Tensor, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = torch.zeros(size, *batch.shape[1:], dtype=batch.dtype, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose and allocate
                self._function(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            result = self._function(given)
        return graph, given, result
