"""Folders of your own: by split and class, or real faces alone."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import keep_wanted, relative_path
from dtn_fast.data.media import PICTURES, VIDEOS
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import UsageError


def read_folder(root: Path, source: Source = Source()) -> VideoTable:
    """Reads a folder <split>/<real or a forgery's name>/ of videos, pictures or folders of pictures."""
    videos = []
    for split in SPLITS:
        for kind in sorted(p for p in (root / split).glob("*") if p.is_dir()):
            method = REAL if kind.name.lower() == REAL else kind.name
            for path, frames in _media(root, kind):
                videos.append(Video(path, int(method != REAL), method, split, frames=frames))
    if not videos:
        raise UsageError(
            f"{root}: no <split>/<real or a forgery's name>/ with media in it; splits are {', '.join(SPLITS)}"
        )
    return audit(keep_wanted(VideoTable(root, videos, "folder"), source), {}, source.allow)


def read_reals(root: Path, source: Source = Source()) -> VideoTable:
    """Reads a folder of real faces or videos; eight tenths are train, one val, one test, by the file's (or folder's)
    name."""
    videos = []
    for path, frames in _media(root, root):
        draw = zlib.crc32(path.encode()) % 10
        split = "val" if draw == 8 else "test" if draw == 9 else "train"
        videos.append(Video(path, 0, REAL, split, frames=frames))
    if not videos:
        raise UsageError(f"{root}: no pictures or videos in it")
    return audit(keep_wanted(VideoTable(root, videos, "reals"), source), {}, source.allow)


def _media(root: Path, folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (name, frames) of every video, single picture and folder of pictures below ``folder``."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES | VIDEOS and p.is_file())
    for parent, group in itertools.groupby(sorted(files, key=lambda p: (p.parent, p)), key=lambda p: p.parent):
        media = list(group)
        pictures = [p for p in media if p.suffix.lower() in PICTURES]
        for path in media:
            if path.suffix.lower() in VIDEOS:
                yield relative_path(root, path), ()
            elif parent == folder:
                yield relative_path(root, path), (relative_path(root, path),)
        if pictures and parent != folder:
            yield relative_path(root, parent), tuple(relative_path(root, path) for path in pictures)
