"""Attributes of the people in videos, such as gender or age, from a CSV file or the dataset's own lists."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from dtn_fast.data.datasets.parsing import read_table, without_ending
from dtn_fast.data.video_table import Video, noun
from dtn_fast.errors import UsageError, one_line

MOST = 20
"""Maximum number of values of an attribute."""
KEYS = ("video", "identity")
"""Columns of a CSV file that name what a row is about."""


def attributes_of(
    videos: Sequence[Video], split: str, path: Path | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """Value of each attribute for each of ``videos``, empty where it is unknown, and notes on what was left out.

    By the dataset's own lists, and by the CSV file at ``path``: its column ``video`` or ``identity`` names a video by
    its path or file name, or all videos whose first identity (of a fake the target) it is; every other column is an
    attribute, and replaces the dataset's of that name.  Values that differ in case only are the same.  The notes count
    videos of ``split``.  Raises UsageError on a file that is not such a table, or has no attribute.
    """
    found: dict[str, list[str]] = {}
    for number, video in enumerate(videos):
        for name, value in video.attributes:
            found.setdefault(name, [""] * len(videos))[number] = value
    notes: list[str] = []
    if path is not None:
        read, notes = _read(videos, split, path)
        found |= read
    kept = {}
    for name, values in found.items():
        spelled: dict[str, str] = {}
        same = [spelled.setdefault(value.casefold(), one_line(value)) for value in values]
        count, name = len(set(same) - {""}), one_line(name)
        if count > MOST:
            notes.append(f"left out: {name} has {count} values, more than {MOST}; write ranges, such as 20-39")
        elif count:
            kept[name] = same
    if path is not None and not kept:
        raise UsageError("; ".join([f"{path}: no attribute to group these videos by", *notes]))
    return kept, notes


def _read(videos: Sequence[Video], split: str, path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The attributes of a CSV file, as :func:`attributes_of` has them."""
    rows = read_table(path)
    if not rows:
        raise UsageError(f"{path}: has no rows below its header")
    columns = list(rows[0])
    key = next((name for name in KEYS if name in columns), "")
    if not key:
        raise UsageError(f"{path}: has no column video or identity; its columns are {', '.join(columns)}")
    attributes = [name for name in columns if name and name not in KEYS]
    if not attributes:
        raise UsageError(f"{path}: has no attribute beside {key}; add a column for each, such as gender")
    places = _names(videos) if key == "video" else _identities(videos)
    values = {name: [""] * len(videos) for name in attributes}
    first: dict[str, dict[str, str]] = {}
    strange, again = [], 0
    for row in rows:
        name = row[key].replace("\\", "/").removeprefix("./")
        own = {attribute: row[attribute] for attribute in attributes}
        if first.setdefault(name, own) != own:
            differ = next(a for a in attributes if first[name][a] != own[a])
            raise UsageError(f"{path}: {key} {name} has two rows, with {differ} {first[name][differ]!r} and "
                             f"{own[differ]!r}; delete one")  # fmt: skip
        again += first[name] is not own
        numbers = places.get(name, [])
        if key == "video" and len({videos[number].path for number in numbers}) > 1:
            raise UsageError(f"{path}: {name} may be {len(numbers)} videos; write the path, such as "
                             f"{videos[numbers[0]].path}")  # fmt: skip
        if not numbers:
            strange.append(name)
        for number in numbers:
            for attribute, value in own.items():
                values[attribute][number] = value
    notes = _strange_notes(strange, len(rows), key, list(places), path)
    if again:
        notes.append(f"{path.name}: {again} rows are there twice")
    told = {number for name in first for number in places.get(name, [])}
    measured = [number for number, video in enumerate(videos) if video.split == split]
    if without := sum(number not in told for number in measured):
        unit = noun([videos[number] for number in measured])
        notes.append(f"{path.name}: {without} of {len(measured)} {unit} have no row, and are in no group")
    return values, notes


def _names(videos: Sequence[Video]) -> dict[str, list[int]]:
    """Numbers of the videos that a path, or else a path without ending or a file name, may stand for."""
    whole: dict[str, list[int]] = {}
    short: dict[str, list[int]] = {}
    for number, video in enumerate(videos):
        whole.setdefault(video.path, []).append(number)
        file = video.path.rpartition("/")[2]
        for name in dict.fromkeys((without_ending(video.path), file, without_ending(file))):
            short.setdefault(name, []).append(number)
    return short | whole


def _identities(videos: Sequence[Video]) -> dict[str, list[int]]:
    """Numbers of the videos by their first identity."""
    found: dict[str, list[int]] = {}
    for number, video in enumerate(videos):
        for identity in video.identities[:1]:
            found.setdefault(identity, []).append(number)
    return found


def _strange_notes(strange: list[str], rows: int, key: str, known: list[str], path: Path) -> list[str]:
    """A note on the rows whose name is of no video.  Raises UsageError when that is all of them."""
    if not strange:
        return []
    near = difflib.get_close_matches(strange[0], known, 1)
    like = f", the nearest is {near[0]}" if near else f"; one that is known is {known[0]}" if known else ""
    text = f"{len(strange)} of {rows} rows name no {key} of these crops, the first is {strange[0][:80]!r}{like}"
    if len(strange) == rows:
        hint = "; these crops know no identities, so name videos" if not known else ""
        raise UsageError(f"{path}: {text}{hint}")
    return [f"{path.name}: {text}"]
