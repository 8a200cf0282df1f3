"""Face crops on disk: memory-mapped uint8 parts behind one index, as :mod:`dtn_fast.data.prepare` writes them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.video_table import Video, video_of
from dtn_fast.errors import UsageError
from dtn_fast.files import load_array

INDEX, PARTS, VERSION = "index.json", "parts", 2


class CropSource(Protocol):
    """Crops by row number: memory maps, pictures, or blends made of them."""

    size: int
    """Side S in pixels."""

    def __len__(self) -> int: ...

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int) -> None:
        """Writes the crops ``rows`` into ``out`` [n, S, S, 3] RGB; only made-up crops depend on ``epoch``."""


class Crops:
    """Many memory-mapped arrays [n, S, S, 3] as one."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]], size: int) -> None:
        self.size = size
        self._parts = [np.asarray(part) for part in parts]  # plain views: a memmap's own indexing is slow Python
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0) -> None:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)} crops")
        part = np.searchsorted(self._starts, rows, side="right") - 1
        for place, (p, row) in enumerate(zip(part.tolist(), (rows - self._starts[part]).tolist(), strict=True)):
            out[place] = self._parts[p][row]  # one straight copy a crop; numpy lets other threads run meanwhile


@dataclass(frozen=True)
class CropDataset:
    """The crops of a prepared dataset; row i of every array belongs to crop i."""

    crops: CropSource
    video: NDArray[np.int64]
    """[N] index into ``videos``."""
    frame: NDArray[np.int64]
    """[N] frame number inside the video."""
    person: NDArray[np.int64]
    """[N] number of the face's track inside the video."""
    videos: list[Video]
    status: list[dict[str, Any]]
    """Per video: frames asked and read, faces found, whose boxes, and the error or the reason for no face."""
    synthetic: bool
    notes: list[str] = field(default_factory=list)
    """What the audit of the dataset found."""
    landmarks: NDArray[np.float32] | None = None
    """[N, K, 2] (x, y) in pixels of the crop, NaN where unknown; None: there are none."""

    @property
    def size(self) -> int:
        return self.crops.size

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] 0 real, 1 fake."""
        return np.array([v.label for v in self.videos], np.int64)[self.video]

    def get(self, rows: NDArray[np.int64], epoch: int = 0) -> NDArray[np.uint8]:
        """Crops [n, S, S, 3] uint8 RGB in the order of ``rows``."""
        out = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        self.crops.fill(np.asarray(rows, np.int64), out, epoch)
        return out

    def select(self, split: str, methods: tuple[str, ...] = ()) -> NDArray[np.int64]:
        """Crop numbers of a split: all its reals, and the fakes of ``methods`` (none: every one)."""
        good = np.array([v.split == split and (not v.label or not methods or v.method in methods) for v in self.videos])
        return np.flatnonzero(good[self.video]) if len(self.videos) else np.empty(0, np.int64)

    def evenly_spaced(self, split: str, count: int) -> NDArray[np.int64]:
        """``count`` crop numbers of a split (or all, when it has fewer), evenly from the first to the last."""
        rows = self.select(split)
        return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]

    def fingerprint(self, rows: NDArray[np.int64]) -> str:
        """What tells whether figures were measured on the same crops: a hash of their videos and frames, and of the
        pixels of 64 spread over them."""
        names = (f"{self.videos[v].path} {f}" for v, f in zip(self.video[rows], self.frame[rows], strict=True))
        digest = hashlib.sha256("\n".join(names).encode("utf-8", "replace"))
        some = np.linspace(0, len(rows) - 1, min(64, len(rows))).round().astype(int)
        digest.update(self.get(rows[some]).tobytes())
        return digest.hexdigest()[:16]

    @property
    def faces(self) -> str:
        """Whose faces these are, in words."""
        if all(state["boxes"] == "whole" for state in self.status):
            return "pictures as they are"
        return "every face" if self.person.any() else "largest face"

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(sorted({v.method for v in self.videos if v.label}))


def open_crop_dataset(folder: Path, verify: bool = False) -> CropDataset:
    """Opens what :func:`dtn_fast.data.prepare.prepare` wrote; ``verify`` reads it all and compares checksums.

    Raises UsageError when it is missing, unfinished, damaged or of another version.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']}, this program reads {VERSION}")
        size, parts, points = int(index["size"]), [], []
        for part in index["parts"]:
            array = open_part(folder, part["name"], size, part["rows"], part["crc32"] if verify else None)
            parts.append(array)
            if index["landmarks"]:
                points.append(load_array(folder / PARTS / f"{part['name']}.landmarks.npy"))
        if {len(index[name]) for name in ("video", "frame", "person")} != {sum(map(len, parts))}:
            raise ValueError("the crops do not match the index")
        video, frame, person = (np.array(index[name], np.int64) for name in ("video", "frame", "person"))
        videos, marks = [video_of(row) for row in index["videos"]], np.concatenate(points) if points else None
        status, notes = index["status"], index["notes"]
        return CropDataset(Crops(parts, size), video, frame, person, videos, status, index["synthetic"], notes, marks)
    except FileNotFoundError as error:
        what = f"{folder}: no prepared crops there ({Path(error.filename).name} is missing)"
        if (folder / PARTS).is_dir():
            what += ", an unfinished prepare"
        raise UsageError(f"{what}; run dtn-fast prepare") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: damaged crops ({error}); run the same dtn-fast prepare with --verify") from error


def open_part(folder: Path, name: str, size: int, rows: int, crc32: int | None = None) -> NDArray[np.uint8]:
    """A part's crops, memory-mapped.  Raises OSError or ValueError when they are not what the index says."""
    path = folder / PARTS / f"{name}.npy"
    if not rows:
        return np.empty((0, size, size, 3), np.uint8)
    array = load_array(path)
    if array.shape != (rows, size, size, 3) or array.dtype != np.uint8:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, not {rows} crops of {size} pixels")
    if crc32 is not None and zlib.crc32(memoryview(array).cast("B")) != crc32:
        raise ValueError(f"{path.name} has another checksum than when it was written")
    return array
