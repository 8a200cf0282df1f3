"""Frames of a video table's row, from a video file, a folder of pictures or an LMDB, with the row's perturbations."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.corrupt import corrupt_all, corrupt_video
from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.data.lmdb_store import open_lmdb
from dtn_fast.data.media_frames import frames_of
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video import Frame, Reading, read_frames
from dtn_fast.data.video_table import Video
from dtn_fast.errors import MediaError
from dtn_fast.files import load_array


def video_frames(
    root: Path,
    video: Video,
    count: int,
    lmdb: Path | None = None,
    threads: int = 1,
    reading: Reading | None = None,
) -> Iterator[Frame]:
    """Yields ``count`` frames (or as many as there are) of a video, evenly spaced, upright RGB.

    Frames and pictures that cannot be decoded are left out and counted in ``reading``.  Raises MediaError when none
    can.
    """
    if not video.corruptions:
        yield from _plain(root, video, count, lmdb, threads, Reading() if reading is None else reading)
        return
    seed, steps = zlib.crc32(Path(video.path).name.encode()), list(video.corruptions)
    with tempfile.TemporaryDirectory(prefix="dtn-fast-") as folder:
        source = root / video.path
        while (number := next((i for i, (name, _) in enumerate(steps, 1) if name == "video"), 0)) > 0:
            out = Path(folder) / f"{len(steps)}.mp4"  # shorter each time
            for _ in corrupt_video(source, out, steps[:number], seed, threads):
                pass
            source, steps = out, steps[number:]
        for frame in read_frames(source, count, threads, reading=reading):
            yield frame._replace(image=corrupt_all(frame.image, steps, (seed, frame.number)))


def _plain(root: Path, video: Video, count: int, lmdb: Path | None, threads: int, reading: Reading) -> Iterator[Frame]:
    if not video.frames:
        yield from frames_of(root / video.path, count, threads, reading=reading)
        return
    places = evenly_spaced(len(video.frames), count)
    reading.asked = reading.total = len(places)
    for place in places:
        name = video.frames[place]
        stem = Path(name).stem
        try:
            image = open_lmdb(lmdb).image(name) if lmdb else read_image(root / name)
        except MediaError:
            reading.lost += 1
            if reading.lost == reading.asked:
                raise
            continue
        yield Frame(int(stem) if stem.isdecimal() else place, 0.0, image)


def landmarks(root: Path, frame: str) -> NDArray[np.float32] | None:
    """The landmarks [K, 2] (x, y) of a DeepfakeBench picture, from its .npy file; None when there is no such file."""
    path = (root / frame.replace("/frames/", "/landmarks/", 1)).with_suffix(".npy")
    if "/frames/" not in frame or not path.is_file():
        return None
    try:
        points = load_array(path)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot read these landmarks ({error})") from error
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "fiu":
        raise MediaError(f"{path}: not an array of numbers")
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise MediaError(f"{path}: landmarks are {points.shape}; [K, 2] finite numbers were expected")
    return points.astype(np.float32)
