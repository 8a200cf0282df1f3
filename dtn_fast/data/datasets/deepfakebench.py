"""DeepfakeBench's preprocessed faces."""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator
from pathlib import Path
from typing import Any

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.ffpp import FFPP_METHODS
from dtn_fast.data.datasets.parsing import keep_wanted, read_object, safe_path
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import UsageError

BENCH_METHODS = dict(zip(("FF-DF", "FF-F2F", "FF-FH", "FF-FS", "FF-NT"), FFPP_METHODS, strict=True))


def read_deepfakebench(root: Path, source: Source) -> VideoTable:
    """Reads DeepfakeBench's preprocessed faces: its JSON, frames in folders or an LMDB, either path separator."""
    if source.lists is None or not source.lists.is_file():
        raise UsageError(f"--lists {source.lists}: not a file; give DeepfakeBench's JSON file of the dataset")
    videos = []
    for split, kind, name, row, compression in _bench_rows(source):
        listed: list[Any] = [row.get("frames"), row.get("masks") or []]
        if not listed[0] or not all(isinstance(paths, list) for paths in listed):
            raise UsageError(f"{source.lists}: video {name} of {kind} lists no frames")
        frames, masks = (tuple(safe_path(path, source.lists) for path in paths) for paths in listed)
        fake = not kind.lower().endswith("real")
        pair = re.fullmatch(r"(\d{3})_(\d{3})|(id\d+)_(id\d+)_\d+", name)
        people = tuple(part for part in pair.groups() if part) if pair else ()
        mask = masks[0].rpartition("/")[0] if masks else ""
        method = BENCH_METHODS.get(kind, kind) if fake else REAL
        path = frames[0].rpartition("/")[0]
        videos.append(Video(path, int(fake), method, split, people, compression, mask, frames=frames))
    table = keep_wanted(VideoTable(root, videos, "deepfakebench", crops=True, lmdb=source.lmdb), source)
    return audit(table, {}, source.allow, exists=_lmdb_holds(source.lmdb) if source.lmdb else None)


def _bench_rows(source: Source) -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Yields (split, label, video, row, compression) for every video in DeepfakeBench's JSON."""
    path = source.lists
    assert path is not None
    for labels in read_object(path).values():
        for kind, splits in labels.items():
            for split, rows in _items(splits, path):
                if split not in SPLITS:
                    raise UsageError(f"{path}: unknown split {split!r}")
                names = dict(_items(rows, path))
                compression = source.compression if source.compression in names else ""
                if not compression and names and set(names) <= {"raw", "c23", "c40"}:
                    raise UsageError(f"{path}: no {source.compression} of {kind}, only {', '.join(names)}")
                for name, row in _items(names[compression], path) if compression else names.items():
                    yield split, kind, name, dict(_items(row, path)), compression


def _items(value: Any, path: Path) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not DeepfakeBench's layout: {str(value)[:60]!r} where an object was expected")
    return value.items()


def _lmdb_holds(path: Path) -> Callable[[Video], bool]:
    from dtn_fast.data.lmdb_store import open_lmdb

    store = open_lmdb(path)

    def holds(video: Video) -> bool:
        return all(frame in store for frame in video.frames)

    return holds
