"""Face crops on disk: one memory-mapped uint8 array and an index, written once by ``prepare``."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import MARGIN, FaceDetector, crop_face
from dtn_fast.data.manifest import Manifest, Video
from dtn_fast.data.video import read_frames
from dtn_fast.errors import MediaError, UsageError

CROPS, INDEX, VERSION = "crops.npy", "index.json", 1


@dataclass(frozen=True)
class Shards:
    """The crops of a prepared dataset; row i of every array belongs to crop i."""

    crops: NDArray[np.uint8]
    """[N, S, S, 3] RGB, memory-mapped."""
    video: NDArray[np.int64]
    """[N] index into ``videos``."""
    frame: NDArray[np.int64]
    """[N] frame number inside the video."""
    videos: list[Video]
    status: list[dict[str, Any]]
    """Per video: frames read, faces found, and the error when it could not be read."""
    synthetic: bool

    @property
    def size(self) -> int:
        return self.crops.shape[1]

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] 0 real, 1 fake."""
        return np.array([v.label for v in self.videos])[self.video]

    def select(self, split: str, methods: tuple[str, ...] = ()) -> NDArray[np.int64]:
        """Crop numbers of a split: all its reals, and the fakes of ``methods`` (none: every one)."""
        good = np.array([v.split == split and (not v.label or not methods or v.method in methods) for v in self.videos])
        return np.flatnonzero(good[self.video])

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(sorted({v.method for v in self.videos if v.label}))


class Progress(NamedTuple):
    done: int
    total: int
    faces: int


def prepare(
    manifest: Manifest, out: Path, size: int, frames: int = 8, margin: float = MARGIN, workers: int = 2
) -> Iterator[Progress]:
    """Crops the largest face of ``frames`` frames, spread evenly, of each video into ``out``, yielding progress.

    Videos without a face or that cannot be read are kept in the index with the reason.  The result appears whole or
    not at all.  Raises UsageError when no face is found in the whole set.
    """
    out.mkdir(parents=True, exist_ok=True)
    job = functools.partial(_crop_video, manifest.root, size, frames, margin)
    status: list[dict[str, Any]] = []
    video, frame = [], []
    partial = out / ".crops.partial"
    with multiprocessing.get_context("spawn").Pool(workers) as pool, partial.open("wb") as file:
        for number, (crops, numbers, state) in enumerate(pool.imap(job, manifest.videos, chunksize=2)):
            file.write(crops.tobytes())
            status.append(state)
            video += [number] * len(numbers)
            frame += numbers
            yield Progress(number + 1, len(manifest.videos), len(video))
    if not video:
        partial.unlink()
        raise UsageError(f"{manifest.root}: no face was found in any of the {len(manifest.videos)} videos")
    _write_npy(out / CROPS, partial, (len(video), size, size, 3))
    index = {
        "version": VERSION,
        "synthetic": manifest.synthetic,
        "margin": margin,
        "videos": [v._asdict() for v in manifest.videos],
        "status": status,
        "video": video,
        "frame": frame,
    }
    temporary = out / f".{INDEX}.partial"
    temporary.write_text(json.dumps(index), encoding="utf-8")
    temporary.replace(out / INDEX)


def _crop_video(root: Path, size: int, frames: int, margin: float, video: Video):
    state: dict[str, Any] = {"frames": 0, "faces": 0, "error": None}
    crops, numbers = [], []
    detector = _detector()
    try:
        for frame in read_frames(root / video.path, frames):
            state["frames"] += 1
            boxes = detector(frame.image)
            if boxes:
                crops.append(crop_face(frame.image, boxes[0], size, margin))
                numbers.append(frame.number)
    except MediaError as error:
        state["error"] = str(error)
    state["faces"] = len(crops)
    return np.array(crops, np.uint8).reshape(-1, size, size, 3), numbers, state


@functools.cache
def _detector() -> FaceDetector:
    return FaceDetector()


def _write_npy(path: Path, raw: Path, shape: tuple[int, ...]) -> None:
    """Turns a file of raw bytes into an .npy file in place of ``path``."""
    header = path.with_name(f".{path.name}.partial")
    with header.open("wb") as target:
        np.lib.format.write_array_header_1_0(target, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with raw.open("rb") as source:
            while block := source.read(1 << 24):
                target.write(block)
        target.flush()
        os.fsync(target.fileno())
    raw.unlink()
    header.replace(path)


def open_shards(folder: Path) -> Shards:
    """Opens what :func:`prepare` wrote.  Raises UsageError when it is missing, damaged or of another version."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        crops = np.load(folder / CROPS, mmap_mode="r", allow_pickle=False)
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']}, this program reads {VERSION}")
        if crops.ndim != 4 or crops.dtype != np.uint8 or len(crops) != len(index["video"]):
            raise ValueError("the crops do not match the index")
        videos = [Video(**{**v, "identities": tuple(v["identities"])}) for v in index["videos"]]
        return Shards(
            crops, np.array(index["video"]), np.array(index["frame"]), videos, index["status"], index["synthetic"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: no prepared crops there ({error}); run dtn-fast prepare") from error
