"""Folders of your own: by split and class, by class alone, or real faces alone."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import draw_split, keep_wanted, relative_path
from dtn_fast.data.media import CLUTTER, MAY_MOVE, Kind, MediaFiles, find_media, kind_by_name, kind_of
from dtn_fast.data.pictures import count_pictures
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import MediaError, UsageError

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
                 "test": "test", "testing": "test"}  # fmt: skip
"""Names of folders, in lower case, and the splits that they hold."""
REAL_FOLDERS = ("real", "reals")
ENDS = 2**16
"""Bytes at either end of a file that tell it from others, with its size."""


def read_folder(root: Path, source: Source = Source()) -> VideoTable:
    """Reads a folder <split>/<real or a forgery's name>/ of videos, pictures or folders of pictures.

    Without split folders, --split says how much each split gets of the people (the folders directly in class folders)
    and of the files directly in class folders.  The draw depends on a person's name or a file's content alone.
    """
    splits, left_out = _split_folders(root), MediaFiles()
    if splits and source.split != Source.split:
        raise UsageError(f"--split {source.split}: {root} has the split folders {', '.join(splits.values())} already")
    videos: list[Video] = []
    drawn = Counter[str]()
    origin: dict[str, Path] = {}
    parents = {root / name: split for split, name in splits.items()} or ({root: ""} if has_classes(root) else {})
    for parent, split in parents.items():
        for kind in _folders(parent):
            method = REAL if kind.name.lower() in REAL_FOLDERS else kind.name
            for path, frames in _media(root, kind, left_out):
                if (other := origin.setdefault(_real_folder(root, path, frames), kind)) != kind:
                    raise UsageError(f"{root}: {other} and {kind} hold the same folder, by a link: {path}")
                try:
                    place = split or _draw(kind, root / path, source, drawn)
                except OSError as error:
                    left_out.problems.append(error)
                    continue
                videos.append(Video(path, int(method != REAL), method, place, frames=frames))
    notes = _notes(root, left_out)
    others = [folder.name for folder in _folders(root) if splits and folder.name not in splits.values()]
    notes += [f"left out: folders that are no split: {', '.join(others)}"] if others else []
    loose = [path for parent in {root, *parents} for path in _files(parent)]
    notes += [f"left out: {len(loose)} files outside class folders, the first is {min(loose).name}"] if loose else []
    if not videos:
        layout = "no <split>/<real or a forgery's name>/ with media in it, and no real/ beside forgeries; splits are "
        raise UsageError("; ".join([f"{root}: {layout}{', '.join(SPLIT_FOLDERS)}", *notes]))
    if drawn:
        by = " and of ".join(f"{count} {what}" for what, count in sorted(drawn.items()))
        notes.append(
            f"no split folders: {source.split} percent of {by} are train, val and test (prepare --split changes it)"
        )
    table = keep_wanted(VideoTable(root, videos, "folder", notes=notes), source)
    kept = Counter((video.split, video.method) for video in table.videos)
    for split in (source.splits or SPLITS) if drawn else sorted({video.split for video in table.videos}):
        absent = sorted({method for _, method in kept if not kept[split, method]})
        notes += [f"{split} has no {', '.join(absent)}"] if absent else []
    return audit(table, {}, source.allow)


def read_reals(root: Path, source: Source = Source()) -> VideoTable:
    """Reads a folder of real faces or videos, divided as --split says by the name of the file (or of its folder)."""
    left_out = MediaFiles()
    videos = [Video(path, 0, REAL, draw_split(os.fsencode(path), source), frames=frames)
              for path, frames in _media(root, root, left_out)]  # fmt: skip
    notes = _notes(root, left_out)
    if not videos:
        raise UsageError("; ".join([f"{root}: no pictures or videos in it", *notes]))
    return audit(keep_wanted(VideoTable(root, videos, "reals", notes=notes), source), {}, source.allow)


def has_classes(root: Path) -> bool:
    """Whether a folder has split folders or a folder of reals, and is not one of reals alone."""
    return bool(_split_folders(root)) or any(folder.name.lower() in REAL_FOLDERS for folder in _folders(root))


def _split_folders(root: Path) -> dict[str, str]:
    """The split folders that are there: split -> name.  Raises UsageError when two hold the same split."""
    found: dict[str, str] = {}
    for folder in _folders(root):
        if (split := SPLIT_FOLDERS.get(folder.name.lower())) and found.setdefault(split, folder.name) != folder.name:
            raise UsageError(f"{root}: {found[split]} and {folder.name} both hold {split}; join them")
    return dict(sorted(found.items(), key=lambda item: SPLITS.index(item[0])))


def _folders(parent: Path) -> list[Path]:
    shown = (path for path in parent.glob("[!.]*") if path.name.lower() not in CLUTTER)
    return sorted(path for path in shown if path.is_dir())


def _files(parent: Path) -> list[Path]:
    return [path for path in parent.glob("[!.]*") if kind_by_name(path) in ("picture", "video") and path.is_file()]


def _media(root: Path, folder: Path, left_out: MediaFiles) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (name, frames) of every video, single picture and folder of pictures below ``folder``."""
    found = find_media(folder)
    left_out.unread += found.unread
    left_out.problems += found.problems
    for parent, group in itertools.groupby(sorted(found.files, key=lambda p: (p.parent, p)), key=lambda p: p.parent):
        kinds = {path: _kind(path) for path in group}
        pictures = [path for path, kind in kinds.items() if kind == "picture"]
        for path, kind in kinds.items():
            if kind == "video":
                yield relative_path(root, path), ()
            elif parent == folder:
                yield relative_path(root, path), (relative_path(root, path),)
        if pictures and parent != folder:
            yield relative_path(root, parent), tuple(relative_path(root, path) for path in pictures)


def _kind(path: Path) -> Kind:
    """The kind of a media file; a moving picture is a video."""
    kind = kind_by_name(path)
    kind = kind if kind in ("picture", "video") else kind_of(path)
    return "video" if kind == "picture" and path.suffix.lower() in MAY_MOVE and _moves(path) else kind


def _moves(path: Path) -> bool:
    try:
        return count_pictures(path)[1]
    except MediaError:
        return False


def _real_folder(root: Path, path: str, frames: tuple[str, ...]) -> str:
    """The folder of a row's files, without links."""
    return os.path.realpath((root / (frames[0] if frames else path)).parent)


def _draw(kind: Path, path: Path, source: Source, drawn: Counter[str]) -> str:
    """The split of a person or, directly in the class folder ``kind``, of a file; counts which of them it was."""
    person, *below = path.relative_to(kind).parts
    if below or path.is_dir():
        drawn["videos by their person's folder"] += 1
        return draw_split(unicodedata.normalize("NFC", person).casefold().encode("utf-8", "surrogateescape"), source)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(ENDS)
        file.seek(max(size - ENDS, 0))
        key = b"%d" % size + head + file.read(ENDS)
    drawn["files by content"] += 1
    return draw_split(key, source)


def _notes(root: Path, left_out: MediaFiles) -> list[str]:
    """Lines on the files that were not read."""
    notes, unread, problems = [], left_out.unread, left_out.problems
    if unread:
        notes.append(f"left out: {len(unread)} files in forms that are not read, the first is {unread[0].name}")
    if problems:
        first = f"{problems[0].filename}: {problems[0].strerror or problems[0]}"
        notes.append(f"left out: {len(problems)} files or folders that cannot be read, the first is {first}")
    return notes
