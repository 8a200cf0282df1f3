"""Checked reading of the lists, JSON, paths and folders of datasets, shared by the readers."""

from __future__ import annotations

import codecs
import csv
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtn_fast.data.config import Source
from dtn_fast.data.media import VIDEOS
from dtn_fast.data.video_table import REAL, SPLITS, VideoTable
from dtn_fast.errors import UsageError

LONGEST = 1024
"""Maximum length in bytes of a listed path."""
_SURPLUS = "\0"
"""Name of the cells of a row that the header does not name."""


def keep_wanted(table: VideoTable, source: Source, default: tuple[str, ...] = SPLITS) -> VideoTable:
    """The table's videos of the splits and methods that ``source`` requests."""
    splits = source.splits or default
    known = {video.method for video in table.videos}
    if unknown := set(source.methods) - known:
        raise UsageError(
            f"{table.root}: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(known - {REAL}))}"
        )
    videos = [
        video
        for video in table.videos
        if video.split in splits and (not video.label or not source.methods or video.method in source.methods)
    ]
    return VideoTable(table.root, videos, table.dataset, False, table.crops, table.lmdb, table.notes)


def carve_split(key: str, parts: int) -> str:
    """Assigns about one key in ``parts`` to val and the others to train; the same on every machine."""
    return "val" if zlib.crc32(key.encode()) % parts == 0 else "train"


def draw_split(key: bytes, source: Source) -> str:
    """The split of the person or file that ``key`` names, by the shares of ``--split``; the same on every machine."""
    number = zlib.crc32(key)
    percent = number % 10 * 10 + number // 10 % 10
    train, val, _ = source.shares
    return "train" if percent < train else "val" if percent < train + val else "test"


def safe_path(name: object, source: Path) -> str:
    """Checks that ``name`` is a relative path inside the root; returns it with forward slashes."""
    path = name.replace("\\", "/").removeprefix("./") if isinstance(name, str) else ""
    parts = path.split("/")
    if (
        not path.isprintable()
        or ":" in path
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or len(path.encode()) > LONGEST
    ):
        raise UsageError(f"{source}: {str(name)[:80]!r} is not a path inside the dataset")
    return path


def read_text(path: Path) -> str:
    """The text of a list in UTF-8, or in UTF-16 with a byte order mark (as PowerShell writes it), without the mark."""
    try:
        data = path.read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: the list cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the list is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error


def read_object(path: Path) -> dict[str, dict[str, Any]]:
    """A JSON object whose values are objects."""
    rows = read_json(path)
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise UsageError(f"{path}: not a JSON object with an object for each video")
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, whose names become lower case; a missing cell is empty.

    Raises UsageError when the file is not such a table, or a row has more cells than the header.
    """
    try:
        found = list(csv.DictReader(io.StringIO(read_text(path), newline=""), restkey=_SURPLUS, restval=""))
    except csv.Error as error:
        raise UsageError(f"{path}: not a CSV table ({error})") from error
    for number, row in enumerate(found, 2):
        if any(row.pop(_SURPLUS, ())):
            raise UsageError(f"{path}: row {number} has more cells than the header; quote cells that hold commas")
    return [{str(k).strip().lower(): str(v).strip() for k, v in row.items()} for row in found]


def check_columns(rows: list[dict[str, str]], wanted: Sequence[str], path: Path) -> None:
    """Raises UsageError when a table has no rows or lacks a column of ``wanted``."""
    if not rows:
        raise UsageError(f"{path}: has no rows below its header")
    if missing := [name for name in wanted if name not in rows[0]]:
        raise UsageError(f"{path}: has no column {missing[0]!r}; its columns are {', '.join(rows[0])}")


def videos_in(folder: Path) -> list[Path]:
    """The video files directly in a folder, in order; hidden files are no videos."""
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in VIDEOS and p.is_file())


def without_ending(name: str) -> str:
    """The name or path of a video file without its ending."""
    stem, _, ending = name.rpartition(".")
    return stem if f".{ending.lower()}" in VIDEOS else name


def relative_path(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
