"""AI-Face (Lin et al., 2025): faces by deepfake videos, GANs and diffusion models, with gender, age and skin tone.

| fact | read where |
|---|---|
| train.csv and test.csv: Image Path, Gender, Age, Skin Tone (Monk's scale), Intersection, Target (1 fake); the first \
version: Ground Truth Gender, Age and Race, with uncertainty scores; the meaning of the numbers | the authors' README |
| a folder for each generator | the same, as an example with three names |
| the pictures are used whole, so they are face crops | the authors' training code |

Not checked against the dataset itself, which is given on request only: the paths in its lists and the names of most
folders.  Intersection is not read, because README and code number it differently.  People are not published.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import carve_split, check_columns, keep_wanted, read_table
from dtn_fast.data.datasets.root_map import RootMap
from dtn_fast.data.forgery_families import OTHER, families_of, plain_name
from dtn_fast.data.video_table import REAL, SPLITS, Problem, Video, VideoTable, audit, shortened
from dtn_fast.errors import UsageError

ATTRIBUTES = {
    "gender": ("gender", {"0": "female", "1": "male"}),
    "age": ("age", {"0": "child", "1": "youth", "3": "adult", "4": "middle-aged", "5": "senior"}),
    "skin tone": ("skin tone", {str(tone): f"Monk {tone}" for tone in range(1, 11)}),
    "ground truth gender": ("gender", {"0": "female", "1": "male"}),
    "ground truth age": ("age", {"0": "young", "1": "middle-aged", "2": "senior", "3": "other"}),
    "ground truth race": ("race", {"0": "Asian", "1": "White", "2": "Black", "3": "other"}),
}
"""Column -> name of the attribute, and of its numbers; the last three are of the first version."""
REAL_SOURCES = ("ffhq", "imdbwiki", "celeba", "casiawebface")
"""Datasets of real pictures alone, in lower case without signs."""
ONE_VIDEO = 300
"""Number of pictures up to which a folder counts as the frames of one video, which stay in one split."""


def read_aiface(root: Path, source: Source) -> VideoTable:
    """Reads AI-Face: the official test set; the official training set is train and, a tenth of it, val.

    A fake's forgery is the first folder of its path whose name is known, or else the first.  A column with a number
    that the README does not name keeps its numbers.
    """
    folder = next((place for place in (root, root / "dataset") if (place / "test.csv").is_file()), None)
    if folder is None:
        raise UsageError(f"{root}: no test.csv in it or in dataset/; is it the AI-Face root?")
    roots = RootMap(root, source.root_map, lambda name: os.path.isfile(root / name))
    videos, wrong, notes = list[Video](), list[Problem](), list[str]()
    for split in sorted({"test" if split == "test" else "train" for split in source.splits or SPLITS}):
        path = folder / f"{split}.csv"
        rows = read_table(path)
        check_columns(rows, ("image path", "target"), path)
        names = _names(rows, path, notes)
        listed = [roots.path(row["image path"], path) for row in rows]
        roots.check(listed, path)
        sizes = Counter(name.rpartition("/")[0] for name in listed)
        for number, (row, name) in enumerate(zip(rows, listed, strict=True), 2):
            if row["target"] not in ("0", "1"):
                raise UsageError(f"{path}: row {number} has the target {row['target']!r}; 0 (real) or 1 was expected")
            fake, generator = int(row["target"]), _generator(name)
            parent = name.rpartition("/")[0]
            place = carve_split(parent if sizes[parent] <= ONE_VIDEO else name, 10) if split == "train" else split
            attributes = tuple((ATTRIBUTES[column][0], known.get(_code(row[column]), _code(row[column])))
                               for column, known in names.items() if row[column])  # fmt: skip
            videos.append(Video(name, fake, generator if fake else REAL, place, frames=(name,), attributes=attributes))
            made = {"whole-face", "editing"} & set(families_of(generator))
            if (made and not fake) or (fake and plain_name(generator) in REAL_SOURCES):
                text = f"{path.name} lists {name} as {'fake' if fake else 'real'}, which its folder contradicts"
                wrong.append(Problem("labels", text))
    notes.append("people are not published: the splits are not audited for them")
    table = VideoTable(root, videos, "aiface", crops=True, notes=notes)
    return audit(keep_wanted(table, source), {}, source.allow, shortened(wrong))


def _names(rows: list[dict[str, str]], path: Path, notes: list[str]) -> dict[str, dict[str, str]]:
    """Column -> names of its numbers; none, with a note, when it has numbers that the README does not name."""
    found = {}
    for column, (attribute, known) in ATTRIBUTES.items():
        if column in rows[0]:
            strange = sorted({_code(row[column]) for row in rows} - {*known, ""})
            if strange:
                notes.append(f"{path.name}: {attribute} has the number {strange[0]}, whose meaning is not published; "
                             "its groups are the numbers")  # fmt: skip
            found[column] = {} if strange else known
    return found


def _code(cell: str) -> str:
    return cell.removesuffix(".0")


def _generator(path: str) -> str:
    """The folder of a path that names its generator or source."""
    folders = [part for part in path.split("/")[:-1] if part]
    known = (name for name in folders if families_of(name) != (OTHER,) or plain_name(name) in REAL_SOURCES)
    return next(known, folders[-1 if path.startswith("/") else 0] if folders else "unnamed")
