"""A frame to face crops: dlib's HOG detector, a square box 1.3 times the longest side, resized."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import UsageError

MARGIN = 1.3
"""Side of the crop over the longest side of the detection, the habit of FaceForensics++."""
DETECT_SIDE = 640
"""Frames are shrunk to this longest side before detection; dlib's smallest face is 80 pixels, 40 when upsampled."""


class Box(NamedTuple):
    """A face in pixels of the frame; right and bottom are exclusive.  May reach over the frame's edge."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)


class FaceDetector:
    """dlib's frontal face detector.  Raises UsageError when dlib is not installed."""

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise UsageError("dlib is not installed; run: pip install dlib-bin") from error
        self._detect = dlib.get_frontal_face_detector()

    def __call__(self, image: NDArray[np.uint8]) -> list[Box]:
        """Faces in an RGB frame [H, W, 3], largest first.  One without a face is searched again at twice the size."""
        height, width = image.shape[:2]
        scale = min(1.0, DETECT_SIDE / max(height, width))
        small = image
        if scale < 1:
            side = (max(1, round(width * scale)), max(1, round(height * scale)))
            small = cv2.resize(image, side, interpolation=cv2.INTER_AREA)
        small = np.ascontiguousarray(small)
        found = self._detect(small, 0) or self._detect(small, 1)
        boxes = [Box(*(round(v / scale) for v in (r.left(), r.top(), r.right() + 1, r.bottom() + 1))) for r in found]
        return sorted(boxes, key=lambda box: -box.area)


def crop_face(image: NDArray[np.uint8], box: Box, size: int, margin: float = MARGIN) -> NDArray[np.uint8]:
    """The square around ``box`` enlarged by ``margin``, resized to [size, size, 3]; edges are replicated outside."""
    side = max(1, round(max(box.right - box.left, box.bottom - box.top) * margin))
    left, top = (box.left + box.right - side) // 2, (box.top + box.bottom - side) // 2
    height, width = image.shape[:2]
    before = (max(-top, 0), max(-left, 0))
    after = (max(top + side - height, 0), max(left + side - width, 0))
    part = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    if any(before + after):
        part = cv2.copyMakeBorder(part, before[0], after[0], before[1], after[1], cv2.BORDER_REPLICATE)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
