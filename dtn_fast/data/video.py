"""Files to frames: images and videos as RGB arrays, upright, with one-line errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import MediaError

IMAGES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"])
VIDEOS = frozenset([".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"])
MAX_PIXELS = 64_000_000
"""A picture larger than this is refused before it is decoded (a decompression bomb, or a mistake)."""


class Frame(NamedTuple):
    number: int
    """Position in the video, from 0."""
    seconds: float
    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image file as upright RGB [H, W, 3].  Raises MediaError when it is missing, truncated or no image."""
    from PIL import Image, ImageFile, ImageOps

    if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library may have switched this on for the whole process
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(f"{path}: {image.width}x{image.height} pixels is over the limit of {MAX_PIXELS}")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot read this image ({_reason(error)})") from error


def read_frames(path: Path, count: int | None = None) -> Iterator[Frame]:
    """Frames of a video in order, upright; with ``count`` that many (or fewer) spread evenly from first to last.

    Raises MediaError when the file is no video, holds no frame, or stops in the middle of one before anything was
    decoded.  A video cut short yields the frames that decode; its length is then counted, not believed.
    """
    import av

    wanted = None
    if count is not None:
        total = _frame_count(path)
        wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    seen = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: no video stream")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise MediaError(f"{path}: {stream.width}x{stream.height} pixels is over the limit of {MAX_PIXELS}")
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                seen += 1
                if wanted is None or number in wanted:
                    image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                    yield Frame(number, float(frame.time or 0.0), image.astype(np.uint8, copy=False))
                    if wanted is not None and number == max(wanted):
                        return
    except (av.FFmpegError, OSError, ValueError) as error:
        if not seen:
            raise MediaError(f"{path}: cannot read this video ({_reason(error)})") from error
    if not seen:
        raise MediaError(f"{path}: the video holds no frame")


def _frame_count(path: Path) -> int:
    """Frames that decode, counted from the packets' index when the container states them and is whole."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: no video stream")
            stream = container.streams.video[0]
            packets = 0
            for packet in container.demux(stream):
                packets += packet.size > 0
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot read this video ({_reason(error)})") from error
    if not packets:
        raise MediaError(f"{path}: the video holds no frame")
    return packets


def _reason(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(getattr(error, "strerror", None) or error)).strip()
    return text or type(error).__name__


def write_video(path: Path, frames: list[NDArray[np.uint8]], fps: int = 25, crf: int = 23, rotation: int = 0) -> None:
    """RGB frames [H, W, 3] (even sides) as H.264 in mp4, atomically.  ``crf``: 0 lossless to 51 worst.

    ``rotation``: degrees (a multiple of 90) that a player must turn the frames anticlockwise, as phones write.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)
