"""DeepfakeBench's preprocessed faces, and the sets published in its layout, such as DF40."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import ItemsView, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.ffpp import FFPP_METHODS
from dtn_fast.data.datasets.parsing import keep_wanted, read_object
from dtn_fast.data.datasets.root_map import RootMap
from dtn_fast.data.lmdb_store import open_lmdb
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import UsageError

BENCH_METHODS = dict(zip(("FF-DF", "FF-F2F", "FF-FH", "FF-FS", "FF-NT"), FFPP_METHODS, strict=True))
PRECEDENCE = ("test", "train", "val")
"""The split that a video listed in several belongs to: the first of these."""
JOINS = re.compile(r"[A-Z]+All")
"""Names of DF40's lists that join the others of a family, and do not say by which forgery a video is."""
FIELDS = {"label", "frames", "masks"}
"""Fields of a video."""


class _Row(NamedTuple):
    split: str
    label: str
    name: str
    frames: tuple[str, ...]
    mask: str
    compression: str

    @property
    def folder(self) -> str:
        return self.frames[0].rpartition("/")[0]

    @property
    def fake(self) -> bool:
        return _is_fake(self.label)


def read_deepfakebench(root: Path, source: Source) -> VideoTable:
    """Reads DeepfakeBench's preprocessed faces: its JSON, frames in folders or an LMDB, either path separator.

    The published lists repeat videos of one split in another.  Each is read once, in the first of PRECEDENCE, and by
    the forgery of the first list that has it; lists that join others are the last.
    """
    path, lists, notes = _lists_of(root, source)
    store = open_lmdb(source.lmdb) if source.lmdb else None
    holds = store.__contains__ if store else lambda name: os.path.isfile(root / name)
    exists = (lambda video: all(map(holds, video.frames))) if store else None
    roots, left_out = RootMap(root, source.root_map, holds), Counter[str]()
    listed = [row for one in lists for row in _rows(one, source.compression, roots, left_out)]
    rows = _without_copies(listed, path, left_out)
    notes += [f"left out: {count} {what}" for what, count in sorted(left_out.items())]
    there = [split for split in SPLITS if any(row.split == split for row in rows)]
    if missing := [split for split in source.splits if split not in there]:
        why = "; ".join(notes) or "it lists none"
        remedy = f"; --splits {' '.join(there)} reads the others" if there else ""
        raise UsageError(f"{path}: no videos of {' and '.join(missing)} ({why}){remedy}")
    roots.check((row.frames[0] for row in rows), path)
    neighbours = Counter(row.folder for row in rows)
    videos = [_video(row, alone=neighbours[row.folder] == 1) for row in rows]
    table = keep_wanted(VideoTable(root, videos, "deepfakebench", crops=True, lmdb=source.lmdb, notes=notes), source)
    return audit(table, {}, source.allow, exists=exists)


def _lists_of(root: Path, source: Source) -> tuple[Path, list[Path], list[str]]:
    """The JSON file or folder of JSON files, the files to read, and a note on which they are if it was not said."""
    if source.lists is None:
        found = sorted(path for folder in (root, root / "dataset_json") for path in folder.glob("[!.]*.json"))
        if len(found) == 1:
            return found[0], found, [f"list: {found[0]}"]
        some = f"; {root} has {', '.join(path.name for path in found[:5])}" if found else ""
        raise UsageError(f"{root}: give DeepfakeBench's JSON file of the dataset by --lists{some}")
    if source.lists.is_dir():
        found = sorted(source.lists.glob("[!.]*.json"), key=lambda path: (bool(JOINS.match(path.name)), path.name))
        if not found:
            raise UsageError(f"--lists {source.lists}: no JSON file there; give DeepfakeBench's lists")
        return source.lists, found, [f"{len(found)} lists of {source.lists}"]
    if not source.lists.is_file():
        raise UsageError(f"--lists {source.lists}: not a file; give DeepfakeBench's JSON file of the dataset")
    return source.lists, [source.lists], []


def _rows(path: Path, compression: str, roots: RootMap, left_out: Counter[str]) -> Iterator[_Row]:
    """Yields every video of DeepfakeBench's JSON; counts in ``left_out`` what is no video."""
    for labels in read_object(path).values():
        for kind, splits in labels.items():
            for split, found in _items(splits, path):
                if split not in SPLITS:
                    raise UsageError(f"{path}: unknown split {split!r}")
                names = dict(_items(found, path))
                level = compression if compression in names else ""
                if not level and names and set(names) <= {"raw", "c23", "c40"}:
                    raise UsageError(f"{path}: no {compression} of {kind}, only {', '.join(names)}")
                videos = dict(_items(names[level], path)) if level else names
                if any(field in FIELDS and not isinstance(value, dict) for field, value in videos.items()):
                    left_out[f"of the labels' {split} entries, which hold one video's fields and not videos"] += 1
                    videos = {name: row for name, row in videos.items() if name not in FIELDS}
                for name, row in videos.items():
                    made = _row(split, kind, name, dict(_items(row, path)), level, roots, path)
                    if made:
                        yield made
                    else:
                        left_out[f"videos of {split} without frames"] += 1


def _row(
    split: str, kind: str, name: str, fields: dict[str, Any], compression: str, roots: RootMap, path: Path
) -> _Row | None:
    """A video of the list; None: it has no frames."""
    label = fields.get("label", kind)
    listed: list[Any] = [fields.get("frames"), fields.get("masks") or []]
    if not isinstance(label, str) or _is_fake(label) != _is_fake(kind):
        raise UsageError(f"{path}: video {name} of {kind} has the label {label!r}")
    if not all(isinstance(paths, list) for paths in listed):
        raise UsageError(f"{path}: video {name} of {kind} lists no frames")
    frames, masks = (tuple(roots.path(name, path) for name in paths if not _hidden(name)) for paths in listed)
    return (
        _Row(split, label, name, frames, masks[0].rpartition("/")[0] if masks else "", compression) if frames else None
    )


def _without_copies(rows: list[_Row], path: Path, left_out: Counter[str]) -> list[_Row]:
    """The rows without copies, which share a picture with a row of the same split or one of precedence.

    Raises UsageError when one of the two is real and the other fake.
    """
    several = Counter(row.folder for row in rows)
    owner: dict[str, _Row] = {}
    copies: set[int] = set()
    for row in sorted(rows, key=lambda row: PRECEDENCE.index(row.split)):
        frames = row.frames if several[row.folder] > 1 else ()
        first = next((owner[frame] for frame in frames if frame in owner), row)
        if first.fake != row.fake:
            raise UsageError(f"{path}: {row.frames[0]} is listed as {first.label} and as {row.label}")
        if first is row:
            owner |= dict.fromkeys(frames, row)
        else:
            copies.add(id(row))
            where = f"{first.split} as well" if first.split != row.split else "it twice"
            left_out[f"videos of {row.split} that are in {where}"] += 1
    return [row for row in rows if id(row) not in copies]


def _video(row: _Row, alone: bool) -> Video:
    """The table's row; alone: whether no other video has its pictures in the same folder, so that this names it."""
    pair = re.fullmatch(r"(\d{3})_(\d{3})|(id\d+)_(id\d+)_\d+", row.name)
    people = tuple(part for part in pair.groups() if part) if pair else ()
    method = BENCH_METHODS.get(row.label, row.label) if row.fake else REAL
    path = row.folder if alone else row.frames[0]
    return Video(path, int(row.fake), method, row.split, people, row.compression, row.mask, frames=row.frames)


def _hidden(name: object) -> bool:
    """Whether a listed file is none of the dataset's, but a system's companion of a picture or a folder."""
    return isinstance(name, str) and re.split(r"[/\\]", name)[-1].lower().startswith((".", "thumbs.db"))


def _is_fake(label: str) -> bool:
    return not label.lower().endswith("real")


def _items(value: Any, path: Path) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not DeepfakeBench's layout: {str(value)[:60]!r} where an object was expected")
    return value.items()
