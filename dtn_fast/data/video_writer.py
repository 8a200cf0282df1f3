"""Writing of videos as H.264 in mp4."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import MediaError
from dtn_fast.files import replacing
from dtn_fast.packages import require

TICK = Fraction(1, 90_000)
"""Unit of timestamps in seconds; the usual frame rates are whole numbers of it."""


def h264(crf: float, preset: str = "medium") -> dict[str, str]:
    """Options for libx264.  Its macroblock tree reads uninitialised memory; without it the output is reproducible to
    the bit."""
    return {"crf": str(int(crf)), "preset": preset, "x264-params": "mbtree=0"}


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
    yield from _write(path, ((None, image) for image in frames), Fraction(fps), crf, rotation, preset)


def write_timed(
    path: Path,
    frames: Iterator[tuple[float, NDArray[np.uint8]]],
    rate: float,
    crf: int = 23,
    preset: str = "veryfast",
    end: float = 0.0,
    comment: str = "",
) -> Iterator[int]:
    """Writes (seconds, frame) pairs like :func:`write_frames`, each shown from its time on; ``rate``: the mean rate.

    end: time until which the last frame is shown, 0: as long as usual; frames are in order then, without B-frames,
    because in mp4 only the last one in the file has a duration of its own.  comment: stored with the video.
    """
    yield from _write(path, frames, Fraction(rate).limit_denominator(1001), crf, 0, preset, end, comment)


def _write(
    path: Path,
    frames: Iterator[tuple[float, NDArray[np.uint8]]] | Iterator[tuple[None, NDArray[np.uint8]]],
    fps: Fraction,
    crf: int,
    rotation: int,
    preset: str,
    end: float = 0.0,
    comment: str = "",
) -> Iterator[int]:
    av = require("av")

    with replacing(path) as partial, av.open(f"file:{partial}", "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream, last = None, -1
        for number, (seconds, image) in enumerate(frames, 1):
            image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), "edge")
            if stream is None:
                stream = container.add_stream(
                    "libx264", rate=fps, options=h264(crf, preset) | ({"bf": "0"} if end else {})
                )
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt, stream.thread_count = "yuv420p", 1
                if rotation:
                    stream.set_display_rotation(rotation)
                if seconds is not None:
                    stream.codec_context.time_base = TICK
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if seconds is not None:
                last = max(round(seconds / TICK), last + 1)
                frame.pts, frame.time_base = last, TICK
            container.mux(stream.encode(frame))
            yield number
        if stream is None:
            raise MediaError(f"{path}: no frame to write")
        for packet in stream.encode():
            if end and packet.pts is not None and round(packet.pts * packet.time_base / TICK) == last:
                packet.duration = max(round((Fraction(end) - last * TICK) / packet.time_base), 1)
            container.mux(packet)
