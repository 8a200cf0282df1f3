"""FakeAVCeleb (Khalid et al., 2021), version 1.2.

| fact | read where |
|---|---|
| meta_data.csv: source, target1, target2, method, category, type, race, gender, path (a file's name), and the file's \
folder in a last column without a name | several public readers of the set, which agree |
| folders <type>/<race>/<gender>/<id>/, <type> being {Real,Fake}Video-{Real,Fake}Audio | the same |
| files listed twice with different methods | the same; not in the documentation |
| 500 real videos, one of each person; methods | the authors' documentation page |

Not checked against the dataset itself, which is given on request only; the number of fakes is therefore not audited.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import check_columns, draw_split, keep_wanted, read_table, safe_path
from dtn_fast.data.video_table import REAL, Problem, Video, VideoTable, audit, shortened
from dtn_fast.errors import UsageError

FAKE_VIDEO = {"RealVideo-RealAudio": 0, "RealVideo-FakeAudio": 0, "FakeVideo-RealAudio": 1, "FakeVideo-FakeAudio": 1}
"""Types, and whether the picture is forged."""
AUDIO_ALONE = "RealVideo-FakeAudio"
REALS = 500
"""Published number of real videos."""
FOLDER = ("", "unnamed: 9")
"""Names of the column with the file's folder: as published, and as pandas writes it."""


def read_fakeavceleb(root: Path, source: Source) -> VideoTable:
    """Reads FakeAVCeleb.  It has no official split: --split divides it by people, and a fake whose people are in two
    splits is left out.

    Videos of which the sound alone is forged are left out as well: to the eye they are the real videos once more.  A
    file that is listed with two methods has the first.  Race and gender become attributes.
    """
    path = root / "meta_data.csv"
    rows = read_table(path)
    check_columns(rows, ("source", "target1", "target2", "method", "type", "race", "gender", "path"), path)
    place = next((name for name in FOLDER if name in rows[0]), None)
    if place is None:
        raise UsageError(f"{path}: has no last column without a name, which holds the folder of each file")
    videos: dict[str, Video] = {}
    left_out = Counter[str]()
    wrong, problems, reals = list[Problem](), list[Problem](), dict[str, str]()
    seen = set[str]()
    for number, row in enumerate(rows, 2):
        kind, folder = row["type"], row[place].replace("\\", "/").strip("/")
        if kind not in FAKE_VIDEO:
            raise UsageError(f"{path}: row {number} has the type {kind!r}; known are {', '.join(FAKE_VIDEO)}")
        name = safe_path(f"{folder.removeprefix('FakeAVCeleb/')}/{row['path']}", path)
        if name in seen:
            left_out["rows of files that are listed before, some with another method"] += 1
            continue
        seen.add(name)
        if name.split("/")[0] != kind or (row["method"] == REAL) != (kind == "RealVideo-RealAudio"):
            wrong.append(Problem("labels", f"{name} is listed as {kind}, method {row['method']}"))
        if kind == AUDIO_ALONE:
            left_out[f"videos of {AUDIO_ALONE}, whose picture is that of the real videos"] += 1
            continue
        people = tuple(row[key] for key in ("source", "target1", "target2") if row[key].strip("-"))
        sides = {draw_split(person.encode(), source) for person in people or (name,)}
        if not FAKE_VIDEO[kind] and people:
            reals.setdefault(people[0], name)
        if len(sides) > 1:
            left_out["videos whose people are in different splits"] += 1
            continue
        attributes = tuple((key, row[key]) for key in ("race", "gender") if row[key])
        method = row["method"] if FAKE_VIDEO[kind] else REAL
        videos[name] = Video(name, FAKE_VIDEO[kind], method, sides.pop(), people, attributes=attributes)
    if (listed := sum(not video.label for video in videos.values())) != REALS:
        problems.append(Problem("counts", f"{path.name} lists {listed} real videos, published are {REALS}"))
    made = [video._replace(target=reals.get(video.identities[0], "")) if video.label and video.identities else video
            for video in videos.values()]  # fmt: skip
    notes = [f"no official split: {source.split} percent of the people are train, val and test (prepare --split)"]
    notes += [f"left out: {count} {what}" for what, count in left_out.items()]
    table = keep_wanted(VideoTable(root, made, "fakeavceleb", notes=notes), source)
    return audit(table, {}, source.allow, shortened(wrong) + problems)
