"""OpenCV's face finder YuNet, whose boxes are mapped to the square of dlib's HOG finder: the centre from the landmarks,
the side from the box's area, neither of which changes when the head is turned.

onnxruntime runs it 1.3 to 1.7 times as fast as cv2.FaceDetectorYN does, on one core; what both find differs by less
than a thousandth of a pixel.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

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
from dtn_fast.onnx_session import CPU, Provider, session_of
from dtn_fast.packages import require

YUNET = ("opencv/face_detection_yunet", "face_detection_yunet_2026may.onnx")
"""Repository of the Hugging Face hub, and file in it."""
YUNET_SHA256 = "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0"
YUNET_SCORE = 0.7
"""Least score of a face."""
YUNET_OVERLAP = 0.3
"""Overlap of two boxes above which the less sure one is dropped."""
YUNET_MOST = 5000
"""Number of boxes, the surest, that overlaps are looked for among."""
YUNET_STRIDES = (8, 16, 32)
"""Pixels between the places at which the network looks for small, middling and large faces."""
YUNET_OUTPUTS = tuple(f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in YUNET_STRIDES)
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
    """YuNet, with five landmarks.  Raises UsageError when its model or onnxruntime cannot be had, or not on
    ``provider``."""

    name, shake = "yunet", 0.05

    def __init__(self, config: FinderConfig = FinderConfig(), provider: Provider = CPU) -> None:
        super().__init__(config)
        path = fetch_yunet() if config.face_model is None else existing_file(config.face_model, "--face-model")
        name = f"--face-model {path} (use {YUNET[1]})"
        # one thread: videos and their frames are searched beside each other, and a network so small gains little
        self._session = session_of(str(path), name, provider, threads=1, option="--face-device")
        try:
            self._rows(np.zeros((64, 64, 3), np.uint8))
        except Exception as error:  # onnxruntime raises its own classes, one per status
            raise UsageError(f"{name}: onnxruntime cannot run it as YuNet ({str(error)[:200]})") from error

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
        return [self._face(row / scale, float(row[14])) for row in self._rows(scaled(frame, scale))]

    def _rows(self, image: Image) -> NDArray[np.float32]:
        """Faces [N, 15] in an RGB image as cv2.FaceDetectorYN gives them: left, top, width, height, five landmarks,
        score."""
        bottom, right = -image.shape[0] % YUNET_STRIDES[-1], -image.shape[1] % YUNET_STRIDES[-1]
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
        outputs = self._session.run(YUNET_OUTPUTS, {"input": cv2.dnn.blobFromImage(image, swapRB=True)})
        found = []
        for stride, *maps in zip(YUNET_STRIDES, *(outputs[k : k + 3] for k in (0, 3, 6, 9)), strict=True):
            kinds, objects, boxes, points = (array[0] for array in maps)
            scores = np.sqrt(kinds.clip(0, 1) * objects.clip(0, 1))  # [places, 1]
            kept = np.flatnonzero(scores >= YUNET_SCORE)
            places = np.stack([kept % (image.shape[1] // stride), kept // (image.shape[1] // stride)], 1)
            center, size = (boxes[kept, :2] + places) * stride, np.exp(boxes[kept, 2:]) * stride
            landmarks = (points[kept] + np.tile(places, 5)) * stride
            found.append(np.hstack([center - size / 2, size, landmarks, scores[kept]]))
        rows = np.concatenate(found).astype(np.float32)
        whole = rows[:, :4].astype(int).tolist()
        return rows[list(cv2.dnn.NMSBoxes(whole, rows[:, 14].tolist(), YUNET_SCORE, YUNET_OVERLAP, top_k=YUNET_MOST))]

    @staticmethod
    def _face(row: NDArray[np.float32], score: float) -> FoundFace:
        points = row[4:14].reshape(5, 2)
        x, y = (points[:2].mean(0) + points[3:].mean(0)) / 2
        side = TO_DLIB * math.sqrt(max(float(row[2] * row[3]), 0.0))
        return FoundFace(Box.around((float(x), float(y)), side), score, points.astype(np.float32))


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
