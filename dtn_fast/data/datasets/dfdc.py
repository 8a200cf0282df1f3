"""DFDC and its preview."""

from __future__ import annotations

from pathlib import Path

from dtn_fast.data.config import Source
from dtn_fast.data.datasets.parsing import carve_split, keep_wanted, read_object, read_table, relative_path, safe_path
from dtn_fast.data.video_table import REAL, Problem, Video, VideoTable, audit
from dtn_fast.errors import UsageError


def read_dfdc(root: Path, source: Source) -> VideoTable:
    """Reads DFDC: metadata.json of each training part (a tenth of the originals is val), labels.csv of the test set."""
    videos, problems = [], []
    splits = source.splits or ("test",)
    if set(splits) & {"train", "val"}:
        for path in sorted(root.glob("dfdc_train_part_*/metadata.json")):
            for name, row in read_object(path).items():
                label = {"REAL": 0, "FAKE": 1}.get(str(row.get("label")))
                if label is None:
                    raise UsageError(f"{path}: {name} has the label {row.get('label')!r}; REAL or FAKE was expected")
                original = safe_path(row["original"], path) if row.get("original") else ""
                if bool(original) != bool(label):
                    text = f"{path.parent.name}/{name} is {row['label']} and has {'an' if original else 'no'} original"
                    problems.append(Problem("labels", text))
                key = original or safe_path(name, path)
                file, target = f"{path.parent.name}/{safe_path(name, path)}", f"{path.parent.name}/{original}"
                videos.append(Video(file, label, "DFDC" if label else REAL, carve_split(key, 10), (key,),
                                    target=target if original else ""))  # fmt: skip
    if "test" in splits:
        tables = sorted(root.glob("labels.csv")) or sorted(root.glob("[!.]*/labels.csv"))
        if not tables:
            raise UsageError(f"{root}: no labels.csv in it or one folder below; it lists DFDC's test videos")
        folder = tables[0].parent
        rows = read_table(tables[0])
        if not rows:
            raise UsageError(f"{tables[0]}: lists no video")
        for row in rows:
            name, text = row.get("filename", ""), row.get("label", "")
            if text not in ("0", "1"):
                raise UsageError(f"{tables[0]}: {name or 'a row'} has the label {text!r}; 1 (fake) or 0 was expected")
            inside = next((d for d in ("videos", "test_videos") if (folder / d).is_dir()), "")
            file = relative_path(root, folder / inside / safe_path(name, tables[0]))
            videos.append(Video(file, int(text), "DFDC" if text == "1" else REAL, "test"))
    if not videos:
        raise UsageError(f"{root}: no dfdc_train_part_*/metadata.json there; is it the DFDC root?")
    published = {("test", REAL): 2500, ("test", "DFDC"): 2500} if "test" in splits else {}
    if {"train", "val"} <= set(splits):
        total = sum(video.split != "test" for video in videos)
        if total != 119_154:
            problems.append(Problem("counts", f"{total} training videos, published are 119154"))
    table = keep_wanted(VideoTable(root, videos, "dfdc"), source, ("test",))
    return audit(table, published, source.allow, problems)


def read_dfdc_preview(root: Path, source: Source) -> VideoTable:
    """Reads DFDC's preview: dataset.json with the official train and test sets; a tenth of the train people is val."""
    videos, straddling = [], 0
    path = root / "dataset.json"
    for name, row in read_object(path).items():
        label = {"real": 0, "fake": 1}.get(str(row.get("label")))
        if label is None or row.get("set") not in ("train", "test"):
            raise UsageError(f"{path}: {name} needs a label (real, fake) and a set (train, test)")
        people = tuple(dict.fromkeys(str(row[k]) for k in ("target_id", "swapped_id") if row.get(k)))
        split = row["set"]
        if split == "train":
            sides = {carve_split(person, 10) for person in people or (name,)}
            if len(sides) > 1:
                straddling += 1
                continue
            split = sides.pop()
        file = safe_path(name, path)
        videos.append(Video(file, label, file.split("/")[0] if label else REAL, split, people))
    notes = [f"{straddling} videos left out: their people are in both train and val"] if straddling else []
    return audit(keep_wanted(VideoTable(root, videos, "dfdc-preview", notes=notes), source), {}, source.allow)
