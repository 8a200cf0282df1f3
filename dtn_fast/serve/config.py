"""Address and limits of the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dtn_fast.errors import UsageError
from dtn_fast.ranges import Natural, Positive, Range, Workers, check_ranges


@dataclass(frozen=True)
class ServeConfig:
    """Address and limits of the HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all networks."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: a free port."""
    workers: Workers = 2
    """Number of uploads processed at the same time; their faces share batches."""
    waiting: Natural = 16
    """Maximum number of uploads that wait for a worker; further ones are refused with status 503."""
    max_mb: Positive = 200.0
    """Upload limit: the largest file accepted, in MB."""
    timeout: Positive = 120.0
    """Time limit in seconds for an upload to arrive, and again for its verdict."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.host:
            raise UsageError("--host: empty, which means all networks; name 0.0.0.0 if that is wanted")
