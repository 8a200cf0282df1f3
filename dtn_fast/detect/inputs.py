"""Input files from paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from dtn_fast.data.media import find_media
from dtn_fast.data.media_frames import unread_text


def find_inputs(patterns: list[str]) -> Iterator[tuple[Path, str | None]]:
    """Files named by paths, folders (searched recursively for pictures and videos) and globs, each once, in order.

    Yields (path, error); an error explains why that path gives no input, and does not stop the others.
    """
    seen: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            yield Path(pattern), f"{pattern}: no such file, folder or match"
        for match in matches:
            for path, error in _inside(Path(match)):
                if path not in seen:
                    seen.add(path)
                    yield path, error


def _inside(path: Path) -> Iterator[tuple[Path, str | None]]:
    if not path.is_dir():
        yield path, None
        return
    found = find_media(path)
    for file in found.files:
        yield file, None
    for file in found.unread:
        yield file, unread_text(file)
    for problem in found.problems:
        yield Path(problem.filename), f"{problem.filename}: cannot be searched ({problem.strerror})"
    if not (found.files or found.unread or found.problems):
        yield path, f"{path}: no image or video in this folder"
