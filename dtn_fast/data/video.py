"""Reading of videos as upright RGB frames, with one-line errors.

torchcodec gives the same bits no faster (24 of 600 frames: 1.5 times as long), but its wheel needs CUDA's libraries and
a separate FFmpeg, and it failed on an MPEG-TS file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.even_spacing import Wanted, chosen
from dtn_fast.data.hdr import is_hdr, to_sdr
from dtn_fast.data.pictures import turned
from dtn_fast.data.video_index import Check, VideoIndex, index_of, open_video, packets_of, video_stream
from dtn_fast.errors import MediaError, reason
from dtn_fast.packages import require


class Frame(NamedTuple):
    number: int
    """Position in the video, from 0."""
    seconds: float
    """Time from the first frame."""
    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    end: float = 0.0
    """Time from the first frame at which the next one appears."""


@dataclass
class Reading:
    """Count of the frames of one video, picture or folder of pictures that were read."""

    asked: int = 0
    """Number of frames asked for; all frames when all were."""
    lost: int = 0
    """Number of these that could not be decoded."""
    total: int = 0
    """Number of frames in the file."""
    missing: int = 0
    """Number of frames lost to damage: those that the header states and the file lacks, or gaps in its clock."""
    seconds: float = 0.0
    """Length in seconds; 0: a still picture."""
    pages: int = 1
    """Number of pictures in the file, of which the first is read, unless they are one moving picture."""

    @property
    def share(self) -> float:
        """Share of the frames that was lost or is missing: the larger of the two."""
        return max(self.lost / max(self.asked, 1), self.missing / max(self.total + self.missing, 1))

    def note(self) -> str:
        """What was lost, in words; empty: nothing."""
        whole = self.total + self.missing
        parts = [f"{self.lost} of {self.asked} frames could not be decoded"] * bool(self.lost)
        parts += [f"{self.missing} of {whole} frames are missing from the file"] * bool(self.missing)
        parts += [f"only the first of its {self.pages} pages was read"] * (self.pages > 1)
        return ", ".join(parts)


def read_frames(
    path: Path,
    count: Wanted = None,
    threads: int = 0,
    check: Check = lambda: None,
    reading: Reading | None = None,
) -> Iterator[Frame]:
    """Yields the upright frames of a video in order: all, or those that ``count`` names.

    With ``count`` only the frames that a requested frame depends on are decoded: whole groups of pictures are skipped
    and, with one decoder thread, frames that no other frame refers to; the requested frames do not change.
    ``threads``: number of decoder threads, 0 for one per core.  A damaged stretch is passed over: its frames are left
    out, the others keep their numbers, and ``reading`` counts both.  Raises MediaError when the file is not a video or
    no frame of it can be decoded.  The length of a truncated video is counted, not taken from its header.
    """
    av = require("av")

    reading = Reading() if reading is None else reading
    index = index_of(path, check)
    clip, wanted = index, chosen(index.times, count)
    reading.asked = index.total if wanted is None else len(wanted)
    reading.total, reading.missing, reading.seconds = index.total, index.missing, index.seconds
    last, given = -1, 0
    if wanted is not None:
        for number, image in _jump(path, index, wanted, threads, check):
            last, given = number, given + 1
            yield _frame(number, image, clip)
        if not wanted or last == wanted[-1]:
            reading.lost = reading.asked - given
            return
    problem, first = "the video holds no frame", 0
    numbered = lambda: _numbered(_decoded(path, threads, check), index)
    try:
        if last < 0 and (first := next((number for number, _ in numbered()), 0)):
            clip = index.after(first)  # frames before the first that can be decoded do not count
            wanted = chosen(clip.times, count)
            reading.asked = clip.total if wanted is None else len(wanted)
            reading.missing += first * index.begins_whole
            reading.seconds = clip.seconds
        numbers = None if wanted is None else set(wanted)
        for number, image in numbered():
            if number - first > last and (numbers is None or number - first in numbers):
                last, given = number - first, given + 1
                yield _frame(last, image, clip)
    except (av.FFmpegError, OSError, ValueError) as error:
        problem = f"cannot read this video ({reason(error)})"
    if last < 0:
        raise MediaError(f"{path}: {problem}")
    reading.lost = max(reading.asked - given, 0)


def frame_numbers(path: Path, count: int, check: Check = lambda: None) -> list[int]:
    """Numbers of the frames that ``read_frames(path, count)`` gives of an undamaged video.  Raises MediaError when it
    cannot be read."""
    return chosen(index_of(path, check).times, count) or []


def _decoded(path: Path, threads: int, check: Check) -> Iterator[Any]:
    """Every frame in order, None in place of one that cannot be decoded.  Raises av.FFmpegError when none can."""
    av = require("av")

    good, problem = 0, None
    with open_video(path) as container:
        for packet in packets_of(container, video_stream(container, path, threads)):
            check()
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                problem = error
                yield None
                continue
            for frame in frames:
                good += 1
                yield None if frame.is_corrupt else frame
    if not good and problem is not None:
        raise problem


def _numbered(frames: Iterator[Any], index: VideoIndex) -> Iterator[tuple[int, Any]]:
    """Yields (number, frame) of those that could be decoded: by their timestamps or, where these are inexact, counted
    from the number of the first."""
    begin = None
    for place, frame in enumerate(frames):
        if frame is not None:
            if begin is None:
                begin = index.places.get(frame.pts, place) - place
            yield index.numbers.get(frame.pts, place + begin), frame


def _jump(path: Path, index: VideoIndex, numbers: list[int], threads: int, check: Check) -> Iterator[tuple[int, Any]]:
    """Yields (number, frame) of these frames, with as little decoding as possible; stops at the first one not found."""
    av = require("av")

    try:
        with open_video(path) as container:
            stream = video_stream(container, path, threads)
            for start, wanted in index.segments(numbers):
                if start is not None:
                    container.seek(start, stream=stream)
                end = max(wanted)
                for number, raw in _decode(container, stream, index, wanted, threads == 1, check):
                    if number in wanted:
                        if number > min(wanted):
                            return
                        wanted.discard(number)
                        yield number, raw
                    if not wanted or number > end:
                        break
                if wanted:
                    return
    except (av.FFmpegError, OSError, ValueError):
        return


def _decode(
    container: Any, stream: Any, index: VideoIndex, wanted: set[int], skip: bool, check: Check
) -> Iterator[tuple[int, Any]]:
    """Yields (number, frame) from the container's position on; without usable timestamps, frames count from the
    first."""
    position = -1
    for packet in container.demux(stream):
        check()
        if skip and index.numbers:  # applies per packet: not to be set while other threads decode ahead
            number = index.numbers.get(packet.pts)
            stream.codec_context.skip_frame = "DEFAULT" if number is None or number in wanted else "NONREF"
        for frame in packet.decode():
            if index.numbers:
                position = index.numbers.get(frame.pts, -1)
            else:
                position = position + 1 if position >= 0 else index.places.get(frame.pts, 0)
            yield position, frame


def _frame(number: int, raw: Any, clip: VideoIndex) -> Frame:
    seconds, end = clip.span(number)
    return Frame(number, seconds, _shown(raw, clip.pixel_aspect), end)


def _shown(frame: Any, pixel_aspect: float) -> NDArray[np.uint8]:
    """A decoded frame as a player shows it: square pixels, turned and mirrored as its display matrix says, SDR."""
    image = to_sdr(frame) if is_hdr(frame) else frame.to_ndarray(format="rgb24")
    if pixel_aspect != 1:
        wide, high = max(pixel_aspect, 1.0), max(1 / pixel_aspect, 1.0)
        image = cv2.resize(image, (round(frame.width * wide), round(frame.height * high)))
    return np.ascontiguousarray(turned(image, orientation(frame)), np.uint8)


def orientation(frame: Any) -> int:
    """The EXIF orientation (1 to 8) nearest to a frame's display matrix, 1 without one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]  # x' = a x + c y, y' = b x + d y
    if abs(int(a)) + abs(int(d)) >= abs(int(b)) + abs(int(c)):
        return {(True, True): 1, (False, True): 2, (False, False): 3, (True, False): 4}[bool(a >= 0), bool(d >= 0)]
    return {(True, True): 5, (False, True): 6, (False, False): 7, (True, False): 8}[bool(c >= 0), bool(b >= 0)]
