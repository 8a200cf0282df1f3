"""Face crops on disk: memory-mapped uint8 parts behind one index, as :mod:`dtn_fast.data.prepare` writes them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import resize_square
from dtn_fast.data.manifest import SPLITS, Manifest, Video
from dtn_fast.data.readers import read_folder, read_reals
from dtn_fast.data.video import read_image
from dtn_fast.errors import UsageError

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


class Pictures:
    """Crops read from image files each time, for people who want no shards; decoded on threads."""

    def __init__(self, root: Path, names: Sequence[str], size: int, threads: int = 2) -> None:
        self.size, self._root, self._names = size, root, names
        self._pool = ThreadPoolExecutor(threads)

    def __len__(self) -> int:
        return len(self._names)

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0) -> None:
        for place, image in enumerate(self._pool.map(self._read, rows.tolist())):
            out[place] = image

    def _read(self, row: int) -> NDArray[np.uint8]:
        path = self._root / self._names[row]
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if image is None:
            image = read_image(path)  # what OpenCV does not know, and the error when it is no image at all
        return resize_square(image, self.size)


@dataclass(frozen=True)
class Shards:
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

    def spread(self, split: str, count: int) -> NDArray[np.int64]:
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


def open_shards(folder: Path, verify: bool = False) -> Shards:
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
        return Shards(Crops(parts, size), video, frame, person, videos, status, index["synthetic"], notes, marks)
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


def load_array(path: Path) -> Any:
    """An .npy file, memory-mapped.  Raises OSError or ValueError when it is missing or none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy's parser: EOFError, SyntaxError, TokenError, OverflowError
        raise ValueError(f"{path.name} is no array ({error})") from error


def video_of(row: dict[str, Any]) -> Video:
    """A manifest's row from JSON."""
    lists = {name: tuple(row[name]) for name in ("identities", "frames")}
    return Video(
        **{**row, **lists, "corruptions": tuple((str(name), int(level)) for name, level in row["corruptions"])}
    )


def open_pictures(manifest: Manifest, size: int) -> Shards:
    """The pictures of a manifest as crops, without preparing: decoded and resized each time they are asked for.

    Raises UsageError when the manifest holds videos, which must be prepared.
    """
    names: list[str] = []
    video: list[int] = []
    for number, row in enumerate(manifest.videos):
        if not row.frames or manifest.lmdb:
            raise UsageError(f"{manifest.root}: {row.path} is no folder of pictures; run dtn-fast prepare on it")
        names += row.frames
        video += [number] * len(row.frames)
    status = [{"asked": len(v.frames), "frames": len(v.frames), "faces": len(v.frames), "boxes": "whole", "error": None,
               "reason": None} for v in manifest.videos]  # fmt: skip
    frame = np.concatenate([np.arange(len(v.frames)) for v in manifest.videos])
    return Shards(Pictures(manifest.root, names, size), np.array(video), frame, np.zeros(len(names), np.int64),
                  manifest.videos, status, manifest.synthetic, manifest.notes)  # fmt: skip


def open_data(folder: Path, size: int) -> Shards:
    """Prepared crops, or else the face pictures in ``folder``: <split>/<real or a forgery's name>/, or reals alone.

    size: side in pixels that pictures are resized to.  Raises UsageError when there is neither.
    """
    if (folder / INDEX).is_file() or (folder / PARTS).is_dir() or not folder.is_dir():
        return open_shards(folder)
    try:
        read_pictures = read_folder if any((folder / split).is_dir() for split in SPLITS) else read_reals
        return open_pictures(read_pictures(folder), size)
    except UsageError as error:
        raise UsageError(f"{error}; a dataset of videos needs dtn-fast prepare first") from error
