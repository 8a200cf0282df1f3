"""Reading and writing of images and videos as upright RGB arrays, with one-line errors.

torchcodec gives the same bits no faster (24 of 600 frames: 1.5 times as long), but its wheel needs CUDA's libraries and
a separate FFmpeg, and it failed on an MPEG-TS file.
"""

from __future__ import annotations

import bisect
import io
import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.errors import MediaError
from dtn_fast.files import replacing

IMAGES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"])
VIDEOS = frozenset([".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"])
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts"
"""Container formats that are opened.  Playlists and scripts, which make a decoder read other files, are excluded."""
MAX_VIDEO_PIXELS = 36_000_000
"""Pixel limit per video frame (8K); lower than MAX_PIXELS because several frames are in memory at once."""
Check = Callable[[], object]
"""Function called for every packet that is read; an exception from it ends the reading."""
MAX_PIXELS = 64_000_000
"""Pixel limit per image; a larger one is refused before it is decoded (a decompression bomb or a mistake)."""


HOLE = 5
"""Number of frames from which on a gap in a regular clock is damage; smaller ones are frames that a camera dropped."""
DAMAGES = 100
"""Maximum number of errors in a container after which reading goes on."""


class Frame(NamedTuple):
    number: int
    """Position in the video, from 0."""
    seconds: float
    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads an image file as upright RGB [H, W, 3].  Raises MediaError if it is missing, truncated or not an image."""
    return _image(path, str(path))


def decode_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decodes the bytes of an image file to upright RGB [H, W, 3].  Raises MediaError naming ``name`` otherwise."""
    return _image(io.BytesIO(data), name)


def _image(file: Path | io.BytesIO, name: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageFile, ImageOps

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library may have switched this on for the whole process
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(file, formats=FORMATS) as image:  # not PostScript, which Pillow would run
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(f"{name}: {image.width}x{image.height} pixels is over the limit of {MAX_PIXELS}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: cannot read this image ({_reason(error)})") from error


@dataclass
class Reading:
    """Count of the frames of one video, or folder of pictures, that were read."""

    asked: int = 0
    """Number of frames asked for; all frames when all were."""
    lost: int = 0
    """Number of these that could not be decoded."""
    total: int = 0
    """Number of frames in the file."""
    missing: int = 0
    """Number of frames that the file's header promises, or its clock leaves room for, and the file does not hold."""

    @property
    def share(self) -> float:
        """Share of the frames that was lost or is missing: the larger of the two."""
        return max(self.lost / max(self.asked, 1), self.missing / max(self.total + self.missing, 1))

    def note(self) -> str:
        """What was lost, in words; empty: nothing."""
        parts = [f"{self.lost} of {self.asked} frames could not be decoded"] * bool(self.lost)
        parts += [f"{self.missing} of {self.total + self.missing} frames are missing from the file"] * bool(
            self.missing
        )
        return ", ".join(parts)


def read_frames(
    path: Path,
    count: int | Sequence[int] | None = None,
    threads: int = 0,
    check: Check = lambda: None,
    reading: Reading | None = None,
) -> Iterator[Frame]:
    """Yields the upright frames of a video in order; with ``count`` that many (or fewer), evenly spaced, or those with
    the given numbers.

    With ``count`` only the frames that a requested frame depends on are decoded: whole groups of pictures are skipped
    and, with one decoder thread, frames that no other frame refers to; the requested frames do not change.
    ``threads``: number of decoder threads, 0 for one per core.  A damaged stretch is passed over: its frames are left
    out, the others keep their numbers, and ``reading`` counts both.  Raises MediaError when the file is not a video or
    no frame of it can be decoded.  The length of a truncated video is counted, not taken from its header.
    """
    import av

    reading = Reading() if reading is None else reading
    index = _index(path, check)
    wanted = None if count is None else _chosen(index.total, count)
    reading.asked = index.total if wanted is None else len(wanted)
    reading.total, reading.missing = index.total, index.missing
    last, given = -1, 0
    if wanted is not None:
        for frame in _jump(path, index, wanted, threads, check):
            last, given = frame.number, given + 1
            yield frame
        if not wanted or last == wanted[-1]:
            reading.lost = reading.asked - given
            return
    problem, first = "the video holds no frame", 0
    numbered = lambda: _numbered(_decoded(path, threads, check), index)
    try:
        if last < 0:  # frames before the first that can be decoded do not count
            first = next((number for number, _ in numbered()), 0)
            wanted = None if count is None else _chosen(index.total - first, count)
            reading.asked = index.total - first if wanted is None else len(wanted)
            reading.missing += first * index.begins_whole
        for number, raw in numbered():
            if number - first > last and (wanted is None or number - first in wanted):
                last, given = number - first, given + 1
                yield _frame(last, raw)
    except (av.FFmpegError, OSError, ValueError) as error:
        problem = f"cannot read this video ({_reason(error)})"
    if last < 0:
        raise MediaError(f"{path}: {problem}")
    reading.lost = max(reading.asked - given, 0)


def frame_numbers(path: Path, count: int, check: Check = lambda: None) -> list[int]:
    """Numbers of the frames that ``read_frames(path, count)`` gives of an undamaged video.  Raises MediaError when it
    cannot be read."""
    return evenly_spaced(_index(path, check).total, count)


def _chosen(total: int, count: int | Sequence[int]) -> list[int]:
    return evenly_spaced(total, count) if isinstance(count, int) else sorted({n for n in count if n < total})


def _frame(number: int, raw: Any) -> Frame:
    return Frame(number, float(raw.time or 0.0), _upright(raw))


def _open(path: Path) -> Any:
    import av

    return av.open(str(path), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def _decoded(path: Path, threads: int, check: Check) -> Iterator[Any]:
    """Every frame in order, None in place of one that cannot be decoded.  Raises av.FFmpegError when none can."""
    import av

    good, problem = 0, None
    with _open(path) as container:
        for packet in _packets(container, _stream(container, path, threads)):
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


def _numbered(frames: Iterator[Any], index: _Index) -> Iterator[tuple[int, Any]]:
    """Yields (number, frame) of those that could be decoded: by their timestamps or, without usable ones, counted."""
    for place, frame in enumerate(frames):
        if frame is not None:
            yield index.numbers.get(frame.pts, place), frame


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets; reading goes on after an error, up to DAMAGES times."""
    import av

    for _ in range(DAMAGES):
        try:
            yield from container.demux(stream)
            return
        except av.FFmpegError as error:
            if isinstance(error, EOFError):
                return


def _jump(path: Path, index: _Index, numbers: list[int], threads: int, check: Check) -> Iterator[Frame]:
    """Yields the frames with these numbers, with as little decoding as possible; stops at the first one not found."""
    import av

    try:
        with _open(path) as container:
            stream = _stream(container, path, threads)
            for start, wanted in index.segments(numbers):
                if start is not None:
                    container.seek(start, stream=stream)
                end = max(wanted)
                for number, raw in _decode(container, stream, index, wanted, threads == 1, check):
                    if number in wanted:
                        if number > min(wanted):
                            return
                        wanted.discard(number)
                        yield _frame(number, raw)
                    if not wanted or number > end:
                        break
                if wanted:
                    return
    except (av.FFmpegError, OSError, ValueError):
        return


def _stream(container: Any, path: Path, threads: int = 1) -> Any:
    if not container.streams.video:
        raise MediaError(f"{path}: no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError(f"{path}: no decoder knows this video's format")
    stream.thread_type = "NONE" if threads == 1 else "AUTO"
    stream.codec_context.thread_count = threads
    if stream.width * stream.height > MAX_VIDEO_PIXELS:
        raise MediaError(f"{path}: {stream.width}x{stream.height} pixels is over the limit of {MAX_VIDEO_PIXELS}")
    return stream


def _upright(frame: Any) -> NDArray[np.uint8]:
    image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    return np.ascontiguousarray(image, np.uint8)


def _decode(
    container: Any, stream: Any, index: _Index, wanted: set[int], skip: bool, check: Check
) -> Iterator[tuple[int, Any]]:
    """Yields (number, frame) from the container's position on; without usable timestamps, frames count from 0."""
    position = -1
    for packet in container.demux(stream):
        check()
        if skip and index.numbers:  # applies per packet: not to be set while other threads decode ahead
            number = index.numbers.get(packet.pts)
            stream.codec_context.skip_frame = "DEFAULT" if number is None or number in wanted else "NONREF"
        for frame in packet.decode():
            position = index.numbers.get(frame.pts, -1) if index.numbers else position + 1
            yield position, frame


class _Index(NamedTuple):
    """Index of a video's frames, read from its packets without decoding."""

    total: int
    numbers: dict[int, int]
    """Frame number by timestamp; empty when the file's timestamps are missing, repeated or inexact."""
    keys: list[int]
    """Timestamps of frames from which decoding can start, in order."""
    missing: int = 0
    """Number of frames that the header promises beyond those in the file, or that its clock leaves room for."""

    @property
    def begins_whole(self) -> bool:
        """Whether decoding can start at the first frame; not in a clip that was cut between key frames."""
        return not self.numbers or (bool(self.keys) and self.numbers[self.keys[0]] == 0)

    def segments(self, wanted: list[int]) -> Iterator[tuple[int | None, set[int]]]:
        """Yields runs of frames to decode: (timestamp to seek to or None, requested frame numbers)."""
        keys = [self.numbers[key] for key in self.keys] if self.numbers else []
        run: set[int] = set()
        start: int | None = None
        for number in wanted:
            key = bisect.bisect_right(keys, number) - 1  # the last key frame at or before it
            if run and key >= 0 and keys[key] > max(run):
                yield start, run
                run, start = set(), self.keys[key]
            run.add(number)
        yield start, run


def _index(path: Path, check: Check = lambda: None) -> _Index:
    import av

    stamps: list[int | None] = []
    keys: list[int] = []
    promised = other = 0
    try:
        with _open(path) as container:
            # timestamps and seeks are exact in these formats alone
            exact = container.format.name.partition(",")[0] in ("mov", "matroska")
            stream = _stream(container, path)
            promised = stream.frames
            for packet in _packets(container, stream):
                check()
                other += packet.dts is not None and (not packet.size or packet.is_discard)
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
                    if packet.is_keyframe and packet.pts is not None:
                        keys.append(packet.pts)
    except (av.FFmpegError, OSError, ValueError) as error:
        if not stamps:
            raise MediaError(f"{path}: cannot read this video ({_reason(error)})") from error
    if not stamps:
        raise MediaError(f"{path}: the video holds no frame")
    known = sorted({stamp for stamp in stamps if stamp is not None})
    usable = exact and len(known) == len(stamps)
    numbers = {stamp: number for number, stamp in enumerate(known)} if usable else {}
    missing = max(promised - len(stamps) - other, _hole(known) if len(known) == len(stamps) else 0, 0)
    return _Index(len(stamps), numbers, sorted(keys) if usable else [], missing)


def _hole(stamps: list[int]) -> int:
    """Number of frames for which a clock that is otherwise regular has a gap; gaps below HOLE frames are none."""
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    if len(steps) < HOLE:
        return 0
    usual = statistics.median(steps)
    if sum(abs(step - usual) <= max(0.1 * usual, 1) for step in steps) < 0.9 * len(steps):
        return 0
    return sum(n for step in steps if (n := round(step / usual) - 1) >= HOLE)


def _reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(getattr(error, "strerror", None) or error)).strip()
    return text or type(error).__name__


def h264(crf: float, preset: str = "medium") -> dict[str, str]:
    """Options for libx264.  Its macroblock tree reads uninitialised memory; without it the output is reproducible to
    the bit."""
    return {"crf": str(int(crf)), "preset": preset, "x264-params": "mbtree=0"}


def frame_rate(path: Path) -> Fraction:
    """Average frames per second of a video, 25 when it states none.  Raises MediaError when it cannot be read."""
    import av

    try:
        with _open(path) as container:
            return _stream(container, path).average_rate or Fraction(25)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot read this video ({_reason(error)})") from error


def duration(path: Path, check: Check = lambda: None) -> float:
    """Seconds of a video, from its header or else by counting its frames.  Raises MediaError when it cannot be read."""
    import av

    try:
        with _open(path) as container:
            stream = _stream(container, path)
            if stream.duration is not None and stream.time_base is not None:
                return float(stream.duration * stream.time_base)
            if container.duration is not None:
                return container.duration / av.time_base
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot read this video ({_reason(error)})") from error
    return float(_index(path, check).total / frame_rate(path))


def write_video(
    path: Path, frames: list[NDArray[np.uint8]], fps: int | Fraction = 25, crf: int = 23, rotation: int = 0
) -> None:
    """Writes RGB frames [H, W, 3] as H.264 in mp4, atomically.  ``crf``: constant rate factor, 0 lossless to 51 worst.

    ``rotation``: degrees (a multiple of 90) by which a player must turn the frames anticlockwise, as in phone videos.
    """
    for _ in write_frames(path, iter(frames), fps, crf, rotation):
        pass


def write_frames(
    path: Path,
    frames: Iterator[NDArray[np.uint8]],
    fps: int | Fraction = 25,
    crf: int = 23,
    rotation: int = 0,
    preset: str = "veryfast",
) -> Iterator[int]:
    """Writes frames one by one like :func:`write_video`, yielding the number written so far.

    Odd sides get one more row or column, because H.264's usual chroma format needs even ones.
    """
    import av

    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = None
        for number, image in enumerate(frames, 1):
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), "edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options=h264(crf, preset))
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt, stream.thread_count = "yuv420p", 1
                if rotation:
                    stream.set_display_rotation(rotation)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            yield number
        if stream is None:
            raise MediaError(f"{path}: no frame to write")
        container.mux(stream.encode())
