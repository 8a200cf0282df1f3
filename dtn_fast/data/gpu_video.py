"""Reading of videos on a GPU through torchcodec, where the CPU's reader would do nothing else with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dtn_fast.data.even_spacing import Wanted, chosen
from dtn_fast.data.hdr import is_hdr
from dtn_fast.data.video import Frame, Reading, orientation, read_frames
from dtn_fast.data.video_index import Check, VideoIndex, index_of, open_video, video_stream
from dtn_fast.errors import UsageError, reason, tell
from dtn_fast.packages import require

CHUNK = 200e6
"""Maximum number of bytes of the frames that are decoded at once, if one frame is not larger; at most MOST frames."""
MOST = 16


def read_frames_on_gpu(
    path: Path, count: Wanted = None, check: Check = lambda: None, reading: Reading | None = None
) -> Iterator[Frame]:
    """Yields what :func:`~dtn_fast.data.video.read_frames` yields, decoded on a GPU: the same frames and times, colours
    to a few levels, as a GPU converts them in its own way.

    A video that needs more than decoding is read by the CPU, and why is told in one line: frames are missing, it does
    not begin with a key frame, its timestamps are inexact, its pixels are not square, it is turned or HDR, or
    torchcodec fails.  Damage that the container does not show is decoded as the GPU does.  Raises UsageError without a
    GPU or torchcodec, MediaError as read_frames does.
    """
    reading = Reading() if reading is None else reading
    decoders = _torchcodec()
    index = index_of(path, check)
    stream, why = _plain(path, index)
    wanted = chosen(index.times, count)
    wanted = list(range(index.total)) if wanted is None else wanted
    given = 0
    try:
        if not why:
            # exact: frames are counted by the packets and not by the header; an absolute path is no protocol's name
            where, form = str(path.resolve()), {"dimension_order": "NHWC", "seek_mode": "exact"}
            decoder = decoders.VideoDecoder(where, stream_index=stream, device="cuda", **form)
            why = f"torchcodec sees {len(decoder)} frames and not {index.total}" * (len(decoder) != index.total)
        if not why:
            reading.asked, reading.total, reading.seconds = len(wanted), index.total, index.seconds
            size = 1
            while given < len(wanted):
                check()
                part = wanted[given : given + size]
                images = decoder.get_frames_at(part).data.cpu().numpy()  # [N, H, W, 3] uint8
                for number, image in zip(part, images, strict=True):
                    given += 1
                    seconds, end = index.span(number)
                    yield Frame(number, seconds, image, end)
                size = max(1, min(MOST, int(CHUNK / images[0].nbytes)))
            return
    except RuntimeError as error:  # torchcodec's and CUDA's
        why = f"torchcodec fails after {given} frames ({reason(error)})"
    tell(f"{path}: decoded by the CPU: {why}")
    yield from read_frames(path, wanted[given:] if given else count, 0, check, reading)
    if given:
        reading.asked = len(wanted)


def _torchcodec() -> Any:
    """The package's decoders.  Raises UsageError when it or a GPU is missing."""
    if not torch.cuda.is_available():
        raise UsageError("--decoder gpu: torch sees no GPU; leave it out")
    try:
        return require("torchcodec.decoders", "torchcodec")
    except (RuntimeError, OSError) as error:  # it finds no FFmpeg, or was built for another torch
        why = str(error).partition("\n")[0]
        raise UsageError(f"--decoder gpu: torchcodec cannot be imported ({why}); leave it out") from error


def _plain(path: Path, index: VideoIndex) -> tuple[int, str]:
    """Number of the video's stream in its file, and why decoding alone does not give its frames; empty: it does."""
    import av

    with open_video(path) as container:
        stream, frame = video_stream(container, path), None
        number = stream.index
        with contextlib.suppress(av.FFmpegError):
            frame = next(container.decode(stream), None)
    reasons = {
        "its first frame cannot be decoded": frame is None,
        "frames are missing from it": bool(index.missing),
        "its timestamps are inexact": not index.numbers,
        "it does not begin with a key frame": not index.begins_whole,
        "its pixels are not square": index.pixel_aspect != 1,
        "it is turned or mirrored": frame is not None and orientation(frame) != 1,
        "it is HDR": frame is not None and is_hdr(frame),
    }
    return number, ", ".join(text for text, holds in reasons.items() if holds)
