"""Judging of stored uploads by a bounded number of workers, and the counters that tell of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dtn_fast.data.media import PICTURES, VIDEOS
from dtn_fast.data.video import Reading
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import detect, finder_of
from dtn_fast.detect.report import heat_uri, jpeg_uri
from dtn_fast.detect.verdict import rule_of
from dtn_fast.files import json_text
from dtn_fast.packages import require
from dtn_fast.runtime.scorer import Scorer
from dtn_fast.serve.batching import MicroBatcher
from dtn_fast.serve.config import ServeConfig
from dtn_fast.serve.edge import Refused
from dtn_fast.serve.memory import Budget, decoded_bytes
from dtn_fast.serve.uploads import Upload, Uploads

LEFT = 499
"""Status counted for a client that left before its verdict; it gets no answer."""


class Lane:
    """Workers, waiting places and memory of one kind of request."""

    def __init__(self, name: str, workers: int, waiting: int, memory: float) -> None:
        self.pool = ThreadPoolExecutor(workers, name)
        self.budget = Budget(memory)
        self.places, self.inside = workers + waiting, 0
        """Number of places, and of those taken; changed on the event loop alone."""

    @property
    def full(self) -> bool:
        return self.inside >= self.places

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place.  Raises Refused when all are taken."""
        if self.full:
            raise Refused(503, "busy: all places are taken; try again in a few seconds", retry_after="5")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


class Progress:
    """Progress of one upload, seen by its worker and by those who wait for it."""

    def __init__(self, limit: float, remedy: str) -> None:
        self.limit, self.remedy = limit, remedy
        """Time limit in seconds, from ``begin``, and the advice when it is over."""
        self.begin, self.end = 0.0, 0.0
        """Clock (monotonic) at which the time began to count and at which the work ended; 0: not yet."""
        self.frames = 0
        self.reading = Reading()
        self.stopped = threading.Event()
        """Set when nobody wants the verdict any longer."""

    def check(self, read: int = 0) -> None:
        """Notes the number of frames read.  Raises Refused when the work is to end."""
        self.frames = max(self.frames, read)
        if self.stopped.is_set():
            raise Refused(LEFT, "nobody waits for the verdict any longer")
        if time.monotonic() - self.begin > self.limit:
            raise Refused(504, f"no verdict within {self.limit:g} s; {self.remedy}")

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        return (self.end or time.monotonic()) - self.begin if self.begin else 0.0


class Judge:
    """Judges stored uploads with one scorer."""

    def __init__(self, scorer: Scorer, config: ServeConfig, detection: DetectConfig) -> None:
        self.config, self.detection = config, detection
        self.formats, self.videos = PICTURES | VIDEOS, VIDEOS
        self._finder = finder_of(scorer, detection)
        self._model = getattr(scorer, "model", None)
        self.batcher = MicroBatcher(scorer)
        memory = 1e6 * config.decode_mb
        self.uploads = Uploads(config, self.formats)
        self.direct = Lane("judging", config.workers, config.waiting, memory)
        self.jobs = Lane("jobs", config.job_workers, config.job_waiting, memory)
        self.metrics = Metrics(self)

    def verdict(self, upload: Upload, progress: Progress, lane: Lane) -> bytes:
        """The verdict on an upload as JSON.  Raises Refused when there is none; called on a worker's thread."""
        progress.begin = progress.begin or time.monotonic()
        try:
            progress.check()  # it may have waited too long
            with lane.budget.part(decoded_bytes(upload.path), progress.check):
                return json_text(self._found(upload, progress)).encode()
        finally:
            progress.end = time.monotonic()
            self.metrics.seconds.observe(progress.seconds)

    def _found(self, upload: Upload, progress: Progress) -> dict[str, Any]:
        path, name = upload
        check, reading = progress.check, progress.reading
        result = detect(path, self.batcher, self.detection, self._finder, check, self._model, reading=reading)
        self.metrics.frames.inc(result.frames_read)
        self.metrics.faces.inc(sum(len(frame.faces) for frame in result.frames))
        if result.verdict == "failed":
            raise Refused(422, (result.error or "").replace(str(path), name))
        self.metrics.verdicts.labels(result.verdict).inc()
        pictures = [
            {**p.to_json(), "face": jpeg_uri(p.crop), "heat": None if p.heat is None else heat_uri(p)}
            for p in result.pictures
        ]
        facts = {"path": name, "rule": rule_of(bool(result.clips)), "notice": self.batcher.notice}
        error = result.error and result.error.replace(str(path), name)
        return {**result.to_json(), **facts, "error": error, "pictures": pictures}

    def close(self) -> None:
        """Ends when all work has ended; the caller has stopped what is not to be finished."""
        self.direct.pool.shutdown()
        self.jobs.pool.shutdown()
        self.batcher.close()
        self.uploads.close()


class Metrics:
    """Prometheus counters of one service."""

    def __init__(self, judge: Judge) -> None:
        prometheus = require("prometheus_client")

        self._registry = prometheus.CollectorRegistry()
        where = {"registry": self._registry}
        self.requests = prometheus.Counter("dtn_requests", "Uploads by the HTTP status of the answer; 499: left",
                                           ["status"], **where)  # fmt: skip
        self.jobs = prometheus.Counter("dtn_jobs", "Finished jobs by their state", ["state"], **where)
        self.frames = prometheus.Counter("dtn_frames", "Frames analysed", **where)
        self.faces = prometheus.Counter("dtn_faces", "Faces scored", **where)
        self.verdicts = prometheus.Counter("dtn_verdicts", "Verdicts", ["verdict"], **where)
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600, 3600)
        help_text = "Seconds from the end of an upload, or the start of a job, to the verdict"
        self.seconds = prometheus.Histogram("dtn_judge_seconds", help_text, buckets=buckets, **where)
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("dtn_uploads_inside", "Uploads arriving, waiting or being judged", lambda: judge.direct.inside),
            ("dtn_jobs_inside", "Jobs arriving, waiting or being judged", lambda: judge.jobs.inside),
            ("dtn_decoding_bytes", "Memory held for decoded pictures and frames",
             lambda: judge.direct.budget.held + judge.jobs.budget.held),
            ("dtn_batches", "Batches run", lambda: judge.batcher.batches),
        )  # fmt: skip
        for name, text, value in gauges:
            prometheus.Gauge(name, text, **where).set_function(value)
        self._write = prometheus.generate_latest

    def text(self) -> bytes:
        return self._write(self._registry)
