"""An image or video to a verdict: faces found and followed, scored, aggregated by a named rule.

A video streams: one thread decodes, the caller's thread finds faces, another scores, so that memory does not grow
with its length and the three overlap.
"""

from __future__ import annotations

import functools
import glob
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box, FaceDetector, FaceTracker, Tracked, crop_face
from dtn_fast.data.video import (
    IMAGES,
    VIDEOS,
    Check,
    Frame,
    duration,
    read_frames,
    read_image,
)
from dtn_fast.errors import MediaError
from dtn_fast.explain import grad_cam
from dtn_fast.pretrained import Detector
from dtn_fast.runtime import Scorer, TorchScorer

RULE = (
    "person score = mean P(fake) over the frames with that face; input score = the highest person's, of those in at "
    "least a tenth of the frames with a face (where cuts leave nobody so often: the mean over frames of their highest "
    "face)"
)
BATCH = 16
"""Faces scored at once."""
AHEAD = 4
"""Frames decoded, and batches scored, ahead of who needs them."""
TOP = 4
"""Faces of an input kept for the report, the highest-scoring ones."""


class Face(NamedTuple):
    box: Box
    score: float
    person: int = 0
    """Number of the face's track in this input, from 0; who is lost from sight for long gets a new one."""


class FrameResult(NamedTuple):
    number: int
    seconds: float
    faces: list[Face]

    @property
    def score(self) -> float:
        return max(face.score for face in self.faces)


class Span(NamedTuple):
    """A stretch of a video in which a person's score is at or over the threshold."""

    start: float
    """Seconds."""
    end: float
    score: float
    """Mean over its frames."""


class Person(NamedTuple):
    number: int
    score: float
    frames: int
    """In which the face was found."""
    spans: list[Span]


class Picture(NamedTuple):
    """A face kept for the report."""

    number: int
    seconds: float
    score: float
    crop: NDArray[np.uint8]
    heat: NDArray[np.float32] | None
    """Grad-CAM, when the scorer is a torch model."""


@dataclass
class Timing:
    """Seconds that each stage worked, and that all took together; the stages overlap."""

    decode: float = 0.0
    detect: float = 0.0
    score: float = 0.0
    wall: float = 0.0

    def shares(self) -> str:
        """Where the work went, in percent of the sum."""
        total = self.decode + self.detect + self.score or 1.0
        parts = (("decoding", self.decode), ("finding faces", self.detect), ("scoring", self.score))
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)

    def add(self, other: Timing) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Result:
    """What one input came to."""

    path: Path
    verdict: str = "failed"
    """``fake``, ``real``, ``no face`` or ``failed``."""
    score: float | None = None
    frames_read: int = 0
    frames: list[FrameResult] = field(default_factory=list)
    """The frames with at least one face."""
    people: list[Person] = field(default_factory=list)
    """Highest score first."""
    pictures: list[Picture] = field(default_factory=list)
    error: str | None = None
    timing: Timing = field(default_factory=Timing)

    @property
    def ok(self) -> bool:
        return self.score is not None

    @property
    def spans(self) -> list[Span]:
        """Forged stretches of anybody, by start."""
        return sorted(span for person in self.people for span in person.spans)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "verdict": self.verdict,
            "score": self.score,
            "frames_read": self.frames_read,
            "frames_with_face": len(self.frames),
            "error": self.error,
            "people": [{**p._asdict(), "spans": [span._asdict() for span in p.spans]} for p in self.people],
            "timing": {name: round(seconds, 3) for name, seconds in vars(self.timing).items()},
            "frames": [
                {
                    "number": f.number,
                    "seconds": round(f.seconds, 3),
                    "score": f.score,
                    "faces": [{"box": list(face.box), "score": face.score, "person": face.person} for face in f.faces],
                }
                for f in self.frames
            ],
        }


def find_inputs(patterns: list[str]) -> Iterator[tuple[Path, str | None]]:
    """Files named by paths, folders (searched recursively for images and videos) and globs, each once, in order.

    Yields (path, error); an error says why that path gives no input, and the rest goes on.
    """
    seen: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            yield Path(pattern), f"{pattern}: no such file, folder or match"
        for match in matches:
            for path, error in _walk(Path(match)):
                if path not in seen:
                    seen.add(path)
                    yield path, error


def _walk(path: Path) -> Iterator[tuple[Path, str | None]]:
    if not path.is_dir():
        yield path, None
        return
    problems: list[OSError] = []
    found = 0
    for folder, folders, names in os.walk(path, onerror=problems.append):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGES | VIDEOS and not name.startswith("."):
                found += 1
                yield Path(folder, name), None
    for problem in problems:
        yield Path(problem.filename), f"{problem.filename}: cannot be searched ({problem.strerror})"
    if not found and not problems:
        yield path, f"{path}: no image or video in this folder"


def frames_of(path: Path, count: int = 32, rate: float = 0.0, check: Check = lambda: None) -> Iterator[Frame]:
    """The frame of an image, or those of a video: ``count`` spread evenly (0: all), or ``rate`` a second of it.

    ``check`` is called for every packet read.  Raises MediaError.
    """
    if not path.is_file():
        raise MediaError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        yield Frame(0, 0.0, read_image(path))
    elif suffix in VIDEOS:
        if rate:
            count = max(1, round(duration(path, check) * rate))
        yield from read_frames(path, count or None, check=check)
    else:
        raise MediaError(
            f"{path}: neither an image ({' '.join(sorted(IMAGES))}) nor a video ({' '.join(sorted(VIDEOS))})"
        )


def detect(
    path: Path,
    scorer: Scorer,
    detector: FaceDetector,
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


class _Stopped(Exception):
    """Nobody wants the frames any more."""


def _ahead(
    source: Callable[[Check], Iterator[Frame]], timing: Timing, waiting_for: Callable[[], object]
) -> Iterator[Frame]:
    """The frames of ``source`` taken on another thread, at most AHEAD of them early; its errors are raised here.

    ``waiting_for`` is called twice a second while none comes.
    """
    waiting: queue.Queue[Frame | BaseException | None] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def put(item: Frame | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def check() -> None:
        if stopped.is_set():
            raise _Stopped

    def decode() -> None:
        frames = source(check)
        try:
            while not stopped.is_set():
                start = time.perf_counter()
                frame = next(frames, None)
                timing.decode += time.perf_counter() - start
                put(frame)
                if frame is None:
                    return
        except BaseException as error:  # raised again where the frames are used
            put(error)

    thread = threading.Thread(target=decode, name="decoding", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = waiting.get(timeout=0.5)
            except queue.Empty:
                waiting_for()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


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


# ------------------------------------------------------------------------------------------------ the rule


def people_of(frames: list[FrameResult], threshold: float) -> list[Person]:
    """Everybody in ``frames``, highest score first."""
    seen: dict[int, list[tuple[int, float, float]]] = {}
    for place, frame in enumerate(frames):
        for face in frame.faces:
            seen.setdefault(face.person, []).append((place, frame.seconds, face.score))
    people = [
        Person(number, float(np.mean([score for *_, score in own])), len({place for place, *_ in own}),
               _spans(own, threshold))
        for number, own in seen.items()
    ]  # fmt: skip
    return sorted(people, key=lambda person: -person.score)


def _spans(own: list[tuple[int, float, float]], threshold: float) -> list[Span]:
    """Runs of frames next to each other with a score at or over the threshold, from the first to the last of a run."""
    spans: list[Span] = []
    run: list[tuple[int, float, float]] = []
    for item in [*own, None]:
        goes_on = item is not None and item[2] >= threshold and (not run or item[0] - run[-1][0] <= 2)
        if run and not goes_on:
            spans.append(Span(run[0][1], run[-1][1], float(np.mean([score for *_, score in run]))))
            run = []
        if item is not None and item[2] >= threshold:
            run.append(item)
    return spans


def aggregate(people: list[Person], frames: list[FrameResult]) -> float:
    """The input's score by RULE."""
    regular = [person.score for person in people if person.frames * 10 >= len(frames)]
    return max(regular) if regular else float(np.mean([frame.score for frame in frames]))
