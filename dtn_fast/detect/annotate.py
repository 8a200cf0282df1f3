"""Pictures and copies of videos with every face framed, and the forged spans at a video's bottom."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.video import Frame
from dtn_fast.data.video_writer import write_timed
from dtn_fast.detect.limits import Limits
from dtn_fast.detect.regions import Region, draw, moved
from dtn_fast.detect.verdict import Face, FrameResult, Result, Span

MARK = "annotated copy by dtn-fast"
"""Comment stored with an annotated copy, which is no input of its own when its folder is searched."""
RED = (220, 40, 40)
COLORS = {"fake": RED, "real": (30, 160, 70), "uncertain": (190, 120, 0)}


def annotate(result: Result, out: Path) -> Iterator[int]:
    """Writes the video of ``result`` to ``out`` (.mp4), every face framed with its score, forged spans at the bottom;
    every frame appears when it does in the video.

    Boxes are interpolated between the analysed frames.  Yields the number of frames written.
    """
    tracks: dict[int, list[tuple[int, Face]]] = {}
    for frame in result.frames:
        for face in frame.faces:
            tracks.setdefault(face.person, []).append((frame.number, face))
    end, limits = result.reading.seconds, result.frame_limits
    frames = (
        (frame.seconds, _drawn(frame, tracks, result.spans, end, limits)) for frame in frames_of(result.path, None)
    )
    yield from write_timed(out, frames, result.reading.total / end, end=end, comment=MARK)


def framed(image: NDArray[np.uint8], frames: list[FrameResult], limits: Limits, side: int) -> NDArray[np.uint8]:
    """A copy of a still picture with the faces of its only frame framed, its longer side at most ``side`` pixels."""
    scale = min(1.0, side / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image.copy()
    faces = [face for frame in frames for face in frame.faces]
    for face in faces:
        box = Box(*(round(place * scale) for place in face.box))
        regions = moved(face.regions or (), face.box, box)
        _frame_face(image, box, face.score, face.person if len(faces) > 1 else None, limits, regions)
    return image


def _drawn(
    frame: Frame, tracks: dict[int, list[tuple[int, Face]]], spans: list[Span], end: float, limits: Limits
) -> NDArray[np.uint8]:
    image = frame.image.copy()
    height, width = image.shape[:2]
    for person, track in tracks.items():
        found = _at(track, frame.number)
        if found is not None:
            box, score, regions = found
            _frame_face(image, box, score, person if len(tracks) > 1 else None, limits, regions)
    bar = max(4, height // 60)
    image[height - bar :] = (40, 40, 40)
    for span in spans:
        left = int(width * span.start / end)
        image[height - bar :, left : max(left + 2, int(width * span.end / end))] = RED
    now, thick = min(int(width * frame.seconds / end), width - 1), _thickness(image)
    image[height - 2 * bar :, max(now - thick, 0) : now + thick] = 255
    return image


def _thickness(image: NDArray[np.uint8]) -> int:
    return max(1, round(min(image.shape[:2]) / 240))


def _frame_face(
    image: NDArray[np.uint8], box: Box, score: float, person: int | None, limits: Limits, regions: tuple[Region, ...]
) -> None:
    """Draws a face's box and verdict into ``image``, with the person's number if there is one; of a face called fake
    its forged regions too."""
    thick, size = _thickness(image), max(0.4, min(image.shape[:2]) / 800)
    verdict = limits.verdict(score)
    color = COLORS[verdict]
    if verdict == "fake":
        draw(image, regions, color, thick)
    cv2.rectangle(image, (box.left, box.top), (box.right, box.bottom), color, 2 * thick)
    text = f"{verdict} {score:.2f}" + ("" if person is None else f" #{person}")
    (wide, high), low = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thick)
    left, base = max(box.left, 0), max(box.top - low, high + low)
    cv2.rectangle(image, (left - thick, base - high - low), (left + wide + thick, base + low), color, cv2.FILLED)
    cv2.putText(image, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), thick, cv2.LINE_AA)


def _at(track: list[tuple[int, Face]], number: int) -> tuple[Box, float, tuple[Region, ...]] | None:
    """Box, score and forged regions of a person at a frame, interpolated between analysed frames, the regions those of
    the nearer one moved along; None outside the track."""
    place = bisect.bisect_left(track, number, key=lambda item: item[0])
    if place == len(track) or (track[place][0] > number and not place):
        return None
    after = track[place]
    before = after if after[0] == number else track[place - 1]
    (n0, a), (n1, b) = before, after
    share = (number - n0) / (n1 - n0) if n1 > n0 else 0.0
    box = Box(*(round(p + (q - p) * share) for p, q in zip(a.box, b.box, strict=True)))
    near = a if share < 0.5 else b
    return box, a.score + (b.score - a.score) * share, moved(near.regions or (), near.box, box)
