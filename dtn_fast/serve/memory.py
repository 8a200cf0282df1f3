"""Memory for decoded pictures and frames, shared by all uploads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from dtn_fast.data.media import kind_of
from dtn_fast.data.pictures import PIXEL_BYTES, count_pictures
from dtn_fast.data.pictures import decoded_bytes as picture_bytes
from dtn_fast.data.video_index import open_video, video_stream
from dtn_fast.detect.pipeline import AHEAD
from dtn_fast.errors import MediaError

FRAME, REFERENCES = 3, 12
"""Bytes per pixel of a decoded frame, and of the decoder's own frames of a video, eight of 1.5 bytes."""
POLL = 0.2
"""Seconds between two checks whether a waiting upload is still wanted."""


def decoded_bytes(path: Path) -> float:
    """Most bytes that the decoded pixels of a picture or video take at once, by its header; 0: it cannot be
    decoded."""
    import av

    try:
        kind = kind_of(path)
        if kind == "picture":
            frames = FRAME * (AHEAD + 1) / PIXEL_BYTES if count_pictures(path)[1] else 0.0
            return picture_bytes(path) * (1 + frames)
        if kind == "video":
            with open_video(path) as container:
                stream = video_stream(container, path)
                return float(stream.width * stream.height * (FRAME * (AHEAD + 2) + REFERENCES))
    except (MediaError, av.FFmpegError, OSError, ValueError):
        pass
    return 0.0


class Budget:
    """A number of bytes that threads hold parts of, in the order in which they ask."""

    def __init__(self, total: float) -> None:
        self.total = total
        self.held = 0.0
        self._queue: deque[object] = deque()
        self._change = threading.Condition()

    @contextlib.contextmanager
    def part(self, size: float, waiting: Callable[[], object]) -> Iterator[None]:
        """Holds ``size`` bytes, or all when it is more; ``waiting`` is called every POLL seconds until they are free,
        and an exception from it ends the wait."""
        size, ticket = min(size, self.total), object()
        with self._change:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self.held + size > self.total:
                    self._change.wait(POLL)
                    waiting()
                self.held += size
            finally:
                self._queue.remove(ticket)
                self._change.notify_all()
        try:
            yield
        finally:
            with self._change:
                self.held -= size
                self._change.notify_all()
