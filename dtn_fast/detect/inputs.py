"""Input files from paths, folders and globs, and their frames."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dtn_fast.data.even_spacing import PerSecond, at_rate, evenly_timed
from dtn_fast.data.media import HEIC, PICTURES, VIDEOS, find_media, kind_of
from dtn_fast.data.pictures import count_pictures, read_image, read_moving, read_times
from dtn_fast.data.video import Frame, Reading, read_frames
from dtn_fast.data.video_index import Check
from dtn_fast.errors import MediaError


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
        yield file, _unread(file)
    for problem in found.problems:
        yield Path(problem.filename), f"{problem.filename}: cannot be searched ({problem.strerror})"
    if not (found.files or found.unread or found.problems):
        yield path, f"{path}: no image or video in this folder"


def _unread(path: Path) -> str:
    heic = path.suffix.lower() in HEIC
    remedy = "pip install pillow-heif, which reads it" if heic else "convert it to PNG, JPEG or MP4"
    return f"{path}: a picture or video in a form that is not read; {remedy}"


def frames_of(
    path: Path, count: int, rate: float, check: Check = lambda: None, reading: Reading | None = None
) -> Iterator[Frame]:
    """Yields the frame of a picture, or frames of a video or moving picture: ``count`` evenly spaced in time (0: all),
    or ``rate`` per second.

    ``check`` is called for every packet read; ``reading`` counts what could not be decoded.  Raises MediaError when
    ``path`` is not a readable picture or video.
    """
    if not path.is_file():
        raise MediaError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    reading = Reading() if reading is None else reading
    kind = kind_of(path)
    if kind == "picture":
        yield from _picture_frames(path, count, rate, check, reading)
    elif kind == "video":
        yield from read_frames(path, PerSecond(rate) if rate else count or None, check=check, reading=reading)
    elif kind == "unread":
        raise MediaError(_unread(path))
    else:
        known = f"an image ({' '.join(sorted(PICTURES))}) nor a video ({' '.join(sorted(VIDEOS))})"
        raise MediaError(f"{path}: neither {known}")


def _picture_frames(path: Path, count: int, rate: float, check: Check, reading: Reading) -> Iterator[Frame]:
    reading.asked = reading.total = 1
    pictures, moves = count_pictures(path)
    if not moves:
        reading.pages = pictures
        yield Frame(0, 0.0, read_image(path))
        return
    times = np.array(read_times(path, check))
    good = len(times) - 1
    if not good:
        read_image(path)  # raises the error of its first frame
    wanted = at_rate(times, rate) if rate else evenly_timed(times, count) if count else list(range(good))
    reading.asked, reading.total, reading.missing, reading.seconds = (
        len(wanted),
        good,
        pictures - good,
        float(times[-1]),
    )
    given = 0
    for number, image in read_moving(path, wanted, check):
        given += 1
        yield Frame(number, float(times[number]), image, float(times[number + 1]))
    reading.lost = len(wanted) - given
