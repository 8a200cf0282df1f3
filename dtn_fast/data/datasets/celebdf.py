"""Celeb-DF v1 and v2."""

from __future__ import annotations

import re
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import (
    carve_split,
    keep_wanted,
    read_text,
    relative_path,
    safe_path,
    videos_in,
    without_ending,
)
from dtn_fast.data.video_table import REAL, Problem, Video, VideoTable, audit
from dtn_fast.errors import UsageError

FORGERY = "Celeb-synthesis"
CELEBDF = {"celebdf-v1": (408, 795, None), "celebdf-v2": (890, 5639, (178, 340))}
"""Published: reals, fakes, and of these (reals, fakes) in the official test list."""


def read_celebdf(root: Path, source: Source) -> VideoTable:
    """The table of Celeb-DF: the official list names the test videos; the rest is train and, by identity, val.

    A train video whose people fall on both sides of train and val is left out.
    """
    path = root / "List_of_testing_videos.txt"
    listed = _test_list(path)
    videos, found, straddling, problems = _videos(root, listed, path.name)
    videos += [  # named in the list and not on the disk: the audit counts them
        Video(f"{name}.mp4", label, FORGERY if label else REAL, "test")
        for name, label in sorted(listed.items())
        if name not in found
    ]
    if not any(video.label for video in videos):
        raise UsageError(f"{root}: no {FORGERY} there; is it the Celeb-DF root?")
    reals, fakes, test = CELEBDF[source.dataset]
    splits = source.splits or ("test",)
    published = {}
    if test and len(listed) != sum(test):  # a list cut short would leave test videos to training
        problems.append(Problem("counts", f"{path.name} lists {len(listed)} videos, published are {sum(test)}"))
    if test and "test" in splits:
        published = {("test", REAL): test[0], ("test", FORGERY): test[1]}
    notes = []
    if set(splits) != {"test"}:
        notes = [f"{straddling} videos left out: their people are in both train and val"]
        if len(videos) + straddling != reals + fakes:
            text = f"{len(videos) + straddling} videos in all, published are {reals} reals and {fakes} fakes"
            problems.append(Problem("counts", text))
    table = keep_wanted(VideoTable(root, videos, source.dataset, notes=notes), source, ("test",))
    return audit(table, published, source.allow, problems)


def _test_list(path: Path) -> dict[str, int]:
    """The official list: name in lower case without ending -> 0 real, 1 fake (the file itself has 1 for a real)."""
    listed: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            label, *name = line.split(maxsplit=1)
            if label not in ("0", "1") or not name:
                raise UsageError(f"{path}:{number}: not '<0 or 1> <folder>/<file>'")
            key, fake = without_ending(safe_path(name[0].strip().lower(), path)), 1 - int(label)
            if listed.setdefault(key, fake) != fake:
                raise UsageError(f"{path}:{number}: {key} is listed with both labels")
    if not listed:
        raise UsageError(f"{path}: lists no video")
    return listed


def _videos(root: Path, listed: dict[str, int], list_name: str) -> tuple[list[Video], set[str], int, list[Problem]]:
    """The videos on the disk, their names as in the list, how many straddle train and val, and wrong labels."""
    videos, found, straddling, problems = [], set[str](), 0, []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        kind = folder.name.lower()
        if kind not in ("celeb-real", "youtube-real", "celeb-synthesis"):
            continue
        fake = kind == "celeb-synthesis"
        for file in sorted([*videos_in(folder), *videos_in(folder / "videos")]):
            people = tuple(re.findall(r"id\d+", file.stem)) or (file.stem,)
            real = ""
            if fake:
                if not re.fullmatch(r"id\d+_id\d+_\d+", file.stem):
                    raise UsageError(f"{file}: not named idA_idB_NNNN.mp4")
                scene = file.stem.rpartition("_")[2]
                real = f"{_real_folder(file)}/{people[0]}_{scene}.mp4"
            name = f"{kind}/{file.stem.lower()}"
            sides = {carve_split(person, 6) for person in people}
            split = "test" if name in listed else sides.pop() if len(sides) == 1 else ""
            found.add(name)
            if listed.get(name, fake) != fake:
                text = f"{list_name} calls {name} the opposite of its folder (1 is a real there)"
                problems.append(Problem("labels", text))
            if not split:
                straddling += 1
                continue
            method = FORGERY if fake else REAL
            videos.append(Video(relative_path(root, file), int(fake), method, split, people, target=real))
    return videos, found, straddling, problems


def _real_folder(fake: Path) -> str:
    """The folder of the celebrity reals, given a fake's path: the mp4s lie directly in it or under videos/."""
    return "Celeb-real/videos" if fake.parent.name == "videos" else "Celeb-real"
