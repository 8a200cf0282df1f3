"""Address and limits of the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass

from dtn_fast.errors import UsageError


@dataclass(frozen=True)
class ServeConfig:
    """Address and limits of the HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all networks."""
    port: int = 8000
    """Port to listen on; 0: a free port."""
    workers: int = 2
    """Number of uploads processed at the same time; their faces share batches."""
    waiting: int = 16
    """Maximum number of uploads that wait for a worker; further ones are refused with status 503."""
    max_mb: float = 200.0
    """Upload limit: the largest file accepted, in MB."""
    timeout: float = 120.0
    """Time limit in seconds for an upload to arrive, and again for its verdict."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.waiting < 0 or not (self.max_mb > 0 and self.timeout > 0):
            raise UsageError("--workers, --max-mb and --timeout must be above 0, --waiting 0 or more")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: must be 1 to 65535, or 0 for a free port")
