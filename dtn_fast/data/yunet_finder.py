"""OpenCV's face finder YuNet, whose boxes are mapped to the square of dlib's HOG finder: the centre from the landmarks,
the side from the box's area, neither of which changes when the head is turned.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.config import FinderConfig
from dtn_fast.data.faces import Box, FoundFace
from dtn_fast.data.finder_base import (
    MAX_SEARCH,
    QUICK_SEARCH,
    FaceFinder,
    Image,
    apart,
    bounded,
    existing_file,
    scaled,
)
from dtn_fast.errors import UsageError
from dtn_fast.packages import require

YUNET = ("opencv/face_detection_yunet", "face_detection_yunet_2026may.onnx")
"""Repository of the Hugging Face hub, and file in it."""
YUNET_SHA256 = "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0"
YUNET_SCORE = 0.7
"""Least score of a face."""
YUNET_SIDE = 18
"""Side in pixels that the smallest face is scaled to; YuNet finds most from 10 pixels."""
AGAIN = 0.7
"""Second scale, as a share of the first, at which faces are searched that hide between scales: it added two of 79."""
YUNET_FRAME = 192
"""Shorter side in pixels that smaller frames are enlarged to, by two at most; in tiny ones YuNet misses faces."""
YUNET_LARGEST = 20
"""Side of the largest face to be relied on, as a multiple of YUNET_SIDE; larger ones are searched in a smaller copy."""
TO_DLIB = 0.94
"""Side of dlib's square divided by the root of the area of YuNet's box: 0.96 over 72 faces in photographs, 0.92 over
170 rendered ones (medians).  Its centre is the middle between eyes and mouth, to 1 % of the side."""


class YunetFinder(FaceFinder):
    """OpenCV's FaceDetectorYN, with five landmarks.  Raises UsageError when its model cannot be had or read."""

    name, shake = "yunet", 0.05

    def __init__(self, config: FinderConfig = FinderConfig()) -> None:
        super().__init__(config)
        self._path = fetch_yunet() if config.face_model is None else existing_file(config.face_model, "--face-model")
        self._detector()

    def _search(self, frame: Image, smallest: float, quick: bool = False) -> list[FoundFace]:
        scale = min(max(YUNET_SIDE / smallest, YUNET_FRAME / min(frame.shape[:2])), 2.0)
        scale = bounded(frame, scale, QUICK_SEARCH if quick else MAX_SEARCH)
        if quick:
            return self._at(frame, scale)
        found = apart([*self._at(frame, scale), *self._at(frame, AGAIN * scale)])
        while min(frame.shape[:2]) * scale > 1.5 * YUNET_SIDE * YUNET_LARGEST:
            scale = max(scale / 4, YUNET_SIDE * YUNET_LARGEST / min(frame.shape[:2]))
            found = apart([*found, *self._at(frame, scale)])
        return found

    def _at(self, frame: Image, scale: float) -> list[FoundFace]:
        image = cv2.cvtColor(scaled(frame, scale), cv2.COLOR_RGB2BGR)
        detector, size = self._detector(), (image.shape[1], image.shape[0])
        if tuple(detector.getInputSize()) != size:
            detector.setInputSize(size)
        rows = detector.detect(image)[1]
        return [self._face(row / scale, float(row[14])) for row in (rows if rows is not None else ())]

    @staticmethod
    def _face(row: NDArray[np.float32], score: float) -> FoundFace:
        points = row[4:14].reshape(5, 2)
        x, y = (points[:2].mean(0) + points[3:].mean(0)) / 2
        side = TO_DLIB * math.sqrt(max(float(row[2] * row[3]), 0.0))
        return FoundFace(Box.around((float(x), float(y)), side), score, points.astype(np.float32))

    def _detector(self) -> Any:
        if not hasattr(self._own, "detector"):
            try:
                with quiet_opencv():
                    detector = cv2.FaceDetectorYN.create(str(self._path), "", (64, 64), YUNET_SCORE, 0.3, 5000)
                    detector.detect(np.zeros((64, 64, 3), np.uint8))
            except cv2.error as error:
                raise UsageError(f"--face-model {self._path}: OpenCV {cv2.__version__} cannot run it as YuNet "
                                 f"({error.err or error}); use {YUNET[1]}") from error  # fmt: skip
            self._own.detector = detector
        return self._own.detector


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV from logging, one thread at a time; it warns of its own defaults."""
    with _LOGGING:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        finally:
            cv2.utils.logging.setLogLevel(level)


_LOGGING = threading.Lock()


def fetch_yunet() -> Path:
    """YuNet's model file: fetched from the Hugging Face hub once and kept in its cache.

    Raises UsageError when it cannot be fetched or is not the pinned file.
    """
    hub = require("huggingface_hub")
    by_hand = f"download {YUNET[1]} from https://huggingface.co/{YUNET[0]} and name it with --face-model"
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)  # a line for each attempt
    try:
        there = hub.try_to_load_from_cache(*YUNET)  # without asking the hub whether the file has changed
        path = Path(there if isinstance(there, str) else hub.hf_hub_download(*YUNET))
    except Exception as error:  # the hub's, requests', httpx's and the file system's errors have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"--faces yunet: its model cannot be fetched ({reason}); {by_hand}") from error
    finally:
        log.setLevel(level)
    if hashlib.sha256(path.read_bytes()).hexdigest() != YUNET_SHA256:
        raise UsageError(f"{path}: not the file whose checksum is pinned; delete it, or {by_hand}")
    return path
