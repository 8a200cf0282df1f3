"""Face crops of a frame: dlib's HOG face finder, a square around each face enlarged by a margin, resized.

norfair and ByteTrack link boxes that were found, but cannot search near the last ones: with a search of the whole frame
at every eighth, they kept 12 % and 4 % of the faces in 24 frames, FaceTracker all.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.packages import require

DETECT_SIDE = 640
"""Longest side that frames are shrunk to for face finding; dlib finds faces from 80 pixels, from 40 when upsampled."""
NEAR_SIDE = 110
"""Side in pixels that a face is scaled to when it is searched near its place in the previous frame."""
MEMORY = 8
"""Number of frames for which a lost face keeps its person number."""


class Box(NamedTuple):
    """A face box in pixels of the frame; right and bottom are exclusive.  It may extend beyond the frame."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    def moved(self, x: int, y: int) -> Box:
        return Box(self.left + x, self.top + y, self.right + x, self.bottom + y)

    def overlap(self, other: Box) -> float:
        """Intersection over union."""
        both = Box(max(self.left, other.left), max(self.top, other.top),
                   min(self.right, other.right), min(self.bottom, other.bottom)).area  # fmt: skip
        return both / max(self.area + other.area - both, 1)


class FaceFinder:
    """dlib's frontal face detector.  Raises UsageError when dlib is not installed."""

    def __init__(self) -> None:
        dlib = require("dlib", "dlib-bin")
        self._detect = dlib.get_frontal_face_detector()

    def __call__(self, image: NDArray[np.uint8]) -> list[Box]:
        """Faces in an RGB frame [H, W, 3], largest first; a frame without one is searched again at twice the size."""
        scale = min(1.0, DETECT_SIDE / max(image.shape[:2]))
        return self._search(image, scale, upsample=0) or self._search(image, scale, upsample=1)

    def near(self, image: NDArray[np.uint8], box: Box) -> Box | None:
        """The face that overlaps ``box`` most, or None; searches only around ``box``, at the size best for dlib."""
        side = max(box.right - box.left, box.bottom - box.top)
        left, top = max((box.left + box.right) // 2 - side, 0), max((box.top + box.bottom) // 2 - side, 0)
        window = image[top : top + 2 * side, left : left + 2 * side]
        if not side or not window.size:
            return None
        found = [b.moved(left, top) for b in self._search(window, NEAR_SIDE / side, upsample=0)]
        return max(found, key=box.overlap, default=None)

    def _search(self, image: NDArray[np.uint8], scale: float, upsample: int) -> list[Box]:
        height, width = image.shape[:2]
        if scale != 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        found = self._detect(np.ascontiguousarray(image), upsample)  # in colour: grey is faster but finds fewer
        boxes = [Box(*(round(v / scale) for v in (r.left(), r.top(), r.right() + 1, r.bottom() + 1))) for r in found]
        return sorted(boxes, key=lambda box: -box.area)


class Tracked(NamedTuple):
    person: int
    """Number of the face's track in this video, from 0."""
    box: Box


class FaceTracker:
    """Finds and numbers the faces of a video, given its frames in order.

    Each face is searched near its last place, which costs about a tenth of searching the whole frame.  The whole frame
    is searched for the first frame, for every ``every``-th after it (to find new faces), and whenever a face is no
    longer near its last place.  A lost person keeps the number for MEMORY more frames: a face found in the same place
    by then is the same person.
    """

    def __init__(self, finder: FaceFinder, every: int) -> None:
        self._finder, self._every = finder, every
        self._last: list[Tracked] = []
        self._lost: list[tuple[int, Tracked]] = []
        """Lost faces, each with the frame after which it is forgotten."""
        self._count = self._people = self._frame = 0

    def __call__(self, image: NDArray[np.uint8]) -> list[Tracked]:
        """Faces in the next RGB frame [H, W, 3], largest first."""
        near = None
        self._frame += 1
        if self._last and self._count % self._every:
            near = self._follow(image)
        self._count = 1 if near is None else self._count + 1
        self._last = self._link(self._finder(image)) if near is None else near
        return self._last

    def _follow(self, image: NDArray[np.uint8]) -> list[Tracked] | None:
        """The last frame's faces in this frame, or None when one is lost or two boxes overlap by half."""
        found = [Tracked(t.person, box) for t in self._last if (box := self._finder.near(image, t.box)) is not None]
        apart = all(a.box.overlap(b.box) < 0.5 for a, b in itertools.combinations(found, 2))
        return sorted(found, key=lambda t: -t.box.area) if apart and len(found) == len(self._last) else None

    def _link(self, boxes: list[Box]) -> list[Tracked]:
        """Gives each box the number of the face that it overlaps most among the last frame's and the lost faces, or a
        new number."""
        recent = [(until, face) for until, face in self._lost if until >= self._frame]
        free, linked = [*self._last, *(face for _, face in recent)], []
        for box in boxes:
            best = max(((box.overlap(t.box), t) for t in free), default=(0.0, None))[1]
            if best is not None and box.overlap(best.box) > 0.2:
                free.remove(best)
                linked.append(Tracked(best.person, box))
            else:
                linked.append(Tracked(self._people, box))
                self._people += 1
        until = {face.person: last for last, face in recent}
        self._lost = [(until.get(face.person, self._frame + MEMORY), face) for face in free]
        return linked


def crop_face(image: NDArray[np.uint8], box: Box, size: int, margin: float) -> NDArray[np.uint8]:
    """The square around ``box``, enlarged by ``margin`` and resized to [size, size, 3]; outside the frame, its edge
    pixels are repeated."""
    side = max(1, round(max(box.right - box.left, box.bottom - box.top) * margin))
    left, top = (box.left + box.right - side) // 2, (box.top + box.bottom - side) // 2
    height, width = image.shape[:2]
    before = (max(-top, 0), max(-left, 0))
    after = (max(top + side - height, 0), max(left + side - width, 0))
    part = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    if any(before + after):
        part = cv2.copyMakeBorder(part, before[0], after[0], before[1], after[1], cv2.BORDER_REPLICATE)
    return resize_square(part, size)


def resize_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resizes an image [H, W, 3] to [size, size, 3], by averaging when it shrinks."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
