"""One table of videos for every dataset, and the audit that each table must pass before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtn_fast.errors import UsageError

SPLITS = ("train", "val", "test")
REAL = "real"
Allowance = Literal["counts", "leaks"]


class Video(NamedTuple):
    path: str
    """The video's name: a file or a folder of frames under the dataset's root, with forward slashes.

    Absolute where a dataset borrows another's videos (DeeperForensics its reals)."""
    label: int
    """0 real, 1 fake."""
    method: str
    """The forgery, or ``real``."""
    split: str
    identities: tuple[str, ...] = ()
    """The people or source clips involved: (target,) of a real, (target, source) of a fake; empty when unknown."""
    compression: str = ""
    mask: str = ""
    """The video of forged pixels, under the root; empty: none."""
    target: str = ""
    """Path of the real video that a fake was made from; empty: unknown."""
    frames: tuple[str, ...] = ()
    """Pictures under the root, in order, where the video is given as pictures; empty: ``path`` is a video file."""
    corruptions: tuple[tuple[str, int], ...] = ()
    """(name, level) of :mod:`dtn_fast.data.corrupt`, applied in this order before faces are searched."""


@dataclass(frozen=True)
class VideoTable:
    """The videos of one dataset."""

    root: Path
    videos: list[Video]
    dataset: str = "ffpp"
    synthetic: bool = False
    crops: bool = False
    """The pictures are faces already: they are resized, not searched."""
    lmdb: Path | None = None
    """The LMDB that holds the frames instead of files under the root."""
    notes: list[str] = field(default_factory=list)
    """What the audit found, a line each."""


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
    """The manifest without missing videos, notes filled; refuses one that would give wrong figures.

    published: (split, method) -> number of videos, from the dataset's paper or its official lists.  ``problems``: what
    the reader itself saw.  Checked: every video is there; no video is listed twice or in two splits; no pair of
    identities, and no real and a fake made from it, are in different splits; the counts are the published ones.
    Raises UsageError naming every problem of a kind not in ``allow``; wrong labels and repeated videos are never
    allowed.
    """
    found = [*problems, *_repeated(table.videos)]
    there = exists or (lambda video: _is_there(table.root, video))
    present = [video for video in table.videos if there(video)]
    if gone := len(table.videos) - len(present):
        kept = {id(video) for video in present}
        first = next(video.path for video in table.videos if id(video) not in kept)
        found.append(Problem("counts", f"{gone} of {len(table.videos)} videos are missing, the first is {first}"))
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
        raise UsageError(f"{table.root}: no video of the asked splits is there")
    counted = ", ".join(f"{split}/{method} {count}" for (split, method), count in sorted(counts.items()))
    notes = [*table.notes, f"{len(present)} videos: {counted}", *(f"accepted: {problem.text}" for problem in found)]
    if not published:
        notes.append("counts not checked: none are published for this selection")
    return VideoTable(table.root, present, table.dataset, table.synthetic, table.crops, table.lmdb, notes)


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
    return _shortened(found)


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
    return _shortened(found)


def _shortened(problems: list[Problem]) -> list[Problem]:
    """The first, and how many more there are: an error is one line."""
    if len(problems) < 2:
        return problems
    return [Problem(problems[0].kind, f"{problems[0].text} and {len(problems) - 1} more like it")]


def video_of(row: dict[str, Any]) -> Video:
    """A manifest's row from JSON."""
    lists = {name: tuple(row[name]) for name in ("identities", "frames")}
    return Video(
        **{**row, **lists, "corruptions": tuple((str(name), int(level)) for name, level in row["corruptions"])}
    )
