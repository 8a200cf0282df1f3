"""An image or video to a verdict: faces found and followed, scored, aggregated by a named rule.

A video streams: one thread decodes, the caller's thread finds faces, another scores, so that memory does not grow
with its length and the three overlap.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import FaceFinder, FaceTracker, Tracked, crop_face
from dtn_fast.data.video import Check, Frame
from dtn_fast.detect.inputs import frames_of
from dtn_fast.detect.verdict import Face, FrameResult, Picture, Result, Timing, aggregate, people_of
from dtn_fast.errors import MediaError
from dtn_fast.explain.heatmap import grad_cam
from dtn_fast.model.detector import Detector
from dtn_fast.producer import produced
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer

BATCH = 16
"""Faces scored at once."""
AHEAD = 4
"""Frames decoded, and batches scored, ahead of who needs them."""
TOP = 4
"""Faces of an input kept for the report, the highest-scoring ones."""


def detect(
    path: Path,
    scorer: Scorer,
    detector: FaceFinder,
    frames: int = 32,
    threshold: float = 0.5,
    rate: float = 0.0,
    watch: Callable[[int], object] = lambda _: None,
    model: Detector | None = None,
) -> Result:
    """The verdict on one input; errors of the input end up in the result, they do not raise.

    ``watch`` is told how many frames were read so far, also while none comes; what it raises ends the work.
    ``model``: draws heat maps; default: the scorer's own, if it is a torch model.
    """
    result = Result(path)
    begin = time.perf_counter()
    kept: list[Picture] = []
    try:
        with _Scoring(scorer, result, kept) as scoring:
            tracker = FaceTracker(detector)
            source = functools.partial(frames_of, path, frames, rate)
            for frame in _ahead(source, result.timing, lambda: watch(result.frames_read)):
                result.frames_read += 1
                watch(result.frames_read)
                start = time.perf_counter()
                found = tracker(frame.image)
                crops = [crop_face(frame.image, face.box, scorer.config.image_size) for face in found]
                result.timing.detect += time.perf_counter() - start
                if found:
                    scoring.add(frame, found, crops)
    except (MediaError, OSError) as error:
        result.error = str(error)
        return result
    finally:
        result.timing.wall = time.perf_counter() - begin
    if not result.frames:
        result.verdict = "no face"
        result.error = f"{path}: no face in {result.frames_read} frame{'s' * (result.frames_read != 1)}"
        return result
    result.people = people_of(result.frames, threshold)
    result.score = aggregate(result.people, result.frames)
    result.verdict = "fake" if result.score >= threshold else "real"
    model = scorer.model if model is None and isinstance(scorer, TorchScorer) else model
    if model is not None and model.cam_layer() is not None:
        heats = grad_cam(model, np.stack([p.crop for p in kept]))
        kept = [p._replace(heat=heat) for p, heat in zip(kept, heats, strict=True)]
    result.pictures = kept
    return result


def _ahead(
    source: Callable[[Check], Iterator[Frame]], timing: Timing, waiting: Callable[[], object]
) -> Iterator[Frame]:
    """The frames of ``source`` decoded on another thread, at most AHEAD of them early."""

    def timed(check: Check) -> Iterator[Frame]:
        frames = source(check)
        while True:
            start = time.perf_counter()
            frame = next(frames, None)
            timing.decode += time.perf_counter() - start
            if frame is None:
                return
            yield frame

    return produced(timed, AHEAD, "decoding", waiting)


class _Scoring:
    """Faces in the order of their frames to batches, scored on another thread, written into ``result``."""

    def __init__(self, scorer: Scorer, result: Result, kept: list[Picture]) -> None:
        self._scorer, self._result, self._kept = scorer, result, kept
        self._pending: list[tuple[int, float, list[Tracked], list[NDArray[np.uint8]]]] = []
        self._running: list[tuple[Future[NDArray[np.float64]], list[Any]]] = []
        self._pool = ThreadPoolExecutor(1, "scoring")

    def add(self, frame: Frame, found: list[Tracked], crops: list[NDArray[np.uint8]]) -> None:
        self._pending.append((frame.number, frame.seconds, found, crops))  # the picture itself may go
        if sum(len(item[2]) for item in self._pending) >= BATCH:
            self._submit()

    def _submit(self) -> None:
        batch, self._pending = self._pending, []
        crops = np.stack([crop for *_, part in batch for crop in part])
        self._running.append((self._pool.submit(self._score, crops), batch))
        while len(self._running) > AHEAD:
            self._collect()

    def _score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        start = time.perf_counter()
        scores = self._scorer.score(crops)
        self._result.timing.score += time.perf_counter() - start
        return scores

    def _collect(self) -> None:
        future, batch = self._running.pop(0)
        scores = iter(future.result())
        for number, seconds, found, crops in batch:
            faces = [Face(face.box, float(next(scores)), face.person) for face in found]
            self._result.frames.append(FrameResult(number, seconds, faces))
            self._kept += [Picture(number, seconds, f.score, c, None) for f, c in zip(faces, crops, strict=True)]
        self._kept.sort(key=lambda p: -p.score)
        del self._kept[TOP:]

    def __enter__(self) -> _Scoring:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._pending:
                self._submit()
            while kind is None and self._running:
                self._collect()
        finally:
            self._pool.shutdown(cancel_futures=True)
