"""Atomic writing of files: a reader finds a complete file or none.

atomicwrites is unmaintained; of the packages tried on a full disk none named the file in its error, and one left half a
file without any error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dtn_fast.errors import UsageError


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], object], shared: bool = False) -> None:
    """Writes ``content`` (bytes, text, or a function that writes to the open file) to ``path`` by :func:`replacing`.

    Text is written as UTF-8; characters that UTF-8 cannot encode (from file names) become question marks.
    """
    with replacing(path, shared) as partial, partial.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to; afterwards that file is renamed to ``path``.

    ``shared``: other processes may write the same content to the same path at the same time.  After a failure (a full
    disk) the previous file at ``path`` is unchanged, no partial file is left, and the OSError names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6) + '.' if shared else ''}partial")
    if len(os.fsencode(partial.name)) > longest_name(path.parent):
        partial = path.with_name(f".{secrets.token_hex(12)}.partial")
    try:
        yield partial
        try:
            partial.replace(path)
        except FileNotFoundError:  # removed by another process that has finished the same work
            if not (shared and path.is_file()):
                raise
    except OSError as error:
        if error.filename is not None and not str(error.filename).endswith(partial.name):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def json_text(data: Any, indent: int | None = None) -> str:
    """``data`` as JSON; NaN and infinity, which JSON does not have, become null."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def check_writable(folder: Path) -> None:
    """Makes ``folder``.  Raises UsageError when no file can be written there, OSError when the disk is full."""
    probe = folder / f".{secrets.token_hex(6)}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise UsageError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error


def longest_name(folder: Path) -> int:
    """Maximum number of bytes of a file's name in ``folder``."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # a folder that is not there yet, or not a POSIX system
        return 255


def fitting_name(folder: Path, stem: str, suffix: str) -> Path:
    """The path of a file in ``folder``, with a shorter stem where the file system does not take the whole name."""
    room = longest_name(folder) - len(os.fsencode(suffix))
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return folder / (stem + suffix)


def load_array(path: Path) -> Any:
    """Opens an .npy file memory-mapped.  Raises OSError when it cannot be read, ValueError when it is not an array."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's parser: EOFError, SyntaxError, TokenError, OverflowError
        raise ValueError(f"{path.name} is not an .npy array ({error})") from error
