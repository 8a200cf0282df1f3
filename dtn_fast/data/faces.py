"""Faces in a frame: their boxes and landmarks, and the square crops cut around them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.model.config import CropPolicy

IBUG = 68
"""Number of landmarks from which on they are numbered as in iBUG 300-W; fewer are the five of :class:`FoundFace`."""


class Box(NamedTuple):
    """A face box in pixels of the frame; right and bottom are exclusive.  It may extend beyond the frame.

    Every face finder gives the square that dlib's HOG finder would give, so that crops of one fit a model trained on
    another's.
    """

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    @property
    def side(self) -> int:
        """The longer side."""
        return max(self.right - self.left, self.bottom - self.top)

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def overlap(self, other: Box) -> float:
        """Intersection over union."""
        both = Box(max(self.left, other.left), max(self.top, other.top),
                   min(self.right, other.right), min(self.bottom, other.bottom)).area  # fmt: skip
        return both / max(self.area + other.area - both, 1)

    @classmethod
    def around(cls, center: tuple[float, float], side: float) -> Box:
        """The square of this side, in whole pixels, around ``center``."""
        whole = max(1, round(side))
        left, top = round(center[0] - whole / 2), round(center[1] - whole / 2)
        return cls(left, top, left + whole, top + whole)


class FoundFace(NamedTuple):
    box: Box
    score: float
    """Confidence of the face finder, on its own scale; larger is surer."""
    points: NDArray[np.float32] | None = None
    """Landmarks [K, 2] (x, y) in pixels of the frame, NaN where unknown; None: the finder gives none.  K = 5: right
    eye, left eye, nose, right and left corner of the mouth, left and right as the person's own; 68 and more: numbered
    as in iBUG 300-W."""
    turn: int = 0
    """Degrees that the frame was turned by, anticlockwise, when the face was found."""

    def placed(self, matrix: NDArray[np.float64]) -> FoundFace:
        """The same face in a frame that an affine map [2, 3] without shear, from this one, leads to."""
        (a, b, _), (c, d, _) = matrix.tolist()
        center = mapped(matrix, np.array([self.box.center]))[0]
        box = Box.around((center[0], center[1]), self.box.side * math.sqrt(abs(a * d - b * c)))
        points = None if self.points is None else mapped(matrix, self.points).astype(np.float32)
        return self._replace(box=box, points=points)


def mapped(matrix: NDArray[np.float64], points: NDArray[Any]) -> NDArray[np.float64]:
    """Points [K, 2] mapped by an affine map [2, 3].  Written out, because a matrix product's last bit may differ from
    call to call, and boxes are rounded to pixels."""
    return np.stack([row[0] * points[:, 0] + row[1] * points[:, 1] + row[2] for row in matrix], 1)


def _joined(second: NDArray[np.float64], first: NDArray[np.float64]) -> NDArray[np.float64]:
    """The affine map [2, 3] that does ``first``, then ``second``."""
    linear = mapped(second, first[:, :2].T).T - second[:, 2:]
    return np.hstack([linear, mapped(second, first[:, 2:].T).T])


def eyes(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """The person's right and left eye [2, 2] from landmarks [K, 2]."""
    if len(points) >= IBUG:
        return np.stack([points[36:42].mean(0), points[42:48].mean(0)])
    return points[:2]


def roll(points: NDArray[np.float32] | None) -> float | None:
    """Degrees by which a face is turned clockwise in the picture, from its eyes; None without landmarks of both."""
    if points is None or not np.isfinite(pair := eyes(points)).all():
        return None
    x, y = pair[1] - pair[0]
    return math.degrees(math.atan2(y, x))


class Cut(NamedTuple):
    """The part of a frame that a crop shows: a square, which may be turned."""

    center: tuple[float, float]
    side: int
    degrees: float = 0.0
    """Angle by which the square is turned clockwise in the frame."""

    def matrix(self, size: int) -> NDArray[np.float64]:
        """The affine map [2, 3] from pixels of the frame to pixels of the crop of ``size`` pixels."""
        zoom, angle = size / self.side, math.radians(self.degrees)
        a, b, (x, y) = zoom * math.cos(angle), zoom * math.sin(angle), self.center
        return np.array([[a, b, size / 2 - a * x - b * y], [-b, a, size / 2 + b * x - a * y]])

    def placed(self, points: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        """Points [K, 2] of the frame in pixels of the crop."""
        return mapped(self.matrix(size), points).astype(np.float32)


def cut_of(box: Box, degrees: float | None, policy: CropPolicy) -> Cut:
    """The part of a frame that ``policy`` shows of a face: the square around its box, enlarged by the margin and, with
    alignment, turned by the angle of the eyes, so that they are level.

    degrees: clockwise angle of the eyes, as :func:`roll` gives it; None: unknown, no turn.
    """
    side = max(1, round(box.side * policy.margin))
    if degrees and policy.align == "landmarks":
        return Cut(box.center, side, degrees)
    left, top = (box.left + box.right - side) // 2, (box.top + box.bottom - side) // 2
    return Cut((left + side / 2, top + side / 2), side)


def crop_face(image: NDArray[np.uint8], cut: Cut, size: int) -> NDArray[np.uint8]:
    """The part ``cut`` of a frame [H, W] or [H, W, C], resized to ``size`` pixels; outside the frame, its edge pixels
    are repeated."""
    side, height, width = cut.side, *image.shape[:2]
    if cut.degrees:  # the upright square that holds the turned one, resized, then turned
        angle = math.radians(cut.degrees)
        grown = math.ceil(side * (abs(math.cos(angle)) + abs(math.sin(angle)))) + 2
        left, top = round(cut.center[0] - grown / 2), round(cut.center[1] - grown / 2)
        wide = round(size * grown / side)
        upright = Cut((left + grown / 2, top + grown / 2), grown)
        # crop <- frame <- upright, between the middles of pixels
        turn = _joined(cut.matrix(size), cv2.invertAffineTransform(upright.matrix(wide)))
        turn[:, 2] += (turn[:, 0] + turn[:, 1] - 1) / 2
        return cv2.warpAffine(crop_face(image, upright, wide), turn, (size, size), flags=cv2.INTER_LINEAR,
                              borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
    left, top = round(cut.center[0] - side / 2), round(cut.center[1] - side / 2)
    before = (max(-top, 0), max(-left, 0))
    after = (max(top + side - height, 0), max(left + side - width, 0))
    part = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    if not part.size:  # wholly outside: its nearest pixel alone
        x, y = (min(max(round(c), 0), limit - 1) for c, limit in zip(cut.center, (width, height), strict=True))
        return np.broadcast_to(image[y, x], (size, size, *image.shape[2:])).copy()
    if any(before + after):
        part = cv2.copyMakeBorder(part, before[0], after[0], before[1], after[1], cv2.BORDER_REPLICATE)
    return resize_square(part, size)


def resize_square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resizes an image [H, W] or [H, W, C] to ``size`` x ``size``, by averaging when it shrinks."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = min(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
