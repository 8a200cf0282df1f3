"""Frames of any media file: a picture, a moving picture or a video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dtn_fast.data.even_spacing import Wanted, chosen
from dtn_fast.data.gpu_video import read_frames_on_gpu
from dtn_fast.data.media import HEIC, PICTURES, VIDEOS, kind_of
from dtn_fast.data.pictures import count_pictures, read_image, read_moving, read_times
from dtn_fast.data.video import Frame, Reading, read_frames
from dtn_fast.data.video_index import Check
from dtn_fast.errors import DtnError, MediaError
from dtn_fast.packages import installed_by


def frames_of(
    path: Path,
    count: Wanted,
    threads: int = 0,
    check: Check = lambda: None,
    reading: Reading | None = None,
    on_gpu: bool = False,
) -> Iterator[Frame]:
    """Yields the frame of a picture, or the frames of a video or moving picture that ``count`` names.

    ``threads``: of a video's decoder, 0 for one per core; ``check`` is called for every packet read; ``reading`` counts
    what could not be decoded; ``on_gpu``: decode videos as :func:`read_frames_on_gpu` does.  Raises MediaError when
    ``path`` is not a readable picture or video.
    """
    reading = Reading() if reading is None else reading
    try:
        yield from _frames(path, count, threads, check, reading, on_gpu)
    except (DtnError, OSError):
        raise
    except Exception as error:  # a decoder may raise anything, and the other files are not to pay for it
        raise MediaError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _frames(path: Path, count: Wanted, threads: int, check: Check, reading: Reading, on_gpu: bool) -> Iterator[Frame]:
    if not path.is_file():
        raise MediaError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    kind = kind_of(path)
    if kind == "picture":
        yield from _picture_frames(path, count, check, reading)
    elif kind == "video" and on_gpu:
        yield from read_frames_on_gpu(path, count, check, reading)
    elif kind == "video":
        yield from read_frames(path, count, threads, check, reading)
    elif kind == "unread":
        raise MediaError(unread_text(path))
    else:
        known = f"an image ({' '.join(sorted(PICTURES))}) nor a video ({' '.join(sorted(VIDEOS))})"
        raise MediaError(f"{path}: neither {known}")


def unread_text(path: Path) -> str:
    """The error of a picture or video in a form that is not read."""
    heic = path.suffix.lower() in HEIC
    remedy = f"run: pip install {installed_by('pillow_heif')}" if heic else "convert it to PNG, JPEG or MP4"
    return f"{path}: a picture or video in a form that is not read; {remedy}"


def _picture_frames(path: Path, count: Wanted, check: Check, reading: Reading) -> Iterator[Frame]:
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
    wanted = chosen(times, count)
    wanted = list(range(good)) if wanted is None else wanted
    reading.asked, reading.total, reading.missing = len(wanted), good, pictures - good
    reading.seconds = float(times[-1])
    given = 0
    for number, image in read_moving(path, wanted, check):
        given += 1
        yield Frame(number, float(times[number]), image, float(times[number + 1]))
    reading.lost = len(wanted) - given
