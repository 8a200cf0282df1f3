"""FaceForensics++ and DeepFakeDetection."""

from __future__ import annotations

import re
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import keep_wanted, read_json, relative_path, safe_path, videos_in
from dtn_fast.data.media import VIDEOS, find_media
from dtn_fast.data.synthetic_marker import METHODS, expected_counts, is_synthetic
from dtn_fast.data.video_table import REAL, SPLITS, Video, VideoTable, audit
from dtn_fast.errors import UsageError

FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceShifter", "FaceSwap", "NeuralTextures")
FFPP_SIZE = {"train": 720, "val": 140, "test": 140}
DFD = "DeepFakeDetection"


def read_ffpp(root: Path, source: Source = Source()) -> VideoTable:
    """Reads FaceForensics++ or a set with its layout: each listed pair (a, b) gives reals a, b and fakes a_b, b_a."""
    folder = source.lists or (root / "splits" if (root / "splits").is_dir() else root)
    c = source.compression
    there = sorted(p.parent.parent.name for p in root.glob(f"manipulated_sequences/[!.]*/{c}/videos"))
    there = [method for method in there if method != DFD]
    methods = source.methods or tuple(there)
    if not methods:
        raise UsageError(f"{root}: no manipulated_sequences/*/{c}/videos there; is it the FF++ root? "
                         "(--dataset names other layouts)")  # fmt: skip
    if unknown := set(methods) - set(there):
        raise UsageError(f"{root}: no videos of {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    masks = {m: _masks(root, m) for m in methods}
    videos = []
    for split in source.splits or SPLITS:
        for a, b in _pairs(folder / f"{split}.json"):
            for target, other in ((a, b), (b, a)):
                real = f"original_sequences/youtube/{c}/videos/{target}.mp4"
                videos.append(Video(real, 0, REAL, split, (target,), c))
                for method in methods:
                    path = f"manipulated_sequences/{method}/{c}/videos/{target}_{other}.mp4"
                    mask = masks[method].get(f"{target}_{other}", "")
                    videos.append(Video(path, 1, method, split, (target, other), c, mask, real))
    synthetic = is_synthetic(root)
    sizes = expected_counts(root) if synthetic else FFPP_SIZE
    published = {(split, m): sizes[split] for split in source.splits or SPLITS for m in (REAL, *methods)}
    known = METHODS if synthetic else FFPP_METHODS
    absent = [] if source.methods else [method for method in known if method not in methods]
    notes = [f"missing forgeries: {', '.join(absent)}"] if absent else []
    return audit(VideoTable(root, videos, "ffpp", synthetic, notes=notes), published, source.allow)


def read_dfd(root: Path, source: Source = Source()) -> VideoTable:
    """Reads DeepFakeDetection from the FF++ tree; it has no official split, so all of it is test."""
    c = source.compression
    videos = []
    for path in videos_in(root / f"original_sequences/actors/{c}/videos"):
        actor = path.stem.partition("__")[0]
        videos.append(Video(relative_path(root, path), 0, REAL, "test", (actor,), c))
    masks = _masks(root, DFD)
    for path in videos_in(root / f"manipulated_sequences/{DFD}/{c}/videos"):
        match = re.fullmatch(r"([^_]+)_([^_]+)__(.+)__\w{8}", path.stem)
        if not match:
            raise UsageError(f"{path}: not named <target>_<source>__<scene>__<8 characters>.mp4")
        target, other, scene = match.groups()
        real = f"original_sequences/actors/{c}/videos/{target}__{scene}.mp4"
        mask = masks.get(path.stem, "")
        videos.append(Video(relative_path(root, path), 1, DFD, "test", (target, other), c, mask, real))
    if not videos:
        raise UsageError(f"{root}: no original_sequences/actors/{c} there; is it the FF++ root with DFD in it?")
    return audit(
        keep_wanted(VideoTable(root, videos, "dfd"), source), {("test", REAL): 363, ("test", DFD): 3068}, source.allow
    )


def _pairs(path: Path) -> list[tuple[str, str]]:
    rows = read_json(path)
    pairs = []
    for row in rows if isinstance(rows, list) else []:
        ids = [safe_path(i, path) for i in row] if isinstance(row, list) else []
        if len(ids) != 2 or any("/" in i for i in ids):
            raise UsageError(f"{path}: not a list of id pairs: {str(row)[:80]}")
        pairs.append((ids[0], ids[1]))
    if not pairs:
        raise UsageError(f"{path}: not a list of id pairs (it is empty or not a list)")
    return pairs


def _masks(root: Path, method: str) -> dict[str, str]:
    files = find_media(root / "manipulated_sequences" / method / "masks").files
    return {file.stem: relative_path(root, file) for file in files if file.suffix.lower() in VIDEOS}
