"""An image or video to a verdict: faces found, scored, aggregated by a named rule."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box, FaceDetector, crop_face
from dtn_fast.data.video import IMAGES, VIDEOS, Frame, read_frames, read_image
from dtn_fast.errors import MediaError
from dtn_fast.explain import grad_cam
from dtn_fast.runtime import Scorer, TorchScorer

RULE = "frame score = highest P(fake) among its faces; input score = mean over frames with a face"
BATCH = 16
TOP = 4
"""Frames of an input whose faces are kept for the report, the highest-scoring ones."""


class Face(NamedTuple):
    box: Box
    score: float


class FrameResult(NamedTuple):
    number: int
    seconds: float
    faces: list[Face]

    @property
    def score(self) -> float:
        return max(face.score for face in self.faces)


class Picture(NamedTuple):
    """A face kept for the report."""

    number: int
    seconds: float
    score: float
    crop: NDArray[np.uint8]
    heat: NDArray[np.float32] | None
    """Grad-CAM, when the scorer is a torch model."""


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
    pictures: list[Picture] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.score is not None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "verdict": self.verdict,
            "score": self.score,
            "frames_read": self.frames_read,
            "frames_with_face": len(self.frames),
            "error": self.error,
            "frames": [
                {
                    "number": f.number,
                    "seconds": round(f.seconds, 3),
                    "score": f.score,
                    "faces": [{"box": list(face.box), "score": face.score} for face in f.faces],
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


def frames_of(path: Path, count: int) -> Iterator[Frame]:
    """The frames of an image (one) or a video (``count``, spread evenly).  Raises MediaError."""
    if not path.is_file():
        raise MediaError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        yield Frame(0, 0.0, read_image(path))
    elif suffix in VIDEOS:
        yield from read_frames(path, count)
    else:
        raise MediaError(
            f"{path}: neither an image ({' '.join(sorted(IMAGES))}) nor a video ({' '.join(sorted(VIDEOS))})"
        )


def detect(path: Path, scorer: Scorer, detector: FaceDetector, frames: int = 32, threshold: float = 0.5) -> Result:
    """The verdict on one input; errors of the input end up in the result, they do not raise."""
    result = Result(path)
    pending: list[tuple[Frame, list[Box]]] = []
    kept: list[Picture] = []

    def flush() -> None:
        crops = [crop_face(f.image, box, scorer.config.image_size) for f, boxes in pending for box in boxes]
        scores = scorer.score(np.stack(crops)) if crops else np.zeros(0)
        place = 0
        for frame, boxes in pending:
            faces = []
            for box in boxes:
                score = float(scores[place])
                faces.append(Face(box, score))
                kept.append(Picture(frame.number, frame.seconds, score, crops[place], None))
                place += 1
            result.frames.append(FrameResult(frame.number, frame.seconds, faces))
        kept.sort(key=lambda p: -p.score)
        del kept[TOP:]
        pending.clear()

    try:
        for frame in frames_of(path, frames):
            result.frames_read += 1
            boxes = detector(frame.image)
            if boxes:
                pending.append((frame, boxes))
            if len(pending) == BATCH:
                flush()
        flush()
    except (MediaError, OSError) as error:
        result.error = str(error)
        return result
    if not result.frames:
        result.verdict = "no face"
        result.error = f"{path}: no face in {result.frames_read} frame{'s' * (result.frames_read != 1)}"
        return result
    result.score = float(np.mean([frame.score for frame in result.frames]))
    result.verdict = "fake" if result.score >= threshold else "real"
    if isinstance(scorer, TorchScorer) and scorer.model.cam_layer() is not None:
        heats = grad_cam(scorer.model, np.stack([p.crop for p in kept]))
        kept = [p._replace(heat=heat) for p, heat in zip(kept, heats, strict=True)]
    result.pictures = kept
    return result
