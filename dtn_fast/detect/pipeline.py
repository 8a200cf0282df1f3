"""Detection on one image or video: finds and tracks faces, scores them and aggregates the scores by RULE.

A video is streamed: one thread decodes, the caller's thread finds faces, another scores, so that memory does not grow
with its length and the three overlap.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.even_spacing import PerSecond
from dtn_fast.data.face_finders import open_finder
from dtn_fast.data.face_tracker import FaceTracker, Tracked
from dtn_fast.data.faces import Cut, crop_face, cut_of
from dtn_fast.data.finder_base import FaceFinder
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.video import Frame, Reading
from dtn_fast.data.video_index import Check
from dtn_fast.detect.annotate import framed
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.limits import Limits, limits_of
from dtn_fast.detect.regions import CUT, Region, regions_of
from dtn_fast.detect.verdict import Face, FrameResult, Picture, Result, Timing, judge
from dtn_fast.errors import MediaError, UsageError, tell
from dtn_fast.explain.heatmap import NO_EVIDENCE, UNEXPLAINED, heat_maps
from dtn_fast.model.config import CropPolicy, crop_policy
from dtn_fast.model.detector import Detector
from dtn_fast.producer_thread import produced
from dtn_fast.runtime.clips import TrackClips, pace_note
from dtn_fast.runtime.scorer import Scored, Scorer
from dtn_fast.runtime.torch_scorer import TorchScorer

BATCH = 16
"""Number of faces scored at once."""
AHEAD = 4
"""Maximum number of frames decoded, and of batches scored, before they are needed."""
WHOLE = 960
"""Longest side in pixels of a still picture that is kept for the report."""
CALLED_REAL = "called real, so no region is shown"
NOTHING_FORGED = "no pixel seems forged"
"""Reasons why a face has no map of its mask head."""
TOP = 4
"""Number of highest-scoring faces of an input kept for the report."""


def detect(
    path: str | Path,
    scorer: Scorer,
    config: DetectConfig = DetectConfig(),
    finder: FaceFinder | None = None,
    watch: Callable[[int], object] = lambda _: None,
    model: Detector | None = None,
    threads: int = 0,
    pool: ThreadPoolExecutor | None = None,
    reading: Reading | None = None,
) -> Result:
    """The verdict on one image or video; an unreadable input gives a result with an error, it does not raise.

    finder: face finder to reuse over many inputs; default: a new one, of the model's crop policy unless ``config``
    names another.  watch: called with the number of frames read so far, also while waiting for a frame; an exception
    raised by it ends the work.  model: model for the heat maps; default: the scorer's, if it is a torch model.
    threads: of the decoder, 0 for one per core.  pool: a pool of one thread, on which inputs that are judged at once
    score their faces in turns; default: one for this input.  reading: count of frames to fill while they are read;
    default: a new one.  Raises UsageError when a package is missing.
    """
    if pool is None:
        with ThreadPoolExecutor(1, "scoring") as pool:
            return detect(path, scorer, config, finder, watch, model, threads, pool, reading)
    policy, side = crop_policy(scorer.config), scorer.config.image_size
    path, tracker = Path(path), FaceTracker(finder or finder_of(scorer, config), config.every)
    result, kept = Result(path, reading=reading or Reading()), list[Picture]()
    result.frame_limits = limits_of(scorer.config.card, config, False)
    begin = time.perf_counter()
    wanted = PerSecond(config.rate) if config.rate else config.frames or None
    source = lambda check: frames_of(path, wanted, threads, check, result.reading, config.decoder == "gpu")
    try:
        with (
            _Scoring(scorer, result, kept, pool) as scoring,
            closing(_ahead(source, result.timing, lambda: watch(result.frames_read))) as frames,
        ):
            for frame in frames:
                result.frames_read += 1
                result.analysed.append((frame.seconds, frame.end))
                watch(result.frames_read)
                start = time.perf_counter()
                found = tracker(frame.image)
                cuts = [cut_of(face.box, face.degrees, policy) for face in found]
                crops = [crop_face(frame.image, cut, side) for cut in cuts]
                result.crowded += tracker.crowded
                result.timing.find_faces += time.perf_counter() - start
                if found:
                    scoring.add(frame, result.frames_read - 1, found, crops, cuts)
                if not result.moving:
                    result.whole = frame.image
    except (MediaError, OSError) as error:
        result.error = str(error)
        return result
    finally:
        result.timing.wall = time.perf_counter() - begin
    if result.moving:
        result.clips = {person: track.score() for person, track in scoring.tracks.items()}
        if scorer.clips is not None:
            result.pace = pace_note(scorer.clips, [frame.number for frame in result.frames])
    judge(result, scorer.config.card, config)
    if result.whole is not None:
        result.whole = framed(result.whole, result.frames, result.frame_limits, WHOLE)
    if result.ok:
        own = scorer.model if model is None and isinstance(scorer, TorchScorer) else model
        result.pictures = pool.submit(_with_heat, kept, own, result.frame_limits).result()
    return result


def finder_of(scorer: Scorer, config: DetectConfig) -> FaceFinder:
    """The face finder that ``config`` names, or else the one that the model's crops were cut with.

    Says in one line when the two differ, or the model records none.  Raises UsageError when a package or a model file
    is missing, or the model wants level eyes and the finder gives no landmarks.
    """
    policy = crop_policy(scorer.config)
    if scorer.config.crop is None:
        tell(f"the model records no crop policy; its faces are taken as {CropPolicy()}")
    if config.finder.faces not in (None, policy.finder):
        tell(f"--faces {config.finder.faces}: the model was trained on the boxes of {policy.finder}; they are alike "
             "but not the same")  # fmt: skip
    finder = open_finder(config.finder, policy, config.face_device)
    if policy.align == "landmarks" and not finder.gives_points:
        raise UsageError("the model takes crops whose eyes are level, which needs landmarks; add --faces yunet or "
                         "--landmark-model FILE")  # fmt: skip
    return finder


def _with_heat(pictures: list[Picture], model: Detector | None, limits: Limits) -> list[Picture]:
    """The pictures with their heat maps, or the reason why they have none: the mask head's, or else Grad-CAM's."""
    if any(p.mask is not None for p in pictures):
        return [_with_mask(p, limits) for p in pictures]
    if model is None:
        return [p._replace(heat_reason="heat maps need a checkpoint, not an exported file") for p in pictures]
    found = []
    for picture, heat in zip(pictures, heat_maps(model, np.stack([p.crop for p in pictures])), strict=True):
        real = limits.verdict(picture.score) == "real"
        reason = UNEXPLAINED if heat.reason == NO_EVIDENCE and not real else heat.reason
        found.append(picture._replace(heat=heat.map, heat_depth=heat.depth, heat_reason=reason))
    return found


def _with_mask(picture: Picture, limits: Limits) -> Picture:
    """The picture with its mask as its heat map, unless it is called real or no pixel seems forged."""
    assert picture.mask is not None
    if limits.verdict(picture.score) == "real":
        return picture._replace(heat_reason=CALLED_REAL)
    if picture.mask.max() < CUT:
        return picture._replace(heat_reason=NOTHING_FORGED)
    heat = cv2.resize(picture.mask, picture.crop.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return picture._replace(heat=heat, heat_depth="mask head")


def _ahead(
    source: Callable[[Check], Iterator[Frame]], timing: Timing, waiting: Callable[[], object]
) -> Generator[Frame, None, None]:
    """The frames of ``source``, decoded on another thread, at most AHEAD of them before they are needed."""

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
    """Collects faces into batches in frame order, scores them on ``pool``'s thread and writes them into ``result``.

    A batch holds one input's faces, so that a score does not depend on what else is judged at the same time.
    """

    def __init__(self, scorer: Scorer, result: Result, kept: list[Picture], pool: ThreadPoolExecutor) -> None:
        self._scorer, self._result, self._kept, self._pool = scorer, result, kept, pool
        self._pending: list[tuple[int, float, int, list[Tracked], list[NDArray[np.uint8]], list[Cut]]] = []
        self._running: list[tuple[Future[Scored], list[Any]]] = []
        self.tracks: dict[int, TrackClips] = {}
        """Clips of each person, if the model has a temporal head."""

    def add(
        self, frame: Frame, place: int, found: list[Tracked], crops: list[NDArray[np.uint8]], cuts: list[Cut]
    ) -> None:
        self._pending.append((frame.number, frame.seconds, place, found, crops, cuts))  # without the frame's image
        if sum(len(item[3]) for item in self._pending) >= BATCH:
            self._submit()

    def _submit(self) -> None:
        batch, self._pending = self._pending, []
        crops = np.stack([crop for *_, part, _ in batch for crop in part])
        self._running.append((self._pool.submit(self._score, crops), batch))
        while len(self._running) > AHEAD:
            self._collect()

    def _score(self, crops: NDArray[np.uint8]) -> Scored:
        start = time.perf_counter()
        scores = self._scorer.judge(crops)
        self._result.timing.score += time.perf_counter() - start
        return scores

    def _collect(self) -> None:
        future, batch = self._running.pop(0)
        scored = future.result()
        scores = iter(scored.score.tolist())
        at = 0
        novelties = itertools.repeat(None) if scored.novelty is None else iter(scored.novelty.tolist())
        masks = itertools.repeat(None) if scored.mask is None else iter(scored.mask)
        for number, seconds, place, found, crops, cuts in batch:
            own = list(itertools.islice(masks, len(found)))
            faces = []
            for face, mask, cut in zip(found, own, cuts, strict=True):
                score = next(scores)
                faces.append(Face(face.box, score, face.person, next(novelties), self._regions(score, mask, cut)))
            self._result.frames.append(FrameResult(number, seconds, faces, place))
            if scored.features is not None:
                self._add_clips(scored, found, at)
                at += len(found)
            self._kept += [Picture(number, seconds, face.score, crop, mask=mask)
                           for face, crop, mask in zip(faces, crops, own, strict=True)]  # fmt: skip
        self._kept.sort(key=lambda p: -p.score)
        del self._kept[TOP:]

    def _add_clips(self, scored: Scored, found: list[Tracked], first: int) -> None:
        """Adds a frame's faces, which begin at ``first`` of the batch, to the clips of their people."""
        assert scored.features is not None
        assert scored.logits is not None
        for place, face in enumerate(found, first):
            track = self.tracks.setdefault(face.person, TrackClips(self._scorer))
            track.add(scored.features[place], scored.logits[place])

    def _regions(self, score: float, mask: NDArray[np.float32] | None, cut: Cut) -> tuple[Region, ...] | None:
        """The forged regions of a face that is called fake, if the model maps them."""
        fake = self._result.frame_limits.verdict(score) == "fake"
        return regions_of(mask, cut) if fake and mask is not None else None

    def __enter__(self) -> _Scoring:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._pending:
                self._submit()
            while kind is None and self._running:
                self._collect()
        finally:
            for running in self._running:
                running[0].cancel()
