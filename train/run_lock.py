"""The lock on a run folder: while one command trains a run, another one is refused."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dtn_fast.errors import UsageError, tell
from dtn_fast.train import distributed

LOCK = ".lock"
"""File that is locked; it stays, and names the process that locked it last."""
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run for this process and its group; calls may be nested.  However the process ends, the run is free.

    Raises UsageError at once when another process holds it; where the file system has no locks, says so and goes on.
    """
    if not distributed.ranks().main:
        yield
        return
    path = run / LOCK
    lock = FileLock(path, blocking=False, is_singleton=True, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{run}: another process ({path.read_text()}) trains this run; wait for it, or choose another "
                         "--out") from error  # fmt: skip
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        tell(f"{run}: its file system has no locks ({error.strerror}); do not train this run twice at once")
    try:
        yield
    finally:
        lock.release()


def _sign(file: int) -> None:
    """Writes this process into the lock file, which it has just locked."""
    name = f"{os.getpid()} on {socket.gethostname()}".encode()
    os.pwrite(file, name, 0)
    os.ftruncate(file, len(name))
