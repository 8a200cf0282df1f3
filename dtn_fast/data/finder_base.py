"""The interface of face finders: frames in; boxes, landmarks and scores out.  What all finders share."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.faces import IBUG, Cut, FoundFace, crop_face, mapped, roll
from dtn_fast.errors import UsageError
from dtn_fast.model.config import FinderName
from dtn_fast.packages import require

Image = NDArray[np.uint8]
MAX_FACES = 100
"""Maximum number of faces found in a frame; of a larger crowd the largest ones."""
MAX_SEARCH = 12e6
"""Maximum number of pixels of a frame as it is searched, so that time and memory are bounded at any --min-face: in an
8K frame dlib finds faces from 150 pixels."""
QUICK_SEARCH = 2e6
"""The same for each of the seven searches of a turned frame."""
LANDMARK_SIDE = 400
"""Side in pixels of the picture, twice a face's box, that landmarks are predicted in."""
LEAST_SIDE = 40
"""Side in pixels of the smallest face that a --min-face below 1 means: smaller ones hold nothing to judge."""


class FaceFinder(ABC):
    """Finds faces in RGB frames.  Any number of threads may call one."""

    name: ClassVar[FinderName]
    shake: ClassVar[float]
    """Difference between boxes of a face in nearly equal frames, as a share of the side."""

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        self.config = config
        self._own = threading.local()
        if config.landmark_model is not None:
            self._predictor()  # a wrong file is told now and not at the first face

    def __call__(self, frames: Sequence[Image], turned: bool = True) -> list[list[FoundFace]]:
        """The faces in each frame [H, W, 3] RGB, [H, W, 4] or [H, W]: at most MAX_FACES, largest first.

        turned: whether a frame without a face is searched again, turned.  Raises UsageError for another shape or dtype.
        """
        return [self._find(_rgb(frame), turned) for frame in frames]

    def near(self, frame: Image, face: FoundFace) -> FoundFace | None:
        """The face near the place of ``face``, found in an earlier frame, much faster than by a search of the whole
        frame; None when it is not there, and from finders that are fast enough to search every frame."""
        return None

    @property
    def gives_points(self) -> bool:
        """Whether found faces have landmarks."""
        return self.name == "yunet" or self.config.landmark_model is not None

    @abstractmethod
    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        """All faces of at least ``smallest`` pixels in an RGB frame; ``quick``: once, and in QUICK_SEARCH pixels."""

    @property
    def crowded(self) -> bool:
        """Whether the last frame that this thread searched has more faces than were given."""
        return getattr(self._own, "crowded", False)

    def _find(self, frame: Image, turned: bool) -> list[FoundFace]:
        self._own.crowded = False
        smallest = _smallest(frame, self.config.min_face)
        found = self._search(frame, smallest)
        if self.config.turned or (not found and turned):
            found = apart([*found, *self._search_turned(frame, smallest)])
        found.sort(key=lambda face: -face.box.area)
        self._own.crowded |= len(found) > MAX_FACES
        return [self._with_points(frame, face) for face in found[:MAX_FACES]]

    def _search_turned(self, frame: Image, smallest: float) -> list[FoundFace]:
        """Faces in the frame turned by 45, 90, ... 315 degrees; of twice the size, because seven searches take long."""
        height, width = frame.shape[:2]
        scale = min(1.0, math.sqrt(2 * QUICK_SEARCH) / (width + height))  # by 45 degrees it takes (w + h)^2 / 2 pixels
        small = scaled(frame, scale)
        found = []
        for degrees in range(45, 360, 45):
            turn = _turn(small.shape[1], small.shape[0], degrees)
            wide, high = _extent(turn, small.shape[1], small.shape[0])
            image = cv2.warpAffine(small, turn, (wide, high), borderMode=cv2.BORDER_REPLICATE)
            back = cv2.invertAffineTransform(turn)
            for face in self._search(image, 2 * smallest * scale, quick=True):
                face = face.placed(back / scale)._replace(turn=degrees)
                if 0 <= face.box.center[0] < width and 0 <= face.box.center[1] < height:
                    found.append(face)
        return found

    def _with_points(self, frame: Image, face: FoundFace) -> FoundFace:
        """The face with the landmarks of the landmark model, if there is one, predicted in an upright copy of it."""
        if self.config.landmark_model is None:
            return face
        angle = roll(face.points)
        cut = around(face, face.turn if angle is None else angle)
        near, far = LANDMARK_SIDE // 4, LANDMARK_SIDE * 3 // 4 - 1
        rectangle = require("dlib").rectangle(near, near, far, far)
        image = np.ascontiguousarray(crop_face(frame, cut, LANDMARK_SIDE))
        found = np.array([(part.x, part.y) for part in self._predictor()(image, rectangle).parts()], np.float32)
        points = mapped(cv2.invertAffineTransform(cut.matrix(LANDMARK_SIDE)), found).astype(np.float32)
        if len(points) < IBUG:  # dlib's own five: two corners of the left eye, two of the right eye, below the nose
            unknown = np.full((2, 2), np.nan, np.float32)
            points = np.concatenate([[points[2:4].mean(0), points[:2].mean(0), points[4]], unknown]).astype(np.float32)
        return face._replace(points=points)

    def _predictor(self) -> Any:
        """The landmark predictor of the calling thread."""
        if not hasattr(self._own, "predictor"):
            path = existing_file(self.config.landmark_model, "--landmark-model")
            try:
                predictor = require("dlib").shape_predictor(str(path))
                count = predictor(np.zeros((64, 64, 3), np.uint8), require("dlib").rectangle(8, 8, 56, 56))
            except RuntimeError as error:
                raise UsageError(f"--landmark-model {path}: not a shape predictor of dlib ({error})") from error
            if count.num_parts != 5 and count.num_parts < IBUG:
                raise UsageError(
                    f"--landmark-model {path}: gives {count.num_parts} points; 5, or 68 and more, are read"
                )
            self._own.predictor = predictor
        return self._own.predictor


def existing_file(path: Path | None, option: str) -> Path:
    if path is None or not path.is_file():
        raise UsageError(f"{option} {path}: no such file")
    return path


def _rgb(frame: Image) -> Image:
    """The frame as RGB without alpha."""
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in (1, 3, 4)):
        kind = f"{frame.dtype} {list(frame.shape)}"
        raise UsageError(f"a frame is {kind}; it must be uint8 [H, W], [H, W, 3] or [H, W, 4]")
    if frame.ndim == 2 or frame.shape[2] == 1:
        return np.repeat(frame.reshape(*frame.shape[:2], 1), 3, 2)
    return np.ascontiguousarray(frame[..., :3])


def _smallest(frame: Image, least: float) -> float:
    """Side in pixels of the smallest face to find."""
    return least if least >= 1 else max(least * min(frame.shape[:2]), LEAST_SIDE)


def bounded(frame: Image, scale: float, pixels: float = MAX_SEARCH) -> float:
    return min(scale, math.sqrt(pixels / (frame.shape[0] * frame.shape[1])))


def scaled(image: Image, scale: float) -> Image:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if size == (image.shape[1], image.shape[0]):
        return np.ascontiguousarray(image)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def around(face: FoundFace, degrees: float) -> Cut:
    """The square of twice a face's side around it, between whole pixels."""
    x, y = face.box.center
    return Cut((round(x), round(y)), 2 * face.box.side, degrees)


def zoom(scale: float) -> NDArray[np.float64]:
    """The affine map from a picture to one ``scale`` times as large."""
    return np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])


def apart(faces: list[FoundFace]) -> list[FoundFace]:
    """The faces without those that overlap a surer one."""
    kept: list[FoundFace] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(face.box.overlap(other.box) < 0.3 for other in kept):
            kept.append(face)
    return kept


def _turn(width: int, height: int, degrees: float) -> NDArray[np.float64]:
    """The affine map that turns a picture anticlockwise into a frame that holds all of it."""
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    wide, high = _extent(turn, width, height)
    turn[:, 2] += (wide / 2 - width / 2, high / 2 - height / 2)
    return turn


def _extent(turn: NDArray[np.float64], width: int, height: int) -> tuple[int, int]:
    wide, high = (abs(row[0]) * width + abs(row[1]) * height for row in turn.tolist())
    return math.ceil(wide), math.ceil(high)
