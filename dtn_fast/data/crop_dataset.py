"""Face crops on disk: memory-mapped shard files behind one index, as ``dtn-fast prepare`` writes them."""

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

from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.data.masks import NO_MASKS, Masks
from dtn_fast.data.video_table import Video, video_of
from dtn_fast.dataclass_json import from_fields
from dtn_fast.errors import UsageError, tell
from dtn_fast.files import load_array
from dtn_fast.model.config import CropPolicy, ModelConfig, crop_policy

INDEX, VERSION = "index.json", 4
SHARDS = "shards"
"""Folder of the shard files."""
OLD_SHARDS = {2: "parts", 3: SHARDS}
"""Name of the folder, and of the list of shard files in the index, in older versions of the index."""


class CropSource(Protocol):
    """Crops by row number: memory maps, pictures, or self-blended fakes made from them."""

    size: int
    """Side S in pixels."""

    def __len__(self) -> int: ...

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int, masks: Masks | None = None) -> None:
        """Writes the crops ``rows`` into ``out`` [n, S, S, 3] RGB; only self-blended crops depend on ``epoch``.

        masks: receives the masks of the crops that the source makes itself, and is left alone elsewhere."""


class ShardFiles:
    """Several memory-mapped arrays [n, S, S, 3] of crops, or [n, S, S] of masks, indexed as one; masks may be packed
    into bits, [n, S, S / 8]."""

    def __init__(self, shards: Sequence[NDArray[np.uint8]], size: int) -> None:
        self.size = size
        self._shards = [np.asarray(shard) for shard in shards]  # plain views: a memmap's own indexing is slow Python
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)} crops")
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for place, (s, row) in enumerate(zip(shard.tolist(), (rows - self._starts[shard]).tolist(), strict=True)):
            part = self._shards[s][row]
            if part.shape[1] != self.size:
                part = np.unpackbits(part, axis=1, count=self.size) * np.uint8(255)
            out[place] = part  # one contiguous copy per crop; numpy releases the GIL meanwhile


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
    """Per video: frames requested and read, faces found, origin of the boxes, and the error or reason for no face."""
    synthetic: bool
    notes: list[str] = field(default_factory=list)
    """Findings of the dataset's audit."""
    crop: CropPolicy | None = None
    """How the crops were cut; None: pictures that another program cut."""
    landmarks: NDArray[np.float32] | None = None
    """[N, K, 2] (x, y) in pixels of the crop, NaN where unknown; None: no landmarks."""
    masks: ShardFiles | None = None
    """Masks of the forged pixels; None: not stored."""
    every_face: bool = False
    """Whether every face of a frame was cropped, not one."""
    mask_known: NDArray[np.bool_] | None = None
    """[N] whether the crop's mask is known, at training also those that self-blending makes; None: only a real's is,
    and blank."""
    folder: str = ""
    """Absolute path that the crops were opened from."""
    first_old: int | None = None
    """Number of the first video of the old data that fine-tuning replays; None: there are no old data."""

    @property
    def size(self) -> int:
        return self.crops.size

    def check_fits(self, config: ModelConfig, name: str) -> None:
        """Raises UsageError naming the model ``name`` when it takes crops of another size, margin or alignment."""
        if self.size != config.image_size:
            side = config.image_size
            raise UsageError(
                f"{name}: takes {side} pixels, the crops have {self.size}; prepare again with --size {side}"
            )
        model, own = crop_policy(config), self.crop
        if own is not None and own.margin != model.margin:
            raise UsageError(f"{name}: takes crops of margin {model.margin:g}, these have {own.margin:g}; prepare "
                             f"again with --margin {model.margin:g}")  # fmt: skip
        if own is not None and own.align != model.align:
            raise UsageError(f"{name}: takes crops with --align {model.align}, these have {own.align}; prepare again")

    def tell_differences(self, config: ModelConfig, name: str) -> None:
        """Says in one line when the model ``name`` was trained on the boxes of another face finder, or records none."""
        if self.crop is not None and config.crop is None:
            tell(f"{name}: no crop policy is stored in it; taken as {CropPolicy()}")
        if self.crop is not None and self.crop.finder != (trained := crop_policy(config).finder):
            tell(f"{name}: trained on crops by {trained}, these are by {self.crop.finder}; their boxes are alike but "
                 "not the same")  # fmt: skip

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] 0 real, 1 fake."""
        return np.array([v.label for v in self.videos], np.int64)[self.video]

    def get(self, rows: NDArray[np.int64], epoch: int = 0) -> NDArray[np.uint8]:
        """Crops [n, S, S, 3] uint8 RGB in the order of ``rows``."""
        out = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        self.crops.fill(np.asarray(rows, np.int64), out, epoch)
        return out

    @property
    def masked(self) -> NDArray[np.bool_]:
        """[N] whether a crop's mask is known; of data without masks, a real's is."""
        return self.labels == 0 if self.mask_known is None else self.mask_known

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        """Writes the crops ``rows`` into ``out`` [n, S, S, 3] RGB and, if given, their masks into ``masks``."""
        if masks is None:
            self.crops.fill(rows, out, epoch)
            return
        masks.known[:] = self.masked[rows]
        if self.masks is None:
            masks.pixels[:] = 0
        else:
            self.masks.fill(rows, masks.pixels)
        self.crops.fill(rows, out, epoch, masks)

    def get_masks(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Masks [n, S, S] uint8 of the crops ``rows``: 0 where untouched, up to 255 where forged.

        Raises UsageError when none are stored.
        """
        if self.masks is None:
            raise UsageError(f"{self.folder}: {NO_MASKS}")
        out = np.empty((len(rows), self.size, self.size), np.uint8)
        self.masks.fill(np.asarray(rows, np.int64), out)
        return out

    def is_old(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether crops [n] are of the old data that fine-tuning replays."""
        return np.zeros(len(rows), bool) if self.first_old is None else self.video[rows] >= self.first_old

    def select(self, split: str, methods: tuple[str, ...] = ()) -> NDArray[np.int64]:
        """Crop numbers of a split: all its reals, the fakes of ``methods`` (empty: all fakes), and all old fakes."""
        good = np.zeros(len(self.videos), bool)
        good[self._chosen(split, methods)] = True
        return np.flatnonzero(good[self.video]) if len(good) else np.empty(0, np.int64)

    def videos_of(self, split: str, methods: tuple[str, ...] = ()) -> list[Video]:
        """Videos of a split, chosen as in :meth:`select`."""
        return [self.videos[number] for number in self._chosen(split, methods)]

    def _chosen(self, split: str, methods: tuple[str, ...]) -> list[int]:
        old = len(self.videos) if self.first_old is None else self.first_old
        wanted = lambda number, v: not v.label or not methods or v.method in methods or number >= old
        return [number for number, v in enumerate(self.videos) if v.split == split and wanted(number, v)]

    def evenly_spaced(self, split: str, count: int) -> NDArray[np.int64]:
        """``count`` crop numbers of a split (or all, when it has fewer), evenly spaced from the first to the last."""
        rows = self.select(split)
        return rows[evenly_spaced(len(rows), count)]

    def fingerprint(self, rows: NDArray[np.int64]) -> str:
        """Hash that tells whether two metrics were measured, or two models trained, on the same crops: of the videos
        and frames of ``rows`` and the pixels of 64 evenly spaced crops among them; after a hyphen, of their labels."""
        names = (f"{self.videos[v].path} {f}" for v, f in zip(self.video[rows], self.frame[rows], strict=True))
        digest = hashlib.sha256("\n".join(names).encode("utf-8", "replace"))
        some = evenly_spaced(len(rows), 64)
        digest.update(self.get(rows[some]).tobytes())
        return f"{digest.hexdigest()[:16]}-{zlib.crc32(self.labels[rows].tobytes()):08x}"

    @property
    def faces(self) -> str:
        """Description of the crops for reports: whole pictures, every face, or one face of a frame."""
        if all(state["boxes"] == "whole" for state in self.status):
            return "pictures as they are"
        return "every face" if self.every_face else "one face of a frame"

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(sorted({v.method for v in self.videos if v.label}))


def full_fingerprint(known: str, now: str) -> str:
    """The stored fingerprint ``known``; of an earlier version, which knew no labels, ``now`` if that begins alike."""
    return now if now.startswith(f"{known}-") else known


def open_crop_dataset(folder: Path, verify: bool = False) -> CropDataset:
    """Opens a folder that :func:`dtn_fast.data.prepare.prepare` wrote; ``verify`` compares the checksums of crops,
    landmarks and masks too, not of the index alone.

    Raises UsageError when it is missing, unfinished, damaged or of another version.
    """
    try:
        index = _unsealed((folder / INDEX).read_bytes())
        where = OLD_SHARDS.get(index["version"], SHARDS)
        size, shards, points, masks = int(index["size"]), [], [], []
        for shard in index[where]:
            at, known = (folder / where, shard["name"], shard["rows"]), shard if verify else {}
            shards.append(open_shard(*at, size, known.get("crc32")))
            if index["landmarks"]:
                points.append(open_landmarks(*at, None, known.get("landmarks_crc32")))
            if index.get("masks"):
                masks.append(open_masks(*at, size, known.get("masks_crc32")))
        if {len(index[name]) for name in ("video", "frame", "person")} != {sum(map(len, shards))}:
            raise ValueError("the crops do not match the index")
        video, frame, person = (np.array(index[name], np.int64) for name in ("video", "frame", "person"))
        videos, marks = [video_of(row) for row in index["videos"]], np.concatenate(points) if points else None
        return CropDataset(
            ShardFiles(shards, size), video, frame, person, videos, index["status"], index["synthetic"], index["notes"],
            _policy(index, str(folder)), marks, ShardFiles(masks, size) if masks else None,
            index.get("people", index.get("faces")) == "all", np.array(index["mask_known"], bool) if masks else None,
            str(folder.absolute()),
        )  # fmt: skip
    except FileNotFoundError as error:
        what = f"{folder}: no prepared crops there ({Path(error.filename).name} is missing)"
        if unfinished(folder):
            what += ", only an unfinished prepare"
        raise UsageError(f"{what}; run dtn-fast prepare") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: damaged crops ({error}); run the same dtn-fast prepare with --verify, or delete "
                         "the folder and prepare again if an earlier version wrote it") from error  # fmt: skip


SEAL = b'{"check": "'
"""First bytes of an index; the checksum of all that follows it comes next, as eight digits."""


def sealed(index: dict[str, Any]) -> bytes:
    """The index as JSON, with its checksum."""
    rest = f'", {json.dumps(index)[1:]}'.encode()
    return SEAL + b"%08x" % zlib.crc32(rest) + rest


def _unsealed(text: bytes) -> dict[str, Any]:
    """The index; an earlier version's begins with its version and has no checksum."""
    index = json.loads(text.decode())
    if index["version"] not in (VERSION, *OLD_SHARDS):
        raise ValueError(f"version {index['version']}, this program reads {VERSION}")
    start, end = len(SEAL), len(SEAL) + 8
    if next(iter(index)) != "version" and (text[:start], text[start:end]) != (SEAL, b"%08x" % zlib.crc32(text[end:])):
        raise ValueError(f"{INDEX} has another checksum than when it was written")
    return index


def _policy(index: dict[str, Any], where: str) -> CropPolicy | None:
    """How the crops of an index were cut; those of an older version by dlib."""
    if all(state["boxes"] == "whole" for state in index["status"] if state["faces"]):
        return None
    if "crop" in index:
        return from_fields(CropPolicy, index["crop"], where)
    policy = CropPolicy(margin=float(index["margin"]))
    tell(f"{where}: crops of an earlier version, without a crop policy; taken as {policy}")
    return policy


def unfinished(folder: Path) -> bool:
    """Whether ``dtn-fast prepare`` has begun to write into ``folder``."""
    return any((folder / name).is_dir() for name in (SHARDS, *OLD_SHARDS.values()))


def open_shard(shards: Path, name: str, rows: int, size: int, crc32: int | None = None) -> NDArray[np.uint8]:
    """The crops of a shard file in the folder ``shards``, memory-mapped.

    Raises OSError or ValueError when the file is missing or does not match the index.
    """
    return _array(shards / f"{name}.npy", np.uint8, (rows, size, size, 3), crc32)


def open_masks(shards: Path, name: str, rows: int, size: int, crc32: int | None = None) -> NDArray[np.uint8]:
    """The masks of a shard's crops, like :func:`open_shard`: bits [rows, S, S / 8] or, of earlier versions, bytes
    [rows, S, S]."""
    masks = _array(shards / f"{name}.masks.npy", np.uint8, (rows, size, None), crc32)
    if rows and masks.shape[2] not in (size, -(-size // 8)):
        raise ValueError(f"{name}.masks.npy holds masks {masks.shape[1:]}, not of {size} pixels")
    return masks


def open_landmarks(
    shards: Path, name: str, rows: int, points: int | None, crc32: int | None = None
) -> NDArray[np.float32]:
    """The landmarks [rows, K, 2] of a shard's crops, like :func:`open_shard`; ``points``: K, None: any."""
    return _array(shards / f"{name}.landmarks.npy", np.float32, (rows, points, 2), crc32)


def _array(path: Path, dtype: type, shape: tuple[int | None, ...], crc32: int | None) -> NDArray[Any]:
    if not shape[0]:
        return np.empty([n or 0 for n in shape], dtype)
    array = load_array(path)
    fits = len(array.shape) == len(shape) and all(want in (None, n) for n, want in zip(array.shape, shape, strict=True))
    if not fits or array.dtype != dtype:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, not {dtype.__name__} {shape}")
    if crc32 is not None and zlib.crc32(memoryview(array).cast("B")) != crc32:
        raise ValueError(f"{path.name} has another checksum than when it was written")
    return array
