"""The forged one of several faces: a fake's mask, frame by frame, and the face that it touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.face_tracker import Tracked
from dtn_fast.data.faces import Box
from dtn_fast.data.lmdb_store import open_lmdb
from dtn_fast.data.masks import FORGED
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video import Frame, frame_numbers, read_frames
from dtn_fast.data.video_table import Video, VideoTable
from dtn_fast.errors import MediaError

Mask = NDArray[np.uint8]
TOUCHED = 0.01
"""Least share of a face's box that the mask covers if the face is forged."""

MaskOf = Callable[[Frame], Mask | None]
"""The mask [H, W] of a frame, as large as the frame; None: the dataset has none for it.  Called in frame order."""


def masks_of(table: VideoTable, video: Video, count: int) -> MaskOf | None:
    """The masks of a fake of which ``count`` frames are read, or None when the dataset has none.

    The function raises MediaError when a mask cannot be read.
    """
    if not video.mask:
        return None
    if video.frames:
        names = {int(Path(name).stem): name for name in video.frames if Path(name).stem.isdecimal()}

        def picture(frame: Frame) -> Mask | None:
            if frame.number not in names:
                return None
            name = f"{video.mask}/{Path(names[frame.number]).name}"
            if table.lmdb:
                store = open_lmdb(table.lmdb)
                return _fitted(store.image(name), frame) if name in store else None
            return _fitted(read_image(table.root / name), frame) if (table.root / name).is_file() else None

        return picture
    path = table.root / video.mask
    if not path.is_file():
        return None
    frames: Iterator[Frame] = read_frames(path, frame_numbers(table.root / video.path, count), threads=1)
    ahead: list[Frame] = []

    def next_mask(frame: Frame) -> Mask | None:
        while not ahead or ahead[0].number < frame.number:
            following = next(frames, None)
            if following is None:
                return None
            ahead[:] = [following]
        return _fitted(ahead[0].image, frame) if ahead[0].number == frame.number else None

    return next_mask


def forged_faces(faces: Sequence[Tracked], mask: Mask) -> list[Tracked]:
    """The faces that a mask [H, W] touches, the most touched one first."""
    marked = cv2.integral((mask >= FORGED).astype(np.uint8))
    pixels = [_inside(marked, face.box) for face in faces]
    order = sorted(range(len(faces)), key=lambda number: -pixels[number])
    return [faces[number] for number in order if pixels[number] >= TOUCHED * faces[number].box.area]


def _inside(sums: NDArray[np.int32], box: Box) -> int:
    """Number of marked pixels in a box, from the integral image [H + 1, W + 1]."""
    left, right = np.clip((box.left, box.right), 0, sums.shape[1] - 1)
    top, bottom = np.clip((box.top, box.bottom), 0, sums.shape[0] - 1)
    return int(sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left])


def _fitted(image: NDArray[np.uint8], frame: Frame) -> Mask:
    mask = image.max(2)
    height, width = frame.image.shape[:2]
    if abs(mask.shape[1] / mask.shape[0] - width / height) > 0.02 * width / height:
        raise MediaError(f"the mask of frame {frame.number} is {mask.shape[1]}x{mask.shape[0]}, the frame "
                         f"{width}x{height}")  # fmt: skip
    return mask if mask.shape == (height, width) else cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
