"""Address and limits of the HTTP service."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from dtn_fast.errors import UsageError
from dtn_fast.ranges import Count, Natural, NotNegative, Positive, Range, Workers, check_ranges


@dataclass(frozen=True)
class ServeConfig:
    """Address and limits of the HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all networks."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: a free port."""
    root_path: str = ""
    """Path under which a proxy shows the service, such as /detector; whether the proxy removes it makes no
    difference."""
    allow_origin: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, such as https://example.org; *: all."""
    workers: Workers = 2
    """Number of uploads processed at the same time; their faces share batches."""
    waiting: Natural = 16
    """Maximum number of uploads that wait for a worker; further ones are refused with status 503."""
    max_mb: Positive = 200.0
    """Upload limit: the largest file accepted, in MB."""
    timeout: Positive = 120.0
    """Time limit in seconds for an upload to arrive, and again for its verdict."""
    min_rate: NotNegative = 20.0
    """Lowest mean rate of an upload in kB/s after its first ten seconds; a slower one is refused with status 408."""
    decode_mb: Positive = 600.0
    """Memory for decoded pictures and frames of all uploads together, and again for all jobs, in MB: an upload waits
    until its share is free; one that needs more than all of it runs alone."""
    job_workers: Workers = 1
    """Number of jobs (POST /v1/jobs) processed at the same time, besides the uploads of --workers."""
    job_waiting: Natural = 16
    """Maximum number of jobs that wait for a worker; further ones are refused with status 503."""
    job_timeout: Positive = 3600.0
    """Time limit in seconds for a job, from its start."""
    keep_jobs: Count = 100
    """Maximum number of finished jobs whose results are kept; then the oldest is forgotten."""
    keep_seconds: Positive = 600.0
    """Seconds for which the result of a finished job is kept."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.host:
            raise UsageError("--host: empty, which means all networks; name 0.0.0.0 if that is wanted")
        if not re.fullmatch(r"(/[\w.~-]+)*", self.root_path, re.ASCII):
            raise UsageError(f"--root-path {self.root_path}: must begin with a slash and end without, like /detector")
        for origin in self.allow_origin:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", origin):
                raise UsageError(f"--allow-origin {origin}: must be * or like https://example.org, without a path")
