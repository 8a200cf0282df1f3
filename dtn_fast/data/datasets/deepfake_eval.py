"""Deepfake-Eval-2024 (Chandra et al., 2025): videos and pictures that circulated in 2024.

| fact | read where |
|---|---|
| video-metadata-publish.csv: Filename, Date, Video Ground Truth, Audio Ground Truth, Public Comments, Finetuning Set; \
Real, Fake or Unknown; train or test | a public copy of the list |
| image-metadata-publish.csv: Filename, Ground Truth, Finetuning Set; file names that a spreadsheet turned into #NAME? \
| public readers of the set |
| folders video-data, image-data, audio-data | the same |

Not checked against the dataset itself, which is gated.  Neither the people in a file nor its generator are published.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import carve_split, check_columns, keep_wanted, read_table, safe_path
from dtn_fast.data.video_table import REAL, Video, VideoTable, audit
from dtn_fast.errors import UsageError

METHOD = "in the wild"
LISTS = {"video-data": ("video-metadata-publish.csv", "video ground truth"),
         "image-data": ("image-metadata-publish.csv", "ground truth")}  # fmt: skip
"""Folder -> its list, and the column of the picture's label."""
TRUTHS = {"real": 0, "fake": 1, "unknown": None, "": None}
"""Labels in lower case, and whether the picture is forged; None: not known."""


def read_deepfake_eval(root: Path, source: Source) -> VideoTable:
    """Reads Deepfake-Eval-2024: the official test set; the official training set is train and, a tenth of it, val.

    The label is that of the picture: a video whose sound alone is forged is a real.  Files whose label is not known are
    left out, and the sound files are not read.
    """
    videos = []
    notes = Counter[str]()
    there = {folder: root / name for folder, (name, _) in LISTS.items() if (root / name).is_file()}
    if not there:
        raise UsageError(f"{root}: no {' or '.join(name for name, _ in LISTS.values())} there; is it the root of "
                         "Deepfake-Eval-2024?")  # fmt: skip
    for folder, path in there.items():
        truth, rows = LISTS[folder][1], read_table(path)
        check_columns(rows, ("filename", truth, "finetuning set"), path)
        for number, row in enumerate(rows, 2):
            label, split = row[truth].casefold(), row["finetuning set"].casefold()
            if label not in TRUTHS or split not in ("train", "test"):
                raise UsageError(f"{path}: row {number} has the label {row[truth]!r} and the set "
                                 f"{row['finetuning set']!r}; Real, Fake or Unknown, and train or test were "
                                 "expected")  # fmt: skip
            fake = TRUTHS[label]
            if row["filename"] in ("", "#NAME?"):
                notes[f"left out: {{}} rows of {path.name} without a file's name"] += 1
            elif fake is None:
                notes[f"left out: {{}} files of {path.name} whose label is unknown"] += 1
            else:
                name = safe_path(f"{folder}/{row['filename']}", path)
                if not fake and row.get("audio ground truth", "").casefold() == "fake":
                    notes["{} videos whose sound alone is forged are reals"] += 1
                split = carve_split(name, 10) if split == "train" else split
                videos.append(Video(name, fake, METHOD if fake else REAL, split,
                                    frames=(name,) if folder == "image-data" else ()))  # fmt: skip
    said = [text.format(count) for text, count in notes.items()]
    said += [
        f"{name} is missing: its {folder} is not read" for folder, (name, _) in LISTS.items() if folder not in there
    ]
    said.append("people are not published: the splits are not audited for them")
    return audit(keep_wanted(VideoTable(root, videos, "deepfake-eval-2024", notes=said), source), {}, source.allow)
