"""DeeperForensics-1.0."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np

from dtn_fast.data.config import Source
from dtn_fast.data.corrupt import PERTURBATIONS
from dtn_fast.data.datasets.parsing import keep_wanted, read_text, safe_path, without_ending
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import UsageError

VARIANTS = (
    "end_to_end", *(f"end_to_end_level_{level}" for level in range(1, 6)), "end_to_end_random_level",
    *(f"end_to_end_mix_{n}_distortions" for n in (2, 3, 4)), "reenact_postprocess",
)  # fmt: skip


TYPES = dict(zip(("CS", "CC", "BW", "GNC", "GB", "JPEG", "VC"), PERTURBATIONS, strict=True))
"""Perturbations by their names in the dataset's lists."""
Perturbations = tuple[tuple[str, int], ...]


def read_deeperforensics(root: Path, source: Source) -> VideoTable:
    """Reads DeeperForensics-1.0; its reals are the FF++ c23 targets with the same first three digits.

    The fakes of a perturbed variant are perturbed on disk.  Each real gets the perturbations of its fake, in the same
    order, which the dataset's lists name, as its authors ask; without that list, ones drawn by the same rule (types and
    level of the variant) from the real's name, which a note of the table says.
    """
    if source.ffpp is None:
        raise UsageError(f"{root}: DeeperForensics' reals are FaceForensics++ videos; name its root with --ffpp")
    videos = []
    shared: set[Video] = set()
    notes = []
    for variant in source.variants:
        if variant not in VARIANTS:
            raise UsageError(f"--variants {variant}: known are {', '.join(VARIANTS)}")
        listed = _listed(root, variant)
        if listed is None and perturbations(variant, ""):
            notes.append(f"{variant}: {_list_of(root, variant)} is missing; the reals' perturbations are drawn here, "
                         "of the variant's types and levels")  # fmt: skip
        for split in source.splits or SPLITS:
            path = root / "lists" / "splits" / f"{split}.txt"
            names = read_text(path).split()
            if not names:
                raise UsageError(f"{path}: lists no video")
            for line in names:
                name = without_ending(safe_path(line, path))
                target, _, actor = name.partition("_")
                if not re.fullmatch(r"\d{3}", target) or not actor:
                    raise UsageError(f"{path}: {line!r} is not named TTT_<actor>.mp4")
                if listed is not None and name not in listed:
                    raise UsageError(f"{_list_of(root, variant)}: {name} is not listed; complete or delete the list")
                real = (source.ffpp / f"original_sequences/youtube/c23/videos/{target}.mp4").absolute().as_posix()
                added = perturbations(variant, target) if listed is None else listed[name]
                row = Video(real, 0, REAL, split, (target,), "c23", corruptions=added)
                if row not in shared:  # shared by variants without perturbations, or by chance
                    videos.append(row)
                shared.add(row)
                fake = f"manipulated_videos/{variant}/{name}.mp4"
                videos.append(Video(fake, 1, variant, split, (target, actor), "c23", target="" if added else real))
    sizes = {"train": 703, "val": 96, "test": 201}
    published = {(split, variant): sizes[split] for split in source.splits or SPLITS for variant in source.variants}
    table = VideoTable(root, videos, "deeperforensics", notes=notes)
    return audit(keep_wanted(table, source), published, source.allow)


def _list_of(root: Path, variant: str) -> Path:
    """The dataset's list of a variant's perturbations."""
    return root / "lists" / "manipulated_videos_distortions_meta" / f"manipulated_videos_{variant}_meta.txt"


def _listed(root: Path, variant: str) -> dict[str, Perturbations] | None:
    """The perturbations of each fake of a variant, in order, from lines ``PATH TYPE:LEVEL ...``; None: no list."""
    path = _list_of(root, variant)
    if not path.is_file():
        return None
    found = {}
    for line in filter(str.strip, read_text(path).splitlines()):
        video, *steps = line.split()
        pairs = [step.partition(":")[::2] for step in steps]
        if not pairs or not all(kind in TYPES and level in ("1", "2", "3", "4", "5") for kind, level in pairs):
            raise UsageError(f"{path}: {line[:80]!r} is no video with its perturbations, such as 000_M101.mp4 GB:3")
        found[without_ending(Path(safe_path(video, path)).name)] = tuple((TYPES[k], int(v)) for k, v in pairs)
    return found


def perturbations(variant: str, name: str) -> Perturbations:
    """The (perturbation, level) pairs that a DeeperForensics variant applies to the video ``name``."""
    rng = np.random.default_rng((zlib.crc32(variant.encode()), zlib.crc32(name.encode())))
    if match := re.fullmatch(r"end_to_end_level_(\d)", variant):
        return ((str(rng.choice(PERTURBATIONS)), int(match[1])),)
    if variant == "end_to_end_random_level":
        return ((str(rng.choice(PERTURBATIONS)), int(rng.integers(1, 6))),)
    if match := re.fullmatch(r"end_to_end_mix_(\d)_distortions", variant):
        kinds = rng.choice(PERTURBATIONS, int(match[1]), replace=False)
        return tuple((str(kind), int(rng.integers(1, 6))) for kind in kinds)
    return ()
