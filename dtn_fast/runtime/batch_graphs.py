"""One CUDA graph per batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtn_fast.cuda_graph import capture, warm_up


class BatchGraphs:
    """Runs ``function`` on a GPU as one CUDA graph per batch size, captured at its first use; one call at a time, all
    on the same stream.

    Sizes are powers of two up to ``largest``: a batch is padded with old data, whose results are cut off.
    """

    def __init__(self, function: Any, largest: int, smallest: int = 1) -> None:
        self._function, self._largest, self._smallest = function, largest, smallest
        self._lock = threading.Lock()
        self._captured: dict[int, tuple[Callable[[], None], Tensor, Tensor]] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """Applies ``function`` to a host batch [B, ...]; the result is a copy that later calls do not change."""
        size = min(max(1 << (len(batch) - 1).bit_length(), self._smallest), self._largest)
        with self._lock:
            if size not in self._captured:
                self._captured[size] = self._capture(batch, size)
            replay, given, result = self._captured[size]
            given[: len(batch)].copy_(batch, non_blocking=True)
            replay()
            return result[: len(batch)].clone()

    def _capture(self, batch: Tensor, size: int) -> tuple[Callable[[], None], Tensor, Tensor]:
        given = torch.zeros(size, *batch.shape[1:], dtype=batch.dtype, device="cuda")
        warm_up(lambda: self._function(given))
        replay, result = capture(lambda: self._function(given))
        return replay, given, result
