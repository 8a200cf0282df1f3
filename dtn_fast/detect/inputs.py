"""Input files from paths, folders and globs, and their frames."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from dtn_fast.data.video import IMAGES, VIDEOS, Check, Frame, Reading, duration, read_frames, read_image
from dtn_fast.errors import MediaError


def find_inputs(patterns: list[str]) -> Iterator[tuple[Path, str | None]]:
    """Files named by paths, folders (searched recursively for images and videos) and globs, each once, in order.

    Yields (path, error); an error explains why that path gives no input, and does not stop the others.
    """
    seen: set[Path] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            yield Path(pattern), f"{pattern}: no such file, folder or match"
        for match in matches:
            for path, error in _walk(Path(match)):
                if path not in seen:
                    seen.add(path)
                    yield path, error


def _walk(path: Path) -> Iterator[tuple[Path, str | None]]:
    if not path.is_dir():
        yield path, None
        return
    problems: list[OSError] = []
    found = 0
    for folder, folders, names in os.walk(path, onerror=problems.append):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGES | VIDEOS and not name.startswith("."):
                found += 1
                yield Path(folder, name), None
    for problem in problems:
        yield Path(problem.filename), f"{problem.filename}: cannot be searched ({problem.strerror})"
    if not found and not problems:
        yield path, f"{path}: no image or video in this folder"


def frames_of(
    path: Path, count: int, rate: float, check: Check = lambda: None, reading: Reading | None = None
) -> Iterator[Frame]:
    """Yields the frame of an image, or frames of a video: ``count`` evenly spaced (0: all), or ``rate`` per second.

    ``check`` is called for every packet read; ``reading`` counts what could not be decoded.  Raises MediaError when
    ``path`` is not a readable image or video.
    """
    if not path.is_file():
        raise MediaError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        yield Frame(0, 0.0, read_image(path))
    elif suffix in VIDEOS:
        if rate:
            count = max(1, round(duration(path, check) * rate))
        yield from read_frames(path, count or None, check=check, reading=reading)
    else:
        raise MediaError(
            f"{path}: neither an image ({' '.join(sorted(IMAGES))}) nor a video ({' '.join(sorted(VIDEOS))})"
        )
