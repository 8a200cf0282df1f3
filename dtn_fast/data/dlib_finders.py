"""dlib's face finders: HOG and the MMOD network.

The HOG finder jumps between the sizes of its image pyramid (1.2 times apart) and between cells of 8 pixels.  Each face
that it finds is therefore searched again around its place at four sizes that divide one step of the pyramid, and the
boxes and scores are averaged.  The network's boxes are mapped to its square.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.faces import Box, FoundFace, crop_face
from dtn_fast.data.finder_base import (
    MAX_FACES,
    MAX_SEARCH,
    QUICK_SEARCH,
    FaceFinder,
    Image,
    apart,
    around,
    bounded,
    existing_file,
    scaled,
    zoom,
)
from dtn_fast.errors import UsageError
from dtn_fast.packages import require

WINDOW = 80
"""Side in pixels of the smallest face that dlib's finders see."""
ZOOM = 1.1
"""Factor by which the smallest face is larger than WINDOW in the search, because faces at the limit are missed."""
LEAST_SCORE = 0.15
"""Least mean score, over the four sizes, of a face that was not there before.  In 160 noisy copies of photographs it
left 272 of 277 faces and none of 5 false ones."""
NEAR_OVERLAP = 0.05
"""Least overlap of a face with its earlier box."""
PYRAMID = 1.2
"""Factor between the sizes of dlib's image pyramid."""
NEAR_SIDES = tuple(95 * PYRAMID ** (k / 4) for k in range(4))
"""Sides in pixels that a face is scaled to when it is searched near its place: a step of the pyramid in quarters."""
PLAIN = 640
"""Longest side of the frame, and half of the longest, in the last searches for a face where none was found."""


class DlibFinder(FaceFinder):
    """dlib's HOG face finder, the paper's.  Raises UsageError when dlib is not installed."""

    name, shake = "dlib", 0.08

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._detector()

    def near(self, frame: Image, face: FoundFace) -> FoundFace | None:
        """The face that overlaps ``face`` most: the mean of up to four boxes; None when fewer than two are found."""
        window = around(face, face.turn)
        found = []
        for side in NEAR_SIDES:
            size = round(2 * side)
            back = cv2.invertAffineTransform(window.matrix(size))
            hits = [hit.placed(back) for hit in self._hits(crop_face(frame, window, size))]
            best = max(hits, key=lambda hit: face.box.overlap(hit.box), default=None)
            if best is not None and face.box.overlap(best.box) > NEAR_OVERLAP:
                found.append((*best.box.center, best.box.side, best.score))
        if len(found) < 2:
            return None
        x, y, side, _ = np.mean(found, 0)
        score = sum(score for *_, score in found) / len(NEAR_SIDES)
        return self._with_points(frame, FoundFace(Box.around((x, y), side), score, turn=face.turn))

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        """A frame without a face is searched again, small, and then a face is taken at its first sight."""
        scale = bounded(frame, ZOOM * WINDOW / smallest, QUICK_SEARCH if quick else MAX_SEARCH)
        hits = sorted(self._at(frame, scale), key=lambda hit: -hit.box.area)
        self._own.crowded |= len(hits) > MAX_FACES
        near = [face for hit in hits[:MAX_FACES] if (face := self.near(frame, hit)) is not None]
        if (faces := apart([face for face in near if face.score >= LEAST_SCORE])) or quick:
            return faces
        for scale in (plain := min(1.0, PLAIN / max(frame.shape[:2])), 2 * plain):
            if hits := self._at(frame, scale):
                return [self.near(frame, hit) or hit for hit in hits]
        return []

    def _at(self, frame: Image, scale: float) -> list[FoundFace]:
        """The faces as dlib gives them in the frame scaled by ``scale``."""
        return [hit.placed(zoom(1 / scale)) for hit in self._hits(scaled(frame, scale))]

    def _hits(self, image: Image) -> list[FoundFace]:
        """The faces as dlib gives them; in colour, because in grey fewer are found.  From a view of a larger picture
        dlib reads other memory."""
        found = zip(*self._detector().run(np.ascontiguousarray(image), 0, 0.0)[:2], strict=True)
        return [FoundFace(_square(rectangle), float(score)) for rectangle, score in found]

    def _detector(self) -> Any:
        """The detector of the calling thread."""
        if not hasattr(self._own, "detector"):
            self._own.detector = require("dlib").get_frontal_face_detector()
        return self._own.detector


CNN_SEARCH = 1e6
"""Maximum number of pixels that dlib's network searches on a CPU, where a million takes six seconds: --min-face is then
met in frames of up to a million pixels divided by the square of 80 / --min-face."""


CNN_TO_DLIB = (1.05, 0.06)
"""Side of the HOG finder's square divided by the network's, and its shift right and down in sides: medians over 16
faces in photographs."""


class DlibCnnFinder(FaceFinder):
    """dlib's MMOD network.  Raises UsageError without dlib or a model file."""

    name, shake = "dlib-cnn", 0.08

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._on_gpu = bool(getattr(require("dlib"), "DLIB_USE_CUDA", False))
        self._detector()

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        pixels = CNN_SEARCH if not self._on_gpu else QUICK_SEARCH if quick else MAX_SEARCH
        scale = bounded(frame, WINDOW / smallest, pixels)
        hits = self._detector()(scaled(frame, scale), 0)
        found = [FoundFace(_square(hit.rect), float(hit.confidence)).placed(zoom(1 / scale)) for hit in hits]
        return [face._replace(box=self._like_hog(face.box)) for face in found]

    @staticmethod
    def _like_hog(box: Box) -> Box:
        x, y = (c + CNN_TO_DLIB[1] * box.side for c in box.center)
        return Box.around((x, y), CNN_TO_DLIB[0] * box.side)

    def _detector(self) -> Any:
        if not hasattr(self._own, "detector"):
            if self.config.face_model is None:
                raise UsageError("--faces dlib-cnn: needs --face-model mmod_human_face_detector.dat "
                                 "(from https://github.com/davisking/dlib-models)")  # fmt: skip
            path = existing_file(self.config.face_model, "--face-model")
            try:
                self._own.detector = require("dlib").cnn_face_detection_model_v1(str(path))
            except RuntimeError as error:
                raise UsageError(f"--face-model {path}: not a face detector of dlib ({error})") from error
        return self._own.detector


def _square(rectangle: Any) -> Box:
    """A dlib.rectangle as a square of the same centre and area."""
    center = (rectangle.left() + rectangle.right() + 1) / 2, (rectangle.top() + rectangle.bottom() + 1) / 2
    return Box.around(center, math.sqrt(max(rectangle.width() * rectangle.height(), 1)))
