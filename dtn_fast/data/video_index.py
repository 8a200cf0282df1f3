"""The index of a video's frames: their numbers, times and key frames, read from its packets without decoding."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import MediaError, reason
from dtn_fast.packages import require

CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,mxf,rm,dv,ivf,h264,hevc,mjpeg"
"""Container formats that are opened.  Playlists and scripts, which make a decoder read other files, are excluded."""
MAX_VIDEO_PIXELS = 36_000_000
"""Pixel limit per video frame (8K); lower than MAX_PIXELS because several frames are in memory at once."""
HOLE = 5
"""Number of frames from which on a gap in a regular clock is damage; smaller ones are frames that a camera dropped."""
BROADCAST = ("mpegts", "mpeg", "mpegvideo")
"""Containers of broadcasts, which never pause."""
JUMP = 10.0
"""Seconds from which on a step of an inexact clock is no time of the video, because it starts anew in joined files;
FFmpeg's own value."""
DAMAGES = 100
"""Maximum number of errors in a container after which reading goes on."""
MAX_PIXEL_ASPECT = 4.0
"""Greatest ratio of a pixel's sides that is believed; no camera or disc has more than 2."""
USUAL_RATE = 25.0
"""Frames per second of a video that states none."""
Check = Callable[[], object]
"""Function called for every packet that is read; an exception from it ends the reading."""


def open_video(path: Path) -> Any:
    """Opens a video's container.  Raises av.FFmpegError when it is none of CONTAINERS."""
    av = require("av")

    # "file:" keeps FFmpeg from reading a colon in the name as a protocol
    return av.open(f"file:{path}", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"})


def comment_of(path: Path) -> str:
    """The comment stored with a video; empty: none, or no video."""
    av = require("av")

    try:
        with open_video(path) as container:
            return str(container.metadata.get("comment", ""))
    except (av.FFmpegError, OSError, ValueError):
        return ""


def video_stream(container: Any, path: Path, threads: int = 1) -> Any:
    """The stream that a player shows: the default one or else the largest, and no cover picture or thumbnail.

    Raises MediaError when there is none that can be decoded, or its frames are too large.
    """
    av = require("av")

    still = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & still]
    if not moving:
        cover = ", only a cover picture" if container.streams.video else ""
        raise MediaError(f"{path}: no video stream{cover}")
    known = [stream for stream in moving if stream.codec_context is not None]
    if not known:
        raise MediaError(f"{path}: no decoder knows this video's format")
    stream = max(known, key=lambda s: (bool(s.disposition & av.stream.Disposition.default), s.width * s.height))
    stream.thread_type = "NONE" if threads == 1 else "AUTO"
    stream.codec_context.thread_count = threads
    if stream.width * stream.height > MAX_VIDEO_PIXELS:
        raise MediaError(f"{path}: {stream.width}x{stream.height} pixels is over the limit of {MAX_VIDEO_PIXELS}")
    return stream


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets; reading goes on after an error, up to DAMAGES times."""
    av = require("av")

    for _ in range(DAMAGES):
        try:
            yield from container.demux(stream)
            return
        except av.FFmpegError as error:
            if isinstance(error, EOFError):
                return


@dataclass(frozen=True)
class VideoIndex:
    """Index of a video's frames."""

    total: int
    times: NDArray[np.float64]
    """[total + 1] seconds from the first frame at which each frame appears, and at which the last one ends."""
    numbers: dict[int, int]
    """Frame number by timestamp; empty when the file's timestamps are missing, repeated or inexact."""
    places: dict[int, int]
    """Frame number by timestamp where seeking by it is inexact too, to tell which frame is decoded first."""
    keys: list[int]
    """Timestamps of frames from which decoding can start, in order."""
    missing: int = 0
    """Number of frames lost to damage: those that the header states and the file lacks, or gaps in its clock."""
    pixel_aspect: float = 1.0
    """Width of a pixel divided by its height."""

    @property
    def begins_whole(self) -> bool:
        """Whether decoding can start at the first frame; not in a clip that was cut between key frames."""
        return not self.numbers or (bool(self.keys) and self.numbers[self.keys[0]] == 0)

    @property
    def seconds(self) -> float:
        """Length of the video."""
        return float(self.times[-1])

    @cached_property
    def rate(self) -> float:
        """Mean number of frames per second."""
        return self.total / self.seconds if self.seconds > 0 else USUAL_RATE

    def span(self, number: int) -> tuple[float, float]:
        """Seconds at which a frame appears and ends; counted for one beyond the packets that the file lists."""
        if number < self.total:
            return float(self.times[number]), float(self.times[number + 1])
        return self.seconds + (number - self.total) / self.rate, self.seconds + (number + 1 - self.total) / self.rate

    def after(self, first: int) -> VideoIndex:
        """The index without the frames before ``first``, which cannot be decoded."""
        times = self.times[first:] - self.times[first]
        return replace(self, total=self.total - first, times=times, numbers={}, places={}, keys=[])

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


def index_of(path: Path, check: Check = lambda: None) -> VideoIndex:
    """Indexes a video; what cannot be read of it is left out.  Raises MediaError when nothing can."""
    av = require("av")

    stamps: list[int | None] = []
    decoding: list[int] = []
    keys: list[int] = []
    promised = other = 0
    last = (-1, 0)  # timestamp and duration of the frame that is shown last
    tick = step = 0.0
    pixel_aspect, form = 1.0, ""
    try:
        with open_video(path) as container:
            form = container.format.name.partition(",")[0]
            stream = video_stream(container, path)
            promised, tick = stream.frames, float(stream.time_base)
            pixel_aspect = float(stream.sample_aspect_ratio or 1)
            step = 1 / float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
            for packet in packets_of(container, stream):
                check()
                other += packet.dts is not None and (not packet.size or packet.is_discard)
                if packet.size and not packet.is_discard:
                    stamps.append(packet.pts)
                    if packet.dts is not None:
                        decoding.append(packet.dts)
                    if packet.pts is not None:
                        last = max(last, (packet.pts, packet.duration or 0))
                        if packet.is_keyframe:
                            keys.append(packet.pts)
    except (av.FFmpegError, OSError, ValueError) as error:
        if not stamps:
            raise MediaError(f"{path}: cannot read this video ({reason(error)})") from error
    if not stamps:
        raise MediaError(f"{path}: the video holds no frame")
    exact = form in ("mov", "matroska")  # timestamps and seeks are exact in these formats alone
    steady = all(a <= b for a, b in itertools.pairwise(decoding))
    known = sorted({stamp for stamp in stamps if stamp is not None})
    whole = len(known) == len(stamps)
    clock = known if whole else sorted(set(decoding))  # AVI knows when to decode a frame, not when to show it
    numbers = {stamp: number for number, stamp in enumerate(known)} if whole else {}
    missing = promised - len(stamps) - other
    if form == "avi" and decoding:  # it counts the frames that its camera dropped
        missing = promised - (max(decoding) + 1)
    if len(clock) == len(stamps) and (exact or steady):
        steps: NDArray[np.float64] = np.diff(np.array(clock, np.float64)) * tick
        usual = float(np.median(steps)) if len(steps) else step
        if not exact:
            steps[steps > JUMP] = usual
        times = np.cumsum([0.0, *steps, last[1] * tick or usual])
        if form != "avi":
            starts = np.isin(clock[1:], keys) | (form in BROADCAST)
            missing = max(missing, _hole(steps, starts, tick))
    else:
        times = np.arange(len(stamps) + 1, dtype=np.float64) * step
        steady = False
    if not MAX_PIXEL_ASPECT >= pixel_aspect >= 1 / MAX_PIXEL_ASPECT:
        pixel_aspect = 1.0
    exact_numbers = numbers if exact else {}
    places = numbers if steady and not exact else {}
    keys = sorted(keys) if exact_numbers else []
    return VideoIndex(len(stamps), times, exact_numbers, places, keys, max(missing, 0), pixel_aspect)


def _hole(steps: NDArray[np.float64], starts: NDArray[np.bool_], tick: float) -> int:
    """Number of frames that a damaged stretch has cost: those for which a clock that is otherwise regular has a gap, of
    HOLE frames at least, before a frame from which decoding can start (a camera's pause goes on with another frame).

    steps: seconds from each frame to the next; starts: whether decoding can start at the next, or may in a broadcast,
    which never pauses; tick: unit of the clock.
    """
    if len(steps) < HOLE:
        return 0
    usual = float(np.median(steps))
    if (np.abs(steps - usual) <= max(0.1 * usual, 1.001 * tick)).mean() < 0.9:
        return 0
    gaps = np.round(steps / usual) - 1
    return int(gaps[(gaps >= HOLE) & starts].sum())
