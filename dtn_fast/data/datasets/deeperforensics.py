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


def read_deeperforensics(root: Path, source: Source) -> VideoTable:
    """Reads DeeperForensics-1.0; its reals are the FF++ c23 targets with the same first three digits.

    The authors of DeeperForensics drew the perturbation of each fake in a distorted variant; a real gets one drawn by
    the same rule (types and level of the variant) from its own name.
    """
    if source.ffpp is None:
        raise UsageError(f"{root}: DeeperForensics' reals are FaceForensics++ videos; name its root with --ffpp")
    videos = []
    shared: set[Video] = set()
    for variant in source.variants:
        if variant not in VARIANTS:
            raise UsageError(f"--variants {variant}: known are {', '.join(VARIANTS)}")
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
                real = (source.ffpp / f"original_sequences/youtube/c23/videos/{target}.mp4").absolute().as_posix()
                drawn = perturbations(variant, target)
                row = Video(real, 0, REAL, split, (target,), "c23", corruptions=drawn)
                if row not in shared:  # shared by variants without perturbations, or by chance
                    videos.append(row)
                shared.add(row)
                fake = f"manipulated_videos/{variant}/{name}.mp4"
                videos.append(Video(fake, 1, variant, split, (target, actor), "c23", target="" if drawn else real))
    sizes = {"train": 703, "val": 96, "test": 201}
    published = {(split, variant): sizes[split] for split in source.splits or SPLITS for variant in source.variants}
    return audit(keep_wanted(VideoTable(root, videos, "deeperforensics"), source), published, source.allow)


def perturbations(variant: str, name: str) -> tuple[tuple[str, int], ...]:
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
