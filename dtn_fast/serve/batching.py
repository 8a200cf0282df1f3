"""Joins the requests of many threads into batches for one scorer."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import UsageError
from dtn_fast.runtime.scorer import Scorer

_Request = tuple[NDArray[np.uint8], "Future[NDArray[np.float64]]"]


class MicroBatcher(Scorer):
    """A scorer whose concurrent calls share batches of ``scorer``: the first call waits ``wait`` seconds for others.

    One thread runs the model, in the order of arrival; an error in a batch is raised in every caller of the batch.  Use
    as a context manager or call :meth:`close`.
    """

    def __init__(self, scorer: Scorer, wait: float = 0.002) -> None:
        super().__init__(scorer.config, scorer.notice, scorer.name, scorer.batch_size)
        self.scorer, self.wait, self.clips = scorer, wait, scorer.clips
        self.batches = self.crops = 0
        """Batches run and crops scored so far."""
        self._jobs: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="batching", daemon=True)
        self._thread.start()

    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        future: Future[NDArray[np.float64]] = Future()
        with self._lock:  # nothing may be put after the end marker
            if self._closed:
                raise UsageError(f"{self.name}: closed")
            self._jobs.put((crops, future))
        return future.result()

    def _work(self) -> None:
        held: _Request | None = None
        while True:
            job = held or self._jobs.get()
            if job is None:
                return
            batch, held, ended = self._together(job)
            try:
                outputs = self.scorer.columns(np.concatenate([crops for crops, _ in batch]))
            except BaseException as error:  # raised in the callers
                for _, future in batch:
                    future.set_exception(error)
            else:
                self.batches, self.crops = self.batches + 1, self.crops + len(outputs)
                place = 0
                for crops, future in batch:
                    future.set_result(outputs[place : place + len(crops)])
                    place += len(crops)
            if ended:
                return

    def _together(self, first: _Request) -> tuple[list[_Request], _Request | None, bool]:
        """Jobs of one batch, a job that did not fit, and whether the end marker was read."""
        batch, size, until = [first], len(first[0]), time.monotonic() + self.wait
        while size < self.batch_size:
            try:
                job = self._jobs.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if job is None:
                return batch, None, True
            if size + len(job[0]) > self.batch_size:
                return batch, job, False
            batch.append(job)
            size += len(job[0])
        return batch, None, False

    def close(self) -> None:
        """Scores all earlier requests, then ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def __enter__(self) -> MicroBatcher:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
