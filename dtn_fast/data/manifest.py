"""A dataset's layout on disk to one table of videos with audited splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from dtn_fast.data.synthetic import is_synthetic
from dtn_fast.errors import UsageError

SPLITS = ("train", "val", "test")
REAL = "real"


class Video(NamedTuple):
    path: str
    """Relative to the dataset's root, with forward slashes: the video's name everywhere."""
    label: int
    """0 real, 1 fake."""
    method: str
    """The forgery, or ``real``."""
    split: str
    identities: tuple[str, ...]
    """The video ids involved: (target,) of a real, (target, source) of a fake."""


class Manifest(NamedTuple):
    root: Path
    videos: list[Video]
    synthetic: bool


def read_ffpp(root: Path, compression: str = "c23", splits: Path | None = None) -> Manifest:
    """FaceForensics++ (or a set laid out like it): official pair lists against the files there.

    A pair (a, b) of a split gives the reals a and b and, for each method, the fakes a_b and b_a.  ``splits`` holds
    train.json, val.json and test.json; default ``root/splits``, then ``root``.  Raises UsageError when a list or a
    video is missing, an identity is in two splits, or a list is malformed.
    """
    folder = splits or (root / "splits" if (root / "splits").is_dir() else root)
    methods = sorted(p.parent.parent.name for p in root.glob(f"manipulated_sequences/*/{compression}/videos"))
    if not methods:
        raise UsageError(f"{root}: no manipulated_sequences/*/{compression}/videos there; is it the FF++ root?")
    videos: list[Video] = []
    owner: dict[str, str] = {}
    missing: list[str] = []
    for split in SPLITS:
        for a, b in _pairs(folder / f"{split}.json"):
            for target, source in ((a, b), (b, a)):
                if owner.setdefault(target, split) != split:
                    raise UsageError(f"{folder}: identity {target} is in both {owner[target]} and {split}")
                rows: list[tuple[str, int, str, tuple[str, ...]]] = [
                    (f"original_sequences/youtube/{compression}/videos/{target}.mp4", 0, REAL, (target,))
                ]
                for method in methods:
                    path = f"manipulated_sequences/{method}/{compression}/videos/{target}_{source}.mp4"
                    rows.append((path, 1, method, (target, source)))
                for path, label, method, identities in rows:
                    if not (root / path).is_file():
                        missing.append(path)
                    videos.append(Video(path, label, method, split, identities))
    if missing:
        raise UsageError(f"{root}: {len(missing)} of {len(videos)} videos are missing, the first is {missing[0]}")
    return Manifest(root, videos, is_synthetic(root))


def _pairs(path: Path) -> list[tuple[str, str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(str(a), str(b)) for a, b in rows]
    except OSError as error:
        raise UsageError(f"{path}: the split list cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a list of id pairs ({error})") from error
    if not pairs or any("/" in i or "\\" in i or i in ("", ".", "..") for pair in pairs for i in pair):
        raise UsageError(f"{path}: not a list of id pairs (empty, or an id that is no plain name)")
    return pairs
