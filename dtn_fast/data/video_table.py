"""The video table, common to all datasets, and the audit that it must pass before any video is read."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtn_fast.data.media import VIDEOS
from dtn_fast.errors import UsageError

SPLITS = ("train", "val", "test")
REAL = "real"
Allowance = Literal["counts", "leaks"]


class Video(NamedTuple):
    path: str
    """Path of a file or a folder of frames under the dataset's root, with forward slashes; names the video.

    It is absolute for a video of another dataset (the reals of DeeperForensics)."""
    label: int
    """0 real, 1 fake."""
    method: str
    """Name of the forgery, or ``real``."""
    split: str
    identities: tuple[str, ...] = ()
    """People or source clips in the video: (target,) for a real, (target, source) for a fake; empty: unknown."""
    compression: str = ""
    mask: str = ""
    """Path under the root of the video or folder that marks the forged pixels; empty: none."""
    target: str = ""
    """``path`` of the real video that a fake was made from; empty: unknown."""
    frames: tuple[str, ...] = ()
    """Paths under the root of the video's pictures, in order; empty: ``path`` is a video file."""
    corruptions: tuple[tuple[str, int], ...] = ()
    """Perturbations (name, level) of :mod:`dtn_fast.data.corrupt`, applied in this order before face finding."""
    attributes: tuple[tuple[str, str], ...] = ()
    """Attributes (name, value) of the person shown, such as ("gender", "female"), by the dataset's own lists."""

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object; without attributes it is as earlier versions wrote it."""
        row = self._asdict()
        return row if self.attributes else {name: value for name, value in row.items() if name != "attributes"}


@dataclass(frozen=True)
class VideoTable:
    """The videos of one dataset."""

    root: Path
    videos: list[Video]
    dataset: str = "ffpp"
    synthetic: bool = False
    crops: bool = False
    """Whether the pictures are face crops already, to be resized without face finding."""
    lmdb: Path | None = None
    """The LMDB that holds the frames instead of files under the root."""
    notes: list[str] = field(default_factory=list)
    """Findings of the audit, one line each."""


class Problem(NamedTuple):
    kind: Literal["counts", "leaks", "labels"]
    text: str


def audit(
    table: VideoTable,
    published: Mapping[tuple[str, str], int],
    allow: Collection[Allowance] = (),
    problems: Collection[Problem] = (),
    exists: Callable[[Video], bool] | None = None,
) -> VideoTable:
    """Checks a table; returns it without missing videos, with the findings in ``notes``.

    The listed name of a video file may have another ending, or one in another case, than the file.
    published: number of videos by (split, method), from the dataset's paper or its official lists.  problems: findings
    of the reader.  exists: whether a video is present; default: whether its files are.  Checked: every video is
    present; no video is listed twice or in two splits; no pair of identities, and no real and a fake made from it, are
    in different splits; the counts are the published ones.  Raises UsageError naming every problem of a kind not in
    ``allow``; wrong labels and repeated videos are never allowed.
    """
    videos = _as_on_disk(table)
    found = [*problems, *_repeated(videos)]
    there = exists or (lambda video: _is_there(table.root, video))
    present = [video for video in videos if there(video)]
    if gone := len(videos) - len(present):
        kept = {id(video) for video in present}
        first = next(video.path for video in videos if id(video) not in kept)
        text = f"{gone} of {len(videos)} {noun(videos)} are missing, the first is {first}"
        found.append(Problem("counts", text))
    counts = Counter((video.split, video.method) for video in present)
    found += [
        Problem("counts", f"{split}/{method} has {counts[split, method]} videos, published are {count}")
        for (split, method), count in published.items()
        if counts[split, method] != count
    ]
    found += _leaks(present)
    wrong = [problem for problem in found if problem.kind not in allow]
    if wrong:
        remedies = sorted({problem.kind for problem in wrong} & {"counts", "leaks"})
        remedy = f" (--allow {' '.join(remedies)} accepts that)" if {p.kind for p in wrong} == set(remedies) else ""
        raise UsageError(f"{table.root}: {'; '.join(problem.text for problem in wrong)}{remedy}")
    if not present:
        raise UsageError(f"{table.root}: no video of the requested splits is there")
    counted = ", ".join(f"{split}/{method} {count}" for (split, method), count in sorted(counts.items()))
    notes = [
        *table.notes,
        f"{len(present)} {noun(present)}: {counted}",
        *(f"accepted: {problem.text}" for problem in found),
    ]
    if not published:
        notes.append("counts not checked: none are published for this selection")
    return VideoTable(table.root, present, table.dataset, table.synthetic, table.crops, table.lmdb, notes)


def noun(videos: Collection[Video]) -> str:
    """What the rows of a table are called: pictures, if each is a single one, or videos."""
    return "pictures" if videos and all(len(video.frames) == 1 for video in videos) else "videos"


def _as_on_disk(table: VideoTable) -> list[Video]:
    """The rows with the paths of video files as they are on the disk, where only the ending differs."""

    @functools.cache
    def names(folder: str) -> dict[str, list[str]]:
        """Names of the video files in a folder by stem."""
        by_stem: dict[str, list[str]] = {}
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(table.root / folder)):
                stem, ending = os.path.splitext(name)
                if ending.lower() in VIDEOS and not name.startswith("."):
                    by_stem.setdefault(stem, []).append(name)
        return by_stem

    def actual(path: str) -> str:
        folder, slash, name = path.rpartition("/")
        stem, ending = os.path.splitext(name)
        alike = names(folder + slash).get(stem, []) if ending.lower() in VIDEOS else []
        if name in alike:
            return path
        alike = [other for other in alike if other.lower() == name.lower()] or alike
        return folder + slash + alike[0] if len(alike) == 1 else path

    return [
        video if video.frames
        else video._replace(path=actual(video.path), mask=actual(video.mask), target=actual(video.target))
        for video in table.videos
    ]  # fmt: skip


def _is_there(root: Path, video: Video) -> bool:
    return all((root / path).is_file() for path in (video.frames or (video.path,)))


def _repeated(videos: list[Video]) -> list[Problem]:
    first: dict[tuple[object, ...], Video] = {}
    found = []
    for video in videos:
        other = first.setdefault((video.path, video.corruptions), video)
        if other is not video:
            where = f"in both {other.split} and {video.split}" if other.split != video.split else "listed twice"
            found.append(Problem("labels", f"video {video.path} is {where}"))
    return shortened(found)


def _leaks(videos: list[Video]) -> list[Problem]:
    pairs: dict[frozenset[str], str] = {}
    home = {video.path: video.split for video in videos if not video.label}
    found = []
    for video in videos:
        if len(video.identities) > 1:
            pair = frozenset(video.identities)
            other = pairs.setdefault(pair, video.split)
            if other != video.split:
                people = "+".join(sorted(pair))
                found.append(Problem("leaks", f"identity pair {people} is in both {other} and {video.split}"))
        if home.get(video.target, video.split) != video.split:
            text = f"{video.path} ({video.split}) was made from {video.target} ({home[video.target]})"
            found.append(Problem("leaks", text))
    return shortened(found)


def shortened(problems: list[Problem]) -> list[Problem]:
    """The first problem with the number of others, so that the error stays one line."""
    if len(problems) < 2:
        return problems
    return [Problem(problems[0].kind, f"{problems[0].text} and {len(problems) - 1} more like it")]


def video_of(row: dict[str, Any]) -> Video:
    """Makes a table's row from its JSON object."""
    lists: dict[str, Any] = {name: tuple(row[name]) for name in ("identities", "frames")}
    lists["corruptions"] = tuple((str(name), int(level)) for name, level in row["corruptions"])
    lists["attributes"] = tuple((str(name), str(value)) for name, value in row.get("attributes", ()))
    return Video(**{**row, **lists})
