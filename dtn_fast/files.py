"""Files written whole or not at all: what a reader finds is always complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], object], shared: bool = False) -> None:
    """Writes ``content`` (bytes, text, or what a function puts into the open file) to ``path``: write, fsync, rename.

    Text is UTF-8; bytes of a file name that are no UTF-8 become question marks.  ``shared``: other processes may write
    the same file, with the same content, at the same time.  When it fails (a full disk), what was at ``path`` stays,
    nothing is left beside it, and the OSError names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6) + '.' if shared else ''}partial")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8", "replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        try:
            partial.replace(path)
        except FileNotFoundError:  # swept up by another process that has finished the same work
            if not (shared and path.is_file()):
                raise
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def load_array(path: Path) -> Any:
    """An .npy file, memory-mapped.  Raises OSError or ValueError when it is missing or none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's parser: EOFError, SyntaxError, TokenError, OverflowError
        raise ValueError(f"{path.name} is no array ({error})") from error
