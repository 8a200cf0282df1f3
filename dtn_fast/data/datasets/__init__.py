"""One reader per dataset, from its layout and split files on disk to a :mod:`dtn_fast.data.video_table`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from dtn_fast.data.config import Dataset, Source
from dtn_fast.data.corrupt import check
from dtn_fast.data.datasets.aiface import read_aiface
from dtn_fast.data.datasets.celebdf import read_celebdf
from dtn_fast.data.datasets.deeperforensics import read_deeperforensics
from dtn_fast.data.datasets.deepfake_eval import read_deepfake_eval
from dtn_fast.data.datasets.deepfakebench import read_deepfakebench
from dtn_fast.data.datasets.dfdc import read_dfdc, read_dfdc_preview
from dtn_fast.data.datasets.fakeavceleb import read_fakeavceleb
from dtn_fast.data.datasets.ffpp import read_dfd, read_ffpp
from dtn_fast.data.datasets.folder import read_folder, read_reals
from dtn_fast.data.video_table import SPLITS, VideoTable
from dtn_fast.errors import UsageError


def read(root: Path, source: Source = Source()) -> VideoTable:
    """Reads and audits a dataset's table.  Raises UsageError if lists are missing or malformed, or the audit fails."""
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    for split in source.splits:
        if split not in SPLITS:
            raise UsageError(f"--splits {split}: known are {', '.join(SPLITS)}")
    if source.dataset not in READERS:
        raise UsageError(f"--dataset {source.dataset}: known are {', '.join(get_args(Dataset))}")
    for option, datasets in OWN_OPTIONS.items():
        if source.dataset not in datasets and getattr(source, option) != getattr(Source, option):
            raise UsageError(f"--{option.replace('_', '-')}: for --dataset {', '.join(datasets)} only")
    return _corrupted(READERS[source.dataset](root, source), source)


def _corrupted(table: VideoTable, source: Source) -> VideoTable:
    """The table with each video once for every requested corruption and level, or as it is when none is requested."""
    if not source.corrupt:
        return table
    for kind in source.corrupt:
        check(kind, min(source.corrupt_levels, default=0))
        if kind == "h264_still":
            raise UsageError("--corrupt h264_still: is of single pictures; video is H.264 over whole videos")
    if not source.corrupt_levels:
        raise UsageError("--corrupt-levels: name at least one")
    if table.crops or any(video.frames for video in table.videos):
        raise UsageError(f"{table.root}: --corrupt changes whole videos, and this dataset has pictures")
    if any(video.corruptions for video in table.videos):
        raise UsageError(f"{table.root}: --corrupt: these videos are perturbed already; read --variants end_to_end")
    steps = [(kind, level) for kind in dict.fromkeys(source.corrupt) for level in dict.fromkeys(source.corrupt_levels)]
    videos = [video._replace(corruptions=(step,)) for video in table.videos for step in steps]
    note = f"each video {len(steps)} times: {', '.join(f'{kind} {level}' for kind, level in steps)}"
    return replace(table, videos=videos, notes=[*table.notes, note])


READERS: dict[str, Callable[[Path, Source], VideoTable]] = {
    "ffpp": read_ffpp,
    "dfd": read_dfd,
    "celebdf-v1": read_celebdf,
    "celebdf-v2": read_celebdf,
    "dfdc": read_dfdc,
    "dfdc-preview": read_dfdc_preview,
    "deeperforensics": read_deeperforensics,
    "deepfakebench": read_deepfakebench,
    "aiface": read_aiface,
    "deepfake-eval-2024": read_deepfake_eval,
    "fakeavceleb": read_fakeavceleb,
    "folder": read_folder,
    "reals": read_reals,
}
OWN_OPTIONS = {"split": ("folder", "reals", "fakeavceleb"), "root_map": ("deepfakebench", "aiface")}
"""Options that only these datasets have."""
