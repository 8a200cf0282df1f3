"""Jobs: uploads whose verdict is fetched later, for videos that take longer than a client wants to wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from typing import Any

from dtn_fast.errors import DtnError
from dtn_fast.serve.edge import Refused
from dtn_fast.serve.judging import LEFT, Judge, Progress
from dtn_fast.serve.uploads import Upload

FETCH = 10.0
"""Seconds for which an ending server keeps a finished job's result for its client."""
QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")


class Job:
    """One upload and what became of it."""

    def __init__(self, upload: Upload, limit: float) -> None:
        self.id = secrets.token_urlsafe(16)
        self.upload, self.progress = upload, Progress(limit, "send a shorter video, or raise --job-timeout")
        self.refused: Refused | None = None
        """The reason why there is no verdict."""
        self.finished = 0.0
        """Clock (monotonic) at which it finished; 0: not yet."""
        self.fetched = False
        """Whether its result was sent."""
        self.work: asyncio.Future[bytes] | None = None

    @property
    def state(self) -> str:
        if self.refused is not None:
            return CANCELLED if self.refused.status == LEFT else FAILED
        return DONE if self.finished else RUNNING if self.progress.begin else QUEUED

    @property
    def awaited(self) -> bool:
        """Whether an ending server is to wait for it."""
        fresh = time.monotonic() - self.finished < FETCH
        return not self.finished or (not self.fetched and self.state != CANCELLED and fresh)

    def to_json(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "id": self.id, "name": self.upload.name, "state": self.state,
            "frames": {"done": progress.frames, "total": progress.reading.asked or None},
            "seconds": round(progress.seconds, 3), "error": None if self.refused is None else str(self.refused),
        }  # fmt: skip


class Jobs:
    """The jobs of a server, from their upload until they are forgotten.  Only the event loop calls it."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def awaited(self) -> bool:
        """Whether an ending server is to wait for a job."""
        return any(job.awaited for job in self._jobs.values())

    def add(self, upload: Upload, place: contextlib.ExitStack) -> Job:
        """A new job, which deletes the upload and gives ``place`` back when it ends."""
        job = Job(upload, self._judge.config.job_timeout)
        self._jobs[job.id] = job
        self._tasks[job.id] = asyncio.create_task(self._run(job, place))
        return job

    def get(self, number: str) -> Job:
        """A job by its id.  Raises Refused when it is unknown."""
        if number not in self._jobs:
            raise Refused(404, f"no job {number[:64]}; it is unknown, or finished long ago and forgotten")
        return self._jobs[number]

    def remove(self, number: str) -> Job:
        """Cancels an unfinished job, and forgets a finished one.  Raises Refused when it is unknown."""
        job = self.get(number)
        if job.finished:
            self._forget(number)
        else:
            self._cancel(job)
        return job

    def result(self, number: str) -> bytes:
        """The verdict of a finished job as JSON.  Raises Refused when there is none, or not yet."""
        job = self.get(number)
        if job.state in (QUEUED, RUNNING):
            raise Refused(409, f"the job is {job.state}; ask again later", retry_after="1")
        job.fetched = True
        if job.refused is not None:
            raise Refused(410, "the job was cancelled") if job.state == CANCELLED else job.refused
        return job.upload.path.read_bytes()

    async def close(self) -> None:
        """Cancels the unfinished jobs and waits for their end."""
        for job in list(self._jobs.values()):
            if not job.finished:
                self._cancel(job)
        await asyncio.gather(*self._tasks.values())

    def _cancel(self, job: Job) -> None:
        job.refused = Refused(LEFT, "cancelled")
        job.progress.stopped.set()
        if job.work is not None and not job.progress.begin:
            job.work.cancel()  # it gives its place back at once

    async def _run(self, job: Job, place: contextlib.ExitStack) -> None:
        judge, path = self._judge, job.upload.path
        with place:
            try:
                job.work = asyncio.get_running_loop().run_in_executor(
                    judge.jobs.pool, judge.verdict, job.upload, job.progress, judge.jobs
                )
                path.write_bytes(await job.work)  # the result takes the upload's place
            except (Exception, asyncio.CancelledError) as error:
                path.unlink(missing_ok=True)
                job.refused = job.refused or refusal(error)
        job.finished = time.monotonic()
        judge.metrics.jobs.labels(job.state).inc()
        del self._tasks[job.id]
        finished = [number for number, other in self._jobs.items() if other.finished]
        for number in finished[: -judge.config.keep_jobs]:
            self._forget(number)
        asyncio.get_running_loop().call_later(judge.config.keep_seconds, self._forget, job.id)

    def _forget(self, number: str) -> None:
        job = self._jobs.pop(number, None)
        if job is not None:
            job.upload.path.unlink(missing_ok=True)


def refusal(error: BaseException) -> Refused:
    """An error as the reason that a client is told; one that is no fault of the upload is logged."""
    if isinstance(error, Refused):
        return error
    logging.getLogger(__name__).error("detection on an upload failed", exc_info=error)
    return Refused(500, str(error) if isinstance(error, DtnError) else "the server failed on this upload; see its log")
