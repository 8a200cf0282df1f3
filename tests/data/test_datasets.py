"""Every dataset's layout to its table, what the audit refuses, hostile lists, and frames from rows."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dtn_fast.data.config import Source
from dtn_fast.data.corrupt import PERTURBATIONS, corrupt_video
from dtn_fast.data.datasets import read
from dtn_fast.data.datasets.deeperforensics import VARIANTS, perturbations
from dtn_fast.data.datasets.ffpp import DFD, FFPP_METHODS
from dtn_fast.data.datasets.parsing import safe_path
from dtn_fast.data.frames import landmarks, video_frames
from dtn_fast.data.video import Reading, read_frames
from dtn_fast.data.video_table import SPLITS, Video, VideoTable, audit
from dtn_fast.data.video_writer import write_video
from dtn_fast.errors import MediaError, UsageError

DISTORTED = tuple(variant for variant in VARIANTS if variant not in ("end_to_end", "reenact_postprocess"))
META = "lists/manipulated_videos_distortions_meta/manipulated_videos_{}_meta.txt"
YOUTUBE = "original_sequences/youtube/c23/videos"
JUNK = b"\0\5\26\7\0\2\0\0Mac OS X        "
at_random = settings(max_examples=40, deadline=None)


def picture(shade: int = 0) -> np.ndarray:
    yy, xx = np.mgrid[0:64, 0:64]
    return np.stack([60 + 2 * xx, 220 - 2 * yy, 40 + shade + 20 * ((xx // 8 + yy // 8) % 2)], 2).astype(np.uint8)


def still(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(shade)).save(file, "PNG")
    return file.getvalue()


@functools.cache
def movie() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, "a.mp4"), [picture(20 * i) for i in range(5)], crf=10)
        return Path(folder, "a.mp4").read_bytes()


def put(root: Path, *names: str, data: Any = None) -> None:
    """Files below the root: bytes, text or JSON; by default a real video or picture."""
    for name in filter(None, names):
        content = (still() if name.endswith((".png", ".jpg")) else movie()) if data is None else data
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(root: Path, source: Source, text: str = ".") -> str:
    with pytest.raises(UsageError, match=text) as error:
        read(root, source)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


Miniature = tuple[Source, list[Video], str]
"""How to read it, the rows to expect, and the published count that it has not."""


def ffpp(root: Path) -> Miniature:
    rows = []
    for split, (a, b) in {"train": ("000", "001"), "val": ("002", "003"), "test": ("004", "005")}.items():
        put(root, f"splits/{split}.json", data=[[a, b]])
        for one, other in ((a, b), (b, a)):
            rows.append(real := Video(f"{YOUTUBE}/{one}.mp4", 0, "real", split, (one,), "c23"))
            for method, masks in (("Deepfakes", "masks/videos"), ("Face2Face", "masks/a/b"), ("FaceShifter", "")):
                fake, mask = (f"manipulated_sequences/{method}/{f}/{one}_{other}.mp4" for f in ("c23/videos", masks))
                mask = mask if masks else ""
                rows.append(Video(fake, 1, method, split, (one, other), "c23", mask, real.path))
    put(root, f"manipulated_sequences/{DFD}/c23/videos/01_02__walk__ABCDEFGH.mp4")
    put(root, *(name for row in rows for name in (row.path, row.mask)))
    return Source("ffpp"), rows, "train/real has 2 videos, published are 720"


def dfd(root: Path) -> Miniature:
    real = "original_sequences/actors/c40/videos/01__walk_outside.mp4"
    fake, mask = (f"manipulated_sequences/{DFD}/{f}/videos/01_02__walk_outside__A1B2C3D4.mp4" for f in ("c40", "masks"))
    lone = f"manipulated_sequences/{DFD}/c40/videos/03_02__hug__A1B2C3D5.mp4"
    put(root, real, fake, mask, lone)
    rows = [
        Video(real, 0, "real", "test", ("01",), "c40"),
        Video(fake, 1, DFD, "test", ("01", "02"), "c40", mask, real),
        Video(lone, 1, DFD, "test", ("03", "02"), "c40", "", "original_sequences/actors/c40/videos/03__hug.mp4"),
    ]
    return Source("dfd", compression="c40"), rows, "test/DeepFakeDetection has 2 videos, published are 3068"


def celebdf(root: Path, dataset: Any = "celebdf-v2", inside: str = "") -> Miniature:
    rows = []  # id1, id2 and 00005 fall to val
    for kind, names in {
        "Celeb-real": {"id0_0000": "test", "id0_0001": "train", "id1_0000": "val"},
        "YouTube-real": {"00001": "test", "00000": "train", "00005": "val"},
        "Celeb-synthesis": {"id4_id0_0002": "test", "id0_id3_0001": "train", "id1_id2_0000": "val"},
    }.items():
        for name, split in names.items():
            people, number = tuple(name.split("_")[:-1]) or (name,), name[-4:]
            fake = len(people) == 2
            rows.append(Video(f"{kind}/{inside}{name}.mp4", int(fake), kind if fake else "real", split, people,
                              target=f"Celeb-real/{inside}{people[0]}_{number}.mp4" if fake else ""))  # fmt: skip
    put(root, *(row.path for row in rows), f"Celeb-synthesis/{inside}id0_id1_0000.mp4", "other/id7_0000.mp4")
    listed = "1 Celeb-real/id0_0000.mp4\n1 YouTube-real/00001.mp4\n0 Celeb-synthesis/id4_id0_0002.mp4\n"
    put(root, "List_of_testing_videos.txt", data=listed)
    return Source(dataset, SPLITS), rows, {
        "celebdf-v1": "10 videos in all, published are 408 reals and 795 fakes",
        "celebdf-v2": "test/real has 2 videos, published are 178",
    }[dataset]  # fmt: skip


def dfdc(root: Path) -> Miniature:
    rows = [Video("test/videos/x.mp4", 0, "real", "test"), Video("test/videos/y.mp4", 1, "DFDC", "test")]
    for part, real, split in (("dfdc_train_part_0", "aa.mp4", "train"), ("dfdc_train_part_1", "ab.mp4", "val")):
        put(root, f"{part}/metadata.json", data={
            real: {"label": "REAL", "split": "train", "original": None},
            f"fake_{real}": {"label": "FAKE", "split": "train", "original": real},
        })  # fmt: skip
        rows.append(Video(f"{part}/{real}", 0, "real", split, (real,)))
        rows.append(Video(f"{part}/fake_{real}", 1, "DFDC", split, (real,), target=f"{part}/{real}"))
    put(root, "test/labels.csv", data="filename,label\nx.mp4,0\ny.mp4,1\n")
    put(root, *(row.path for row in rows))
    return Source("dfdc", SPLITS), rows, "4 training videos, published are 119154"


def preview(root: Path) -> Miniature:
    rows = [  # 1004 and 1010 fall to val
        Video("original_videos/1000/1000_A.mp4", 0, "real", "train", ("1000",)),
        Video("original_videos/2000/2000_A.mp4", 0, "real", "test", ("2000",)),
        Video("method_A/1000_1001/0/a.mp4", 1, "method_A", "train", ("1000", "1001")),
        Video("method_B/b.mp4", 1, "method_B", "val", ("1004", "1010")),
        Video("method_B/2000_2001/c.mp4", 1, "method_B", "test", ("2000", "2001")),
    ]
    listed = {
        row.path: {"label": ("real", "fake")[row.label], "set": row.split.replace("val", "train"),
                   "target_id": row.identities[0], "swapped_id": row.identities[1] if row.label else None}
        for row in [*rows, Video("method_A/astride.mp4", 1, "method_A", "train", ("1000", "1004"))]
    }  # fmt: skip
    put(root, "dataset.json", data=listed)
    put(root, *listed)
    return Source("dfdc-preview"), rows, ""


def deeper(root: Path, *variants: str) -> Miniature:
    variants, rows = variants or ("end_to_end",), []
    for split, targets in {"train": ("000", "001"), "val": ("002",), "test": ("003",)}.items():
        put(root, f"lists/splits/{split}.txt", data="".join(f"{target}_M101.mp4\n" for target in targets))
        for target in targets:
            real = (root / "ff" / YOUTUBE / f"{target}.mp4").absolute().as_posix()
            rows.append(Video(real, 0, "real", split, (target,), "c23"))
            for variant in variants:
                fake = f"manipulated_videos/{variant}/{target}_M101.mp4"
                rows.append(Video(fake, 1, variant, split, (target, "M101"), "c23", target=real))
    put(root, *(row.path for row in rows))
    source = Source("deeperforensics", ffpp=root / "ff", variants=variants)
    return source, rows, f"train/{variants[0]} has 2 videos, published are 703"


def bench(root: Path, separator: str = "/", store: str = "") -> Miniature:
    """Frames in files, or, with ``store``, in an LMDB of that name."""
    layout: Any = {"FaceForensics++": {}, "Celeb-DF-v2": {}}
    rows, ff, celeb = [], "FaceForensics++/manipulated_sequences", "Celeb-DF-v2"
    for place, kind, method, split, name, people, compression in (
        (f"{ff}/Deepfakes", "FF-DF", "Deepfakes", "train", "000_001", ("000", "001"), "c23"),
        (f"{ff}/FaceShifter", "FF-FH", "FaceShifter", "test", "004_005", ("004", "005"), "c23"),
        ("FaceForensics++/original_sequences/youtube", "FF-real", "real", "val", "002", (), "c23"),
        (f"{celeb}/Celeb-real", "CelebDFv2_real", "real", "test", "id0_0000", (), ""),
        (f"{celeb}/Celeb-synthesis", "CelebDFv2_fake", "CelebDFv2_fake", "test", "id0_id1_0000", ("id0", "id1"), ""),
    ):
        frames, masks = ([f"{place}/{f}/{name}/{n:03d}.png" for n in (0, 7, 15)] for f in ("frames", "masks"))
        masks = masks if kind == "FF-DF" else []
        row = {"label": kind, "frames": frames, "masks": masks}
        splits = layout[place.partition("/")[0]].setdefault(kind, {"train": {}, "val": {}, "test": {}})
        splits[split] = {compression: {name: row}} if compression else {name: row}
        rows.append(Video(f"{place}/frames/{name}", int(method != "real"), method, split, people, compression,
                          f"{place}/masks/{name}" if masks else "", frames=tuple(frames)))  # fmt: skip
    put(root, "bench.json", data=json.dumps(layout).replace("/", separator.replace("\\", "\\\\")))
    source = Source("deepfakebench", lists=root / "bench.json", lmdb=root / store if store else None)
    names = [frame for row in rows for frame in row.frames]
    if store:
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(root / store), map_size=2**24) as environment, environment.begin(write=True) as transaction:
            for name in names:
                transaction.put(name.replace("/", separator).encode(), still())
    else:
        put(root, *names)
    return source, rows, ""


def aiface(root: Path, version: int = 2) -> Miniature:
    """AI-Face's lists: deepfake videos' frames, GANs, diffusion models and real sources, in the README's columns."""
    header = "Image Path,Gender,Age,Skin Tone,Intersection,Target"
    cells, people = "{gender},3,{tone},0", [("gender", "{sex}"), ("age", "adult"), ("skin tone", "Monk {tone}")]
    if version == 1:
        header = "Image Path,Uncertainty Score Gender,Ground Truth Gender,Ground Truth Age,Ground Truth Race,Target"
        cells, people = "0.1,{gender},2,1", [("gender", "{sex}"), ("age", "senior"), ("race", "White")]
    rows, lists = [], {"train": [header], "test": [header]}
    for number, (name, split, method) in enumerate([
        ("AttGAN/a.png", "train", "AttGAN"), ("FF++/Face2Face/002_007/0.png", "val", "Face2Face"),
        ("FFHQ/b.png", "train", "real"), ("FF++/Deepfakes/000_003/0.png", "train", "Deepfakes"),
        ("FF++/Deepfakes/000_003/n.png", "train", "Deepfakes"),
        ("Latent_Diffusion/c.png", "test", "Latent_Diffusion"), ("imdb_wiki/d.png", "test", "real"),
        ("Unheard/e.png", "test", "Unheard"),
    ]):  # fmt: skip
        facts = {"gender": number % 2, "sex": ("female", "male")[number % 2], "tone": number + 1}
        row = f"{name},{cells.format(**facts)},{int(method != 'real')}"
        lists["test" if split == "test" else "train"].append(row)
        known = tuple((key, value.format(**facts)) for key, value in people)
        rows.append(Video(name, int(method != "real"), method, split, frames=(name,), attributes=known))
    put(root, *(row.path for row in rows))
    for split, lines in lists.items():
        put(root, f"dataset/{split}.csv", data="\n".join(lines) + "\n")
    return Source("aiface"), rows, ""


def deepfake_eval(root: Path) -> Miniature:
    head = "Filename,Date,Video Ground Truth,Audio Ground Truth,Public Comments,Finetuning Set"
    put(root, "video-metadata-publish.csv", data="\n".join([
        head, "a.mp4,2024-11-14,Fake,Unknown,,test", 'b.mp4,2024-11-14,Real,Fake,"voice, cloned",test',
        "-c.mp4,2024-11-13,Real,Real,,train", "d.mp4,2024-11-13,Unknown,Fake,,test", "",
    ]))  # fmt: skip
    put(root, "image-metadata-publish.csv", data="\n".join([
        "Filename,Ground Truth,Finetuning Set", "r.jpg,Fake,Train", "f.png,Real,Test", "#NAME?,Real,Test", "",
    ]))  # fmt: skip
    rows = [
        Video("video-data/a.mp4", 1, "in the wild", "test"),
        Video("video-data/b.mp4", 0, "real", "test"),
        Video("video-data/-c.mp4", 0, "real", "train"),
        Video("image-data/r.jpg", 1, "in the wild", "val", frames=("image-data/r.jpg",)),
        Video("image-data/f.png", 0, "real", "test", frames=("image-data/f.png",)),
    ]
    put(root, *(row.path for row in rows))
    return Source("deepfake-eval-2024"), rows, ""


AV_HEADER = "source,target1,target2,method,category,type,race,gender,path,"


def fakeavceleb(root: Path) -> Miniature:
    rows, lines = [], [AV_HEADER]
    for split, one, race, gender in (  # the splits that these ids are drawn to
        ("train", "id00001", "African", "men"), ("val", "id00016", "Asian (East)", "women"),
        ("test", "id00010", "Caucasian (American)", "women"),
    ):  # fmt: skip
        at = f"{race}/{gender}/{one}"
        real = f"RealVideo-RealAudio/{at}/00109.mp4"
        facts = {"attributes": (("race", race), ("gender", gender))}
        rows += [
            Video(real, 0, "real", split, (one,), **facts),
            Video(f"FakeVideo-FakeAudio/{at}/00109_1.mp4", 1, "wav2lip", split, (one,), target=real, **facts),
            Video(f"FakeVideo-RealAudio/{at}/00109_2.mp4", 1, "fsgan", split, (one, one), target=real, **facts),
        ]
        for kind, file, method, target in (
            ("RealVideo-RealAudio", "00109", "real", "-"), ("RealVideo-FakeAudio", "00109_fake", "rtvc", "-"),
            ("FakeVideo-FakeAudio", "00109_1", "wav2lip", "-"), ("FakeVideo-RealAudio", "00109_2", "fsgan", one),
            ("FakeVideo-FakeAudio", "00109_1", "faceswap-wav2lip", "-"), ("FakeVideo-RealAudio", "00109_3", "fsgan",
             "id00001" if split == "test" else "id00010"),
        ):  # fmt: skip
            lines.append(f"{one},{target},-,{method},A,{kind},{race},{gender},{file}.mp4,FakeAVCeleb/{kind}/{at}")
    put(root, "meta_data.csv", data="\n".join(lines) + "\n")
    put(root, *(row.path for row in rows))
    return Source("fakeavceleb"), rows, "meta_data.csv lists 3 real videos, published are 500"


def folder(root: Path) -> Miniature:
    rows = [
        Video("train/real/a.mp4", 0, "real", "train"),
        Video("train/Swap/below/b.MOV", 1, "Swap", "train"),
        Video("val/real/c.jpg", 0, "real", "val", frames=("val/real/c.jpg",)),
        Video("test/Swap/clip", 1, "Swap", "test", frames=("test/Swap/clip/0.png", "test/Swap/clip/1.png")),
    ]
    put(root, *(name for row in rows for name in row.frames or (row.path,)), "elsewhere/real/x.mp4")
    put(
        root, "val/real/c.txt", "val/real/Thumbs.db", "val/real/.ipynb_checkpoints/c.jpg", "val/._real/c.jpg", data=JUNK
    )
    return Source("folder"), rows, ""


def reals(root: Path) -> Miniature:
    names = ("people/0.png", "people/1.png")
    put(root, "d.mp4", "l.png", *names)
    rows = [Video("d.mp4", 0, "real", "test"), Video("l.png", 0, "real", "val", frames=("l.png",))]
    return Source("reals"), [*rows, Video("people", 0, "real", "train", frames=names)], ""


MINIATURES: dict[str, Callable[[Path], Miniature]] = {
    "ffpp": ffpp,
    "dfd": dfd,
    "celebdf-v1": functools.partial(celebdf, dataset="celebdf-v1"),
    "celebdf-v2": celebdf,
    "celebdf-v2 under videos": functools.partial(celebdf, inside="videos/"),
    "dfdc": dfdc,
    "dfdc-preview": preview,
    "deeperforensics": deeper,
    "deepfakebench": bench,
    "deepfakebench \\": functools.partial(bench, separator="\\"),
    "deepfakebench lmdb": functools.partial(bench, store="FF_lmdb"),
    "deepfakebench \\ lmdb": functools.partial(bench, separator="\\", store="FF_lmdb"),
    "aiface": aiface,
    "aiface, first version": functools.partial(aiface, version=1),
    "deepfake-eval-2024": deepfake_eval,
    "fakeavceleb": fakeavceleb,
    "folder": folder,
    "reals": reals,
}


@pytest.mark.parametrize("name", MINIATURES)
def test_rows_and_their_frames(tmp_path: Path, name: str) -> None:
    source, rows, published = MINIATURES[name](tmp_path)
    if published:
        assert "(--allow counts accepts that)" in refused(tmp_path, source, published)
    table = read(tmp_path, replace(source, allow=("counts",) if published else ()))
    assert sorted(table.videos) == sorted(rows)
    assert (table.crops, table.lmdb) == (source.dataset in ("deepfakebench", "aiface"), source.lmdb)
    assert any(note.startswith("accepted: ") and published in note for note in table.notes) == bool(published)
    for row in table.videos:
        frames = list(video_frames(tmp_path, row, 2, table.lmdb))
        assert [frame.number > 0 for frame in frames] == [False, True][: len(row.frames) or 2]
        assert np.abs(frames[0].image.astype(int) - picture()).mean() < 8
    if source.dataset in ("celebdf-v1", "celebdf-v2", "dfdc-preview"):
        assert "1 videos left out: their people are in both train and val" in table.notes
    if source.dataset in ("celebdf-v1", "celebdf-v2", "dfdc"):
        unasked = read(tmp_path, replace(source, splits=(), allow=("counts",)))
        assert sorted(unasked.videos) == sorted(row for row in rows if row.split == "test")


TREES = [name for name in MINIATURES if not re.search("bench|folder|reals|aiface", name)]


def test_folders_of_splits_by_any_name(tmp_path: Path) -> None:
    for split, name in (("Training", "train"), ("VALID", "val"), ("testing", "test")):
        for kind in ("Reals", "Swap"):
            put(tmp_path, f"{split}/{kind}/{name}.png")
    put(tmp_path, "b.png", "Training/c.mp4", "other/real/x.png", "Training/Swap/._x.png")
    put(tmp_path, "Training/Swap/a.psd", "notes.txt", data=JUNK)
    table = read(tmp_path, Source("folder"))
    assert {(v.split, v.method, Path(v.path).stem) for v in table.videos} == {
        (split, method, split) for split in SPLITS for method in ("real", "Swap")
    }
    assert table.notes == [
        "left out: 1 files in forms that are not read, the first is a.psd",
        "left out: folders that are no split: other",
        "left out: 2 files outside class folders, the first is c.mp4",
        "6 pictures: test/Swap 1, test/real 1, train/Swap 1, train/real 1, val/Swap 1, val/real 1",
        "counts not checked: none are published for this selection",
    ]  # fmt: skip
    for name in ("dev", "Validation"):
        put(tmp_path, f"{name}/real/x.png")
        refused(tmp_path, Source("folder"), f"(VALID and {name}|{name} and VALID) both hold val")
        (tmp_path / name).rename(tmp_path / f"_{name}")
    refused(tmp_path, Source("folder", split="60/20/20"), "--split 60/20/20: .* has the split folders Training, VALID")


def test_folders_without_splits_are_divided(tmp_path: Path) -> None:
    people = [f"person {n}" for n in range(60)]
    for kind in ("Real", "Swap", "Other"):
        put(tmp_path, *(f"{kind}/{name}/{n}.png" for name in people for n in range(2)))
        put(tmp_path, *(f"{kind}/{name}/clip/0.png" for name in people[:9]))
    for n in range(60):
        for kind, name in (("Real", f"{n}.PNG"), ("Swap", f"copy of {n}.png")):
            put(tmp_path, f"{kind}/{name}", data=still(shade=n))
    table = read(tmp_path, Source("folder"))
    assert len(table.videos) == 3 * 69 + 120
    homes: dict[Any, set[str]] = {}
    for video in table.videos:
        _, name, *_ = Path(video.path).parts
        key = name if name in people else (tmp_path / video.path).read_bytes()
        homes.setdefault(key, set()).add(video.split)
    assert len(homes) == 120
    assert all(len(splits) == 1 for splits in homes.values()), "a person, or equal files, in two splits"
    counts = Counter(next(iter(splits)) for splits in homes.values())
    assert 80 < counts["train"] < 110
    assert min(counts["val"], counts["test"]) > 4
    assert (
        "no split folders: 80/10/10 percent of 120 files by content and of 207 videos by their person's folder are "
        "train, val and test (prepare --split changes it)"
    ) in table.notes
    assert [(v.path, v.split) for v in table.videos if v.path in ("Real/person 0", "Real/0.PNG", "Swap/person 7")] == [
        ("Real/0.PNG", "train"), ("Real/person 0", "train"), ("Swap/person 7", "train"),
    ]  # fmt: skip
    half = read(tmp_path, Source("folder", split="50/0/50", methods=("Swap",)))
    assert {v.split for v in half.videos} == {"train", "test"}
    assert "val has no Swap, real" in half.notes
    for split in ("80/20", "80/10/5", "a/b/c", "80/10/-10", "80/10/10/0", ""):
        with pytest.raises(UsageError, match=f"--split {split}: percent of train, val and test were expected"):
            Source("folder", split=split)
    refused(tmp_path, Source("celebdf-v2", split="50/0/50"), "--split: for --dataset folder, reals, fakeavceleb only")
    (tmp_path / "Real").rename(tmp_path / "Genuine")
    refused(tmp_path, Source("folder"), "no real/ beside forgeries")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "store", "anna/0.png", "ben/0.png")
    put(tmp_path / "set", "real/carl/0.png", "Swap/anna/1.png")
    (tmp_path / "set/real/linked").symlink_to(tmp_path / "store")
    (tmp_path / "store/loop").symlink_to(tmp_path / "set/real")
    paths = {v.path for v in read(tmp_path / "set", Source("folder")).videos}
    assert paths == {"real/carl", "real/linked/anna", "real/linked/ben", "Swap/anna"}
    (tmp_path / "set/Swap/ben").symlink_to(tmp_path / "store/ben")
    refused(tmp_path / "set", Source("folder"), "real hold the same folder, by a link")


def test_reals_say_what_was_skipped(tmp_path: Path) -> None:
    source, rows, _ = reals(tmp_path)
    put(tmp_path, "x.heic.jxl", "._d.mp4", "Thumbs.db", data=JUNK)
    table = read(tmp_path, source)
    assert sorted(table.videos) == sorted(rows)
    assert "left out: 1 files in forms that are not read, the first is x.heic.jxl" in table.notes
    put(tmp_path / "empty", "a.psd", data=JUNK)
    refused(tmp_path / "empty", source, "no pictures or videos in it; left out: 1 files in forms .* a.psd")


@pytest.mark.parametrize("name", TREES)
def test_lists_and_names_from_other_systems(tmp_path: Path, name: str) -> None:
    """Windows writes marks and CRLF, cameras other endings, macOS hidden companions: the table is the same."""
    source, rows, published = MINIATURES[name](tmp_path)
    put(tmp_path, ".ipynb_checkpoints/labels.csv", "manipulated_sequences/._X/c23/videos/a", data=JUNK)
    renamed: dict[str, str] = {}
    for place, path in enumerate(sorted(tmp_path.rglob("*.mp4"))):
        path.with_name(f"._{path.name}").write_bytes(JUNK)
        found = path.rename(path.with_suffix((".MP4", ".mov", ".AVI")[place % 3]))
        renamed |= {f(path): f(found) for f in (Path.as_posix, lambda p: p.relative_to(tmp_path).as_posix())}
    for place, path in enumerate(p for ending in ("json", "txt", "csv") for p in tmp_path.rglob(f"*.{ending}")):
        if path.parent.name.startswith("."):
            continue
        text = path.read_text().replace("\n", " \r\n").replace("filename,label", "FileName , Label")
        path.write_bytes(text.encode("utf-16" if place % 2 else "utf-8-sig"))
    table = read(tmp_path, replace(source, allow=("counts",) if published else ()))
    new = lambda path: renamed.get(path, path)
    expected = [row._replace(path=new(row.path), mask=new(row.mask), target=new(row.target)) for row in rows]
    assert sorted(table.videos) == sorted(expected)
    assert not any("are missing" in note for note in table.notes)


def test_another_files_ending_is_not_guessed(tmp_path: Path) -> None:
    source = replace(preview(tmp_path)[0], splits=("test",))
    real = tmp_path / "original_videos/2000/2000_A.mp4"
    put(real.parent, "2000_A.Mp4", "2000_A.mov")
    assert read(tmp_path, source).videos[0].path == "original_videos/2000/2000_A.mp4"
    real.unlink()
    assert read(tmp_path, source).videos[0].path == "original_videos/2000/2000_A.Mp4"
    real.with_suffix(".Mp4").rename(real.with_suffix(".mkv"))
    refused(tmp_path, source, f"1 of 2 videos are missing, the first is {real.relative_to(tmp_path)}")


def test_a_list_of_another_encoding_names_the_remedy(tmp_path: Path) -> None:
    source, path = listed(tmp_path, "celebdf-v2", "1 Celeb-real/é.mp4".encode("latin-1"))
    assert path.name in refused(tmp_path, source, "not UTF-8 text .* save it as UTF-8")


def test_selection_and_unknown_choices(tmp_path: Path) -> None:
    source = replace(ffpp(tmp_path)[0], allow=("counts",))
    assert "missing forgeries: FaceSwap, NeuralTextures" in read(tmp_path, source).notes
    some = read(tmp_path, replace(source, splits=("val",), methods=("FaceShifter",), lists=tmp_path / "splits"))
    assert Counter((v.split, v.method) for v in some.videos) == {("val", "real"): 2, ("val", "FaceShifter"): 2}
    refused(tmp_path, replace(source, methods=("FaceSwap",)), "no videos of FaceSwap; there are Deepfakes, Face2Face")
    refused(tmp_path, replace(source, compression="c40"), "manipulated_sequences")
    refused(tmp_path, replace(source, splits=("dev",)), "--splits dev: known are train, val, test")
    refused(tmp_path, replace(source, dataset="nope"), "--dataset nope: known are ffpp, dfd")
    refused(tmp_path / "nowhere", source, "no such folder")


def test_one_missing_picture_makes_a_video_missing(tmp_path: Path) -> None:
    source, rows, _ = bench(tmp_path)
    (tmp_path / rows[3].frames[1]).unlink()
    refused(tmp_path, source, f"1 of 5 videos are missing, the first is {rows[3].path}")


@pytest.mark.parametrize("variants", [("end_to_end", "reenact_postprocess"), DISTORTED, VARIANTS])
def test_deeperforensics_variants_together(tmp_path: Path, variants: tuple[str, ...]) -> None:
    source, rows, _ = deeper(tmp_path, *variants)
    videos = read(tmp_path, replace(source, allow=("counts",))).videos
    assert Counter(v.method for v in videos if v.label) == dict.fromkeys(variants, 4)
    assert {v.path for v in videos} == {v.path for v in rows}


@pytest.mark.parametrize("variant", VARIANTS)
def test_deeperforensics_target_in_two_splits_is_refused(tmp_path: Path, variant: str) -> None:
    source, _, _ = deeper(tmp_path, variant)
    put(tmp_path, "lists/splits/test.txt", data="000_W202.mp4")
    put(tmp_path, f"manipulated_videos/{variant}/000_W202.mp4")
    refused(tmp_path, replace(source, allow=("counts",)), "000.*train")


@pytest.mark.parametrize("variant", DISTORTED)
def test_deeperforensics_reals_are_perturbed(tmp_path: Path, variant: str) -> None:
    source, rows, _ = deeper(tmp_path, variant)
    videos = read(tmp_path, replace(source, allow=("counts",))).videos
    assert sorted(v[:6] for v in videos) == sorted(v[:6] for v in rows)
    for video in videos:
        plain, frames, again = read_frames(tmp_path / video.path, 3), *(video_frames(tmp_path, video, 3) for _ in "ab")
        change = []
        for a, b, c in zip(plain, frames, again, strict=True):
            assert (a.number, b.number) == (c.number, c.number)
            assert np.array_equal(b.image, c.image)
            change.append(np.abs(a.image.astype(int) - b.image).mean())
        if video.label:
            assert (video.corruptions, video.target, change) == ((), "", [0, 0, 0])
        else:
            assert min(change) > 0.3
    notes = read(tmp_path, replace(source, allow=("counts",))).notes
    assert any(f"{variant}: " in note and "drawn here" in note for note in notes)
    drawn = [kind for n in range(200) for kind, _ in perturbations(variant, f"{n:03d}")]
    assert set(drawn) == set(PERTURBATIONS)
    refused(tmp_path, replace(source, variants=("end_to_end_level_6",)), "--variants end_to_end_level_6: known are")
    refused(tmp_path, replace(source, ffpp=None), "--ffpp")


def test_deeperforensics_is_perturbed_by_default_and_its_lists_are_followed(tmp_path: Path) -> None:
    """ "extensive real-world perturbations are applied"; its authors' lists say which, for the reals too."""
    assert Source.variants == ("end_to_end_random_level",)
    variant = Source.variants[0]
    source, _, _ = deeper(tmp_path, variant)
    source = replace(source, allow=("counts",))
    meta = META.format(variant)
    lines = ["a/000_M101.mp4 GB:5", "001_M101.mp4 VC:5 CC:5 VC:1", "a/002_M101.mp4 CS:1", "003_M101.mp4 JPEG:2 BW:3"]
    put(tmp_path, meta, data="\n".join(lines) + "\n")
    table = read(tmp_path, source)
    reals = {v.identities[0]: v for v in table.videos if not v.label}
    assert {name: v.corruptions for name, v in reals.items()} == {
        "000": (("blur", 5),), "001": (("video", 5), ("contrast", 5), ("video", 1)), "002": (("saturation", 1),),
        "003": (("pixelation", 2), ("blocks", 3)),
    }  # fmt: skip
    assert not any("drawn here" in note for note in table.notes)
    plain = [frame.image.astype(int) for frame in read_frames(tmp_path / reals["001"].path)]
    got = [frame.image for frame in video_frames(tmp_path, reals["001"], 5)]  # compressed, darkened, compressed
    assert np.abs(np.array(got) - 0.35 * np.array(plain)).mean() < 6
    assert np.array_equal([frame.image for frame in video_frames(tmp_path, reals["001"], 5)], got)
    for line in ("003_M101.mp4 GB:6", "003_M101.mp4", "003_M101.mp4 XY:1", "004_M101.mp4 GB:1"):
        put(tmp_path, meta, data="\n".join([*lines[:3], line]))
        refused(tmp_path, source, "003_M101 is not listed" if line[2] == "4" else "is no video with its perturbations")


def test_whole_videos_are_corrupted_at_each_level(tmp_path: Path) -> None:
    source, _, _ = folder(tmp_path / "pictures")
    refused(
        tmp_path / "pictures", replace(source, corrupt=("video",)), "changes whole videos, and this dataset has pic"
    )
    source, _, _ = celebdf(tmp_path)
    source = replace(source, allow=("counts",))
    plain = read(tmp_path, source).videos
    table = read(tmp_path, replace(source, corrupt=("video", "contrast"), corrupt_levels=(1, 5)))
    steps = [("video", 1), ("video", 5), ("contrast", 1), ("contrast", 5)]
    assert table.videos == [v._replace(corruptions=(step,)) for v in plain for step in steps]
    assert table.notes[-1] == "each video 4 times: video 1, video 5, contrast 1, contrast 5"
    for said, options in (
        ("unknown corruption 'fog'", {"corrupt": ("fog",)}),
        ("h264_still: is of single pictures; video is", {"corrupt": ("h264_still",)}),
        ("--corrupt-levels: name at least one", {"corrupt": ("blur",), "corrupt_levels": ()}),
    ):
        refused(tmp_path, replace(source, **options), said)
    with pytest.raises(UsageError, match="--corrupt-levels 6: must be from 1 to 5"):
        replace(source, corrupt_levels=(6,))
    source, _, _ = deeper(tmp_path / "deeper", Source.variants[0])
    perturbed = replace(source, corrupt=("video",), allow=("counts",))
    refused(tmp_path / "deeper", perturbed, "perturbed already; read --variants end_to_end")


def complete(root: Path, dataset: Any) -> tuple[Source, dict[str, int], str]:
    """How to read it, its counts, and one of its fakes."""
    source, thousand, files = Source(dataset), [f"{n:03d}" for n in range(1000)], []
    counts: dict[str, int] = {}
    if dataset == "ffpp":
        pairs = [*zip(thousand[::2], thousand[1::2], strict=True)]
        for split, some in zip(SPLITS, (pairs[:360], pairs[360:430], pairs[430:]), strict=True):
            put(root, f"splits/{split}.json", data=some)
            counts |= {f"{split}/{method}": 2 * len(some) for method in ("real", *FFPP_METHODS)}
        files = [f"{YOUTUBE}/{name}.mp4" for name in thousand]
        files += [f"manipulated_sequences/{method}/c23/videos/{x}_{y}.mp4"
                  for a, b in pairs for x, y in ((a, b), (b, a)) for method in FFPP_METHODS]  # fmt: skip
    elif dataset == "dfd":
        files = [f"original_sequences/actors/c23/videos/{n % 28:02d}__scene_{n // 28}.mp4" for n in range(363)]
        files += [f"manipulated_sequences/{DFD}/c23/videos/{n % 28:02d}_{(n + 1) % 28:02d}__scene__{n:08X}.mp4"
                  for n in range(3068)]  # fmt: skip
        counts = {"test/real": 363, f"test/{DFD}": 3068}
    elif dataset == "celebdf-v2":
        files = [f"Celeb-real/id{n % 59}_{n // 59:04d}.mp4" for n in range(590)]
        files += [f"YouTube-real/{n:05d}.mp4" for n in range(300)]
        files += [f"Celeb-synthesis/id{n % 59}_id{(n + 1) % 59}_{n // 59:04d}.mp4" for n in range(5639)]
        listed = [f"1 {name}" for name in files[500:678]] + [f"0 {name}" for name in files[-340:]]
        put(root, "List_of_testing_videos.txt", data="\n".join(listed))
        counts = {"test/real": 178, "test/Celeb-synthesis": 340}
    elif dataset == "dfdc":
        files = [f"test/videos/v{n:04d}.mp4" for n in range(5000)]
        rows = [f"v{n:04d}.mp4,{n % 2}" for n in range(5000)]
        put(root, "test/labels.csv", data="\r\n".join(["filename,label", *rows]))
        counts = {"test/real": 2500, "test/DFDC": 2500}
    else:
        for split, targets in zip(SPLITS, (thousand[:703], thousand[703:799], thousand[799:]), strict=True):
            put(root, f"lists/splits/{split}.txt", data="\n".join(f"{target}_W01.mp4" for target in targets))
            counts |= {f"{split}/{method}": len(targets) for method in ("real", "end_to_end_random_level")}
        files = [f"ff/{YOUTUBE}/{target}.mp4" for target in thousand]
        files += [f"manipulated_videos/end_to_end_random_level/{target}_W01.mp4" for target in thousand]
        meta = "".join(f"{target}_W01.mp4 GB:{1 + int(target) % 5}\n" for target in thousand)
        put(root, META.format("end_to_end_random_level"), data=meta)
        source = replace(source, ffpp=root / "ff")
    put(root, *files, data=b"")
    return source, counts, files[-1]


@pytest.mark.parametrize("dataset", ["ffpp", "dfd", "celebdf-v2", "dfdc", "deeperforensics"])
def test_published_counts(tmp_path: Path, dataset: str) -> None:
    source, counts, victim = complete(tmp_path, dataset)
    table, total = read(tmp_path, source), sum(counts.values())
    assert Counter(f"{v.split}/{v.method}" for v in table.videos) == counts
    assert not any(re.search("accepted|missing|not checked", note) for note in table.notes)
    (tmp_path / victim).unlink()
    missing = f"1 of {total} videos are missing, the first is (?i:{victim})"
    missing = "has 3067 videos, published are 3068" if dataset == "dfd" else missing  # no list names its videos
    refused(tmp_path, source, missing)
    table = read(tmp_path, replace(source, allow=("counts",)))
    assert len(table.videos) == total - 1
    assert any(re.search(f"accepted: .*{missing}", note) for note in table.notes)


def test_celebdf_test_videos_never_reach_training(tmp_path: Path) -> None:
    source = replace(complete(tmp_path, "celebdf-v2")[0], splits=("train", "val"))
    path = tmp_path / "List_of_testing_videos.txt"
    lines = path.read_text().splitlines()
    names, table = {line[2:] for line in lines}, read(tmp_path, source)
    assert not names & {video.path for video in table.videos}
    (note,) = (note for note in table.notes if "left out" in note)
    assert len(table.videos) + int(note.split()[0]) == 890 + 5639 - 518
    path.write_text("\n".join(lines[1:]))  # cut short, the list would leave a test video to the training set
    refused(tmp_path, source, path.name)
    path.write_text("\n".join(lines))
    name = lines[0].split("/")[1]
    put(tmp_path, f"Celeb-real/videos/{name}")  # so would a second copy
    with contextlib.suppress(UsageError):
        videos = read(tmp_path, replace(source, allow=("counts",))).videos
        assert not any(video.path.endswith(name) for video in videos)


A, B = Video("a.mp4", 0, "real", "train", ("1",)), Video("b.mp4", 1, "X", "train", ("1", "2"), target="a.mp4")


@pytest.mark.parametrize(
    ("videos", "kind", "text"),
    [
        ([A, A._replace(split="test")], "labels", r"video a\.mp4 is in both train and test$"),
        ([A, B, A._replace(), A._replace()], "labels", r"video a\.mp4 is listed twice and 1 more like it$"),
        ([B, B._replace(path="c", split="val", identities=("2", "1"))], "leaks", r"pair 1\+2 is in both train and val"),
        ([B._replace(split="test"), A], "leaks", r"b\.mp4 \(test\) was made from a\.mp4 \(train\)"),
        ([A, B, A._replace(corruptions=(("x", 1),)), B._replace(path="c"), A._replace(path="d", split="val")], "", "$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("allow", [(), ("counts",), ("leaks",), ("counts", "leaks")])
def test_audit(tmp_path: Path, videos: list[Video], kind: str, text: str, allow: Any) -> None:
    check = functools.partial(audit, VideoTable(tmp_path, videos), {}, allow, exists=lambda video: True)
    if not kind or (kind == "leaks" and "leaks" in allow):
        assert any(re.search(f"accepted: .*{text}", note) for note in check().notes) == bool(kind)
        return
    with pytest.raises(UsageError, match=text) as error:
        check()
    assert ("--allow leaks" in str(error.value)) == (kind == "leaks")


def one(row: Any) -> Any:
    """A DeepfakeBench list of one video."""
    return {"F": {"FF-DF": {"test": {"000_001": row}}}}


LISTS: dict[str, tuple[str, Callable[[str], Any]]] = {  # file, and its content with a given name in it
    "ffpp": ("splits/train.json", lambda name: [["000", "001"], [name, "009"]]),
    "celebdf-v2": ("List_of_testing_videos.txt", "1 {}\n".format),
    "dfdc": ("dfdc_train_part_0/metadata.json", lambda name: {name: {"label": "REAL"}}),
    "dfdc test": ("test/labels.csv", "filename,label\n{},1".format),
    "dfdc-preview": ("dataset.json", lambda name: {name: {"label": "real", "set": "test"}}),
    "deeperforensics": ("lists/splits/train.txt", str),
    "deepfakebench": ("bench.json", lambda name: one({"frames": [name]})),
    "aiface": ("dataset/train.csv", "Image Path,Target\n{},1".format),
    "fakeavceleb": (
        "meta_data.csv",
        f"{AV_HEADER}\na,-,-,real,A,RealVideo-RealAudio,,,{{}},RealVideo-RealAudio".format,
    ),
}
DEEPER: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dfdc original": ("dfdc_train_part_0/metadata.json", lambda name: {"a.mp4": {"label": "FAKE", "original": name}}),
    "deepfake-eval-2024": (
        "video-metadata-publish.csv",
        "Filename,Video Ground Truth,Finetuning Set\n{},Real,test".format,
    ),
    "deepfakebench masks": ("bench.json", lambda name: one({"frames": ["a/b.png"], "masks": [name]})),
}


def listed(root: Path, key: str, data: Any) -> tuple[Source, Path]:
    """A miniature whose list holds ``data`` (None: is missing) and how to read it, with every allowance."""
    source, path = MINIATURES[key.split()[0]](root)[0], root / (LISTS | DEEPER)[key][0]
    (root / "dfdc_train_part_1/metadata.json").unlink(missing_ok=True)
    splits: Any = {"dfdc": ("train", "val"), "dfdc test": ("test",)}.get(key, SPLITS)
    path.unlink()
    if data is not None:
        put(path.parent, path.name, data=data)
    return replace(source, splits=splits, allow=("counts", "leaks")), path


ESCAPES = ("../x.mp4", "/x.mp4", "C:/x.mp4", "C:\\x", "..\\x", "a/../../x", "\\\\host\\x.mp4", "a/./b", "a//b")


@pytest.mark.parametrize("key", LISTS | DEEPER)
def test_names_outside_the_root_are_refused(tmp_path: Path, key: str) -> None:
    for name in ESCAPES:
        source, path = listed(tmp_path, key, (LISTS | DEEPER)[key][1](name))
        assert path.name in refused(tmp_path, source, "not a path inside the dataset|no plain name")


@pytest.mark.parametrize("name", ["a\nb", "a" * 300, "/".join(["a" * 200] * 30), "\ud800"], ids=range(4))
@pytest.mark.parametrize("key", ["ffpp", "dfdc", "dfdc-preview", "deepfakebench"])
def test_odd_names_get_one_line(tmp_path: Path, key: str, name: str) -> None:
    source, _ = listed(tmp_path, key, LISTS[key][1](name if key == "ffpp" else f"{name}/c.png"))
    refused(tmp_path, replace(source, allow=()))


def cases(key: str, *contents: Any, within: Callable[[Any], Any] = lambda x: x, text: str = "") -> list[Any]:
    return [(key, within(content), text) for content in contents]


PART = r"dfdc_train_part_0/a\.mp4"
MALFORMED = [  # list, content, what the error says (default: the list's name)
    *(case for key in LISTS for case in cases(key, None, b"", bytes(range(256)), "nonsense", "x" * 200_000)),
    *(case for key in LISTS if LISTS[key][0].endswith("json") for case in cases(key, "[" * 200_000, [], {}, 5, [5])),
    *cases("ffpp", [["000"]], [["0", "1", "2"]], [[0, 1]], ["ab"], {"ab": 1}, [[["000"], "001"]]),
    *cases("celebdf-v2", "2 Celeb-real/id0_0000.mp4", text="not '<0 or 1>"),
    *cases("celebdf-v2", "0 Celeb-real/id0_0000.mp4\n1 Celeb-synthesis/id4_id0_0002.mp4", text="opposite of its fol"),
    *cases("dfdc", 5, None, [], "REAL", {"label": ["REAL"]}, {"label": "real"}, {"label": "FAKE", "original": 5},
           {"label": "FAKE", "original": ["b.mp4"]}, within=lambda row: {"a.mp4": row}),
    *cases("dfdc", {"a.mp4": {"label": "REAL", "original": "b.mp4"}}, text=f"{PART} is REAL and has an original"),
    *cases("dfdc", {"a.mp4": {"label": "FAKE", "original": None}}, text=f"{PART} is FAKE and has no original"),
    *cases("dfdc", {"a\nb.mp4": {"label": "real"}}),
    *cases("dfdc-preview", {"a\nb.mp4": {"label": "x"}}),
    *cases("deepfakebench", {"F": {"FF-\nDF": {"test": {"a\nb": {"frames": []}}}}}),
    *cases("dfdc test", "filename,label\nx.mp4,2\n", "x.mp4,0\ny.mp4,1\n", text="has the label .* was expected"),
    *cases("dfdc-preview", 5, None, [], {"label": "real", "set": ["test"]}, {"label": "FAKE", "set": "test"},
           {"label": "real", "set": "val"}, within=lambda row: {"a/b.mp4": row}),
    *cases("deepfakebench", 5, {"FF-DF": 5}, {"FF-DF": {"test": 5}}, {"FF-DF": {"dev": {}}},
           {"FF-DF": {"test": {"raw": {}}}}, within=lambda labels: {"F": labels}),
    *cases("deepfakebench", 5, None, [], {"frames": 5}, {"frames": "abc"}, {"frames": [5]}, {"frames": []},
           {"frames": ["a/b.png"], "masks": 5}, {"frames": ["a/b.png"], "masks": {"x": 1}}, within=one),
]  # fmt: skip


@pytest.mark.parametrize(("key", "data", "text"), MALFORMED, ids=[f"{k} {str(d)[:70]!r}" for k, d, _ in MALFORMED])
def test_malformed_lists_and_wrong_labels_are_never_accepted(tmp_path: Path, key: str, data: Any, text: str) -> None:
    source, path = listed(tmp_path, key, data)
    assert "--allow" not in refused(tmp_path, source, text or re.escape(path.name))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FF++ with every pair of twelve people."""
    root, people = tmp_path_factory.mktemp("twelve"), [f"{n:03d}" for n in range(12)]
    put(root, *(f"{YOUTUBE}/{a}.mp4" for a in people), data=b"")
    put(root, *(f"manipulated_sequences/Deepfakes/c23/videos/{a}_{b}.mp4" for a in people for b in people), data=b"")
    return root


PLACES = st.tuples(st.permutations(range(3)), st.integers(0, 3), st.integers(0, 3))


@at_random
@given(people=st.permutations([f"{n:03d}" for n in range(12)]), plant=st.none() | PLACES)
def test_audit_fails_exactly_when_splits_overlap(twelve: Path, people: list[str], plant: Any) -> None:
    parts = [people[4 * k : 4 * k + 4] for k in range(3)]
    if plant:
        parts[plant[0][0]][plant[1]] = parts[plant[0][1]][plant[2]]
    for split, part in zip(SPLITS, parts, strict=True):
        put(twelve, f"{split}.json", data=[part[:2], part[2:]])
    if plant:
        refused(twelve, Source("ffpp", allow=("counts", "leaks")), "is in both")
    else:
        videos = read(twelve, Source("ffpp", allow=("counts",))).videos
        assert {(p, v.split) for v in videos for p in v.identities} == {
            (p, split) for split, part in zip(SPLITS, parts, strict=True) for p in part
        }


PIECES = st.sampled_from(["..", ".", "/", "\\", "C:", "a", "~", " ", "\0", "\n", "\u2028", "\ud800", "./", "//"])


@at_random
@given(st.text() | st.lists(PIECES, max_size=8).map("".join))
def test_safe_stays_inside(name: str) -> None:
    try:
        path = safe_path(name, Path("list.txt"))
    except UsageError:
        return
    assert path == name.replace("\\", "/").removeprefix("./")
    for root in (PurePosixPath("/root"), PureWindowsPath("R:/root")):
        whole: PurePath = root / path
        assert whole != root
        assert whole.is_relative_to(root)
        assert ".." not in whole.parts


Shape = Callable[[dict[str, Any]], dict[str, Any]]


def published(root: Path, shape: Shape, **labels: tuple[str, ...]) -> Source:
    """A list in which ``shape`` makes the splits of each label from its videos, of two pictures each."""
    made = {}
    for label, names in labels.items():
        folder = f"Set/{label}/frames"
        put(root, *(f"{folder}/{name}/{n}.png" for name in names for n in "01"))
        rows = {n: {"label": label, "frames": [f"{folder}/{n}/{k}.png" for k in "10"]} for n in names}
        made[label] = shape(rows)
    put(root, "Set.json", data={"Set": made})
    return Source("deepfakebench", lists=root / "Set.json")


def splits_of(root: Path, source: Source) -> set[str]:
    return {f"{v.split}/{Path(v.path).name}" for v in read(root, source).videos}


first = lambda rows: dict([*rows.items()][:1])
fields = lambda rows: [*rows.values()][-1]
PUBLISHED: dict[str, tuple[Shape, set[str], list[str]]] = {  # videos read of a to f, and what is said of the others
    "Celeb-DF": (
        lambda rows: {"train": rows, "val": first(rows), "test": first(rows)},
        {"test/a", "test/d", "train/b", "train/c", "train/e", "train/f"},
        ["2 videos of train that are in test as well", "2 videos of val that are in test as well"],
    ),
    "UADFV, DFD": (
        lambda rows: {"train": rows, "test": rows, "val": rows},
        {f"test/{name}" for name in "abcdef"},
        ["6 videos of train that are in test as well", "6 videos of val that are in test as well"],
    ),
    "DFDCP": (
        lambda rows: {"train": {k: r for k, r in rows.items() if k not in first(rows)}, "test": first(rows),
                      "val": first(rows)},
        {"test/a", "test/d", "train/b", "train/c", "train/e", "train/f"},
        ["2 videos of val that are in test as well"],
    ),
    "DFDC": (
        lambda rows: {"train": {}, "test": rows, "val": fields(rows)},
        {f"test/{name}" for name in "abcdef"},
        ["2 of the labels' val entries, which hold one video's fields and not videos"],
    ),
    "DFDC with train": (
        lambda rows: {"train": first(rows), "test": {k: r for k, r in rows.items() if k not in first(rows)},
                      "val": {**fields(rows), **first(rows)}},
        {"train/a", "train/d", *(f"test/{name}" for name in "bcef")},
        ["2 of the labels' val entries, which hold one video's fields and not videos",
         "2 videos of val that are in train as well"],
    ),
    "without frames": (
        lambda rows: {"train": {"x": {"frames": []}}, "test": rows, "val": {}},
        {f"test/{name}" for name in "abcdef"},
        ["2 videos of train without frames"],
    ),
    "twice": (  # DF40's FSAll has the reals once for each method
        lambda rows: {"test": rows | {f"simswap_{name}": row for name, row in first(rows).items()}},
        {f"test/{name}" for name in "abcdef"},
        ["2 videos of test that are in it twice"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_deepfakebenchs_lists_as_published(tmp_path: Path, name: str) -> None:
    shape, expected, said = PUBLISHED[name]
    source = published(tmp_path, shape, S_Real=("a", "b", "c"), S_Fake=("d", "e", "f"))
    assert splits_of(tmp_path, source) == expected
    assert [note for note in read(tmp_path, source).notes if "left out" in note] == [f"left out: {t}" for t in said]
    assert splits_of(tmp_path, replace(source, lists=None)) == expected, "the only list beside the pictures"
    there = sorted({video.split("/")[0] for video in expected}, key=SPLITS.index)
    text = refused(tmp_path, replace(source, splits=("val",)), r"Set\.json: no videos of val \(")
    assert all(part in text for part in said)
    assert text.endswith(f"; --splits {' '.join(there)} reads the others")
    assert splits_of(tmp_path, replace(source, splits=tuple(there))) == expected


def test_deepfakebenchs_labels(tmp_path: Path) -> None:
    source = published(tmp_path, lambda rows: {"test": rows}, DFDCP_Real=("a",), DFDCP_FakeA=("b",), UADFV_Fake=("c",))
    assert {v.method for v in read(tmp_path, source).videos} == {"real", "DFDCP_FakeA", "UADFV_Fake"}
    whole = json.loads((tmp_path / "Set.json").read_text())
    whole["Set"]["UADFV_Fake"]["test"]["a"] = whole["Set"]["DFDCP_Real"]["test"]["a"]
    put(tmp_path, "Set.json", data=whole)
    refused(tmp_path, source, "video a of UADFV_Fake has the label 'DFDCP_Real'")
    whole["Set"]["UADFV_Fake"]["test"]["a"] = {"frames": ["Set/DFDCP_Real/frames/a/0.png"]}
    put(tmp_path, "Set.json", data=whole)
    refused(tmp_path, source, "a/0.png is listed as UADFV_Fake and as DFDCP_Real|as DFDCP_Real and as UADFV_Fake")
    put(tmp_path, "another.json", data=whole)
    refused(tmp_path, replace(source, lists=None), "by --lists; .* has Set.json, another.json")


def test_single_pictures_that_share_a_folder_are_videos_of_their_own(tmp_path: Path) -> None:
    names = [f"e4e/inversions/{n}.png" for n in range(4)]  # DF40's e4e
    put(tmp_path, *names, "e4e/inversions/._0.png")
    rows = {name: {"label": "e4e_Fake", "frames": [path]} for name, path in zip("abcd", names, strict=True)}
    rows["a"]["frames"] = ["e4e/inversions/._0.png", names[0]]
    put(tmp_path, "e4e.json", data={"e4e_ff": {"e4e_Fake": {"train": rows, "test": {"a": rows["a"]}}}})
    table = read(tmp_path, Source("deepfakebench"))
    assert [(v.split, v.path, v.frames) for v in sorted(table.videos)] == [
        ("test" if name == names[0] else "train", name, (name,)) for name in names
    ]
    assert "4 pictures: test/e4e_Fake 1, train/e4e_Fake 3" in table.notes


@pytest.mark.parametrize(
    "old", ["/data/me", "C:\\sets", "./datasets", "deepfakes_detection_datasets", "../rgb", "//host/x"]
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_roots_of_other_machines(tmp_path: Path, old: str, elsewhere: bool) -> None:
    root = tmp_path / "root"
    source = published(root, lambda rows: {"test": rows}, S_Real=("a",), S_Fake=("b",))
    expected = sorted(read(root, source).videos)
    text = (root / "Set.json").read_text().replace("Set/", f"{old}/Set/")
    text = text.replace("/", "\\").replace("\\", "\\\\") if "\\" in old else text
    put(root, "Set.json", data=text)
    known = old.replace("\\", "/").removeprefix("./")
    assert f"--root-map {known}=. finds it" in refused(root, source)
    new = "."
    if elsewhere:
        (root / "Set").rename(tmp_path / "Set")
        if old != "../rgb":
            refused(root, source, "--root-map OLD=NEW says where|2 of 2 videos are missing")
        new = tmp_path.as_posix()
    table = read(root, replace(source, root_map=(f"{old}={new}", "unused=.")))
    there = lambda path: f"{new}/{path}" if elsewhere else path
    assert sorted(table.videos) == [
        v._replace(path=there(v.path), frames=tuple(map(there, v.frames))) for v in expected
    ]
    assert len(list(video_frames(root, table.videos[0], 2))) == 2
    put(root, "Set.json", data=text.replace("Set", "..", 2).replace("..", "Set", 1))
    refused(root, replace(source, root_map=(f"{old}={new}",)), "is not a path inside the dataset")


@pytest.mark.parametrize("pair", ["x", "=.", "x=", "x=..", "x=../y", "x=nowhere", "x=/", "x=a/../.."])
def test_wrong_root_maps(tmp_path: Path, pair: str) -> None:
    source = published(tmp_path, lambda rows: {"test": rows}, S_Real=("a",))
    refused(tmp_path, replace(source, root_map=(pair,)), f"--root-map {re.escape(pair)}: OLD=NEW was expected")


def test_a_missing_set_of_a_list_is_not_taken_for_a_wrong_root(tmp_path: Path) -> None:
    source = published(tmp_path, lambda rows: {"test": rows}, S_Real=("a",), S_Fake=("b",))
    (tmp_path / "Set/S_Fake").rename(tmp_path / "gone")
    refused(tmp_path, source, "1 of 2 videos are missing.*--allow counts")


@at_random
@given(names=st.sets(st.text("ab01_-é ", min_size=1, max_size=9), min_size=1, max_size=3), nested=st.booleans())
def test_deepfakebench_separators_mean_the_same(names: set[str], nested: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, tables = Path(folder), []
        for s in "/\\":
            rows = {name: {"frames": [f"FF{s}frames{s}{name}{s}{n}.png" for n in range(2)],
                           "masks": [f".{s}FF{s}masks{s}{name}{s}0.png"]} for name in names}  # fmt: skip
            put(root, "b.json", data={"F": {"FF-F2F": {"test": {"c23": rows} if nested else rows}}})
            put(root, *(f"FF/frames/{name}/{n}.png" for name in names for n in range(2)), data=b"")
            tables.append(read(root, Source("deepfakebench", lists=root / "b.json")).videos)
    assert tables[0] == tables[1]
    expected = {(f"FF/frames/{name}", f"FF/masks/{name}", "Face2Face", "c23" if nested else "") for name in names}
    assert {(v.path, v.mask, v.method, v.compression) for v in tables[0]} == expected


@at_random
@given(variant=st.sampled_from(VARIANTS), name=st.text())
def test_perturbations_are_those_of_the_variant(variant: str, name: str) -> None:
    drawn = perturbations(variant, name)
    assert drawn == perturbations(variant, name)
    assert {kind for kind, _ in drawn} <= set(PERTURBATIONS)
    assert {level for _, level in drawn} <= set(range(1, 6))
    number = int("".join(re.findall(r"\d", variant)) or 0)
    if "_mix_" in variant:
        assert len(dict(drawn)) == number
    else:
        assert len(drawn) == (variant in DISTORTED)
        assert not number or drawn[0][1] == number


def test_pictures_are_spread_and_numbered_by_name(tmp_path: Path) -> None:
    names = tuple(f"clip/{10 * n:03d}.png" for n in range(5))
    for place, name in enumerate(names):
        put(tmp_path, name, data=still(shade=20 * place))
    video = Video("clip", 0, "real", "test", frames=names)
    frames = list(video_frames(tmp_path, video, 3))
    assert [frame.number for frame in frames] == [0, 20, 40]
    assert all(np.array_equal(frame.image, picture(2 * frame.number)) for frame in frames)
    assert len(list(video_frames(tmp_path, video, 99))) == 5
    put(tmp_path, names[2], data=still()[:200])
    reading = Reading()
    assert [frame.number for frame in video_frames(tmp_path, video, 3, reading=reading)] == [0, 40]
    assert (reading.asked, reading.lost) == (3, 1)
    with pytest.raises(MediaError, match=r"020\.png: cannot read this image"):
        list(video_frames(tmp_path, video._replace(frames=names[2:3]), 3))


def test_lmdb(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    source, rows, _ = bench(tmp_path, "\\", "store")
    first, second, third = rows[0].frames
    assert [frame.number for frame in video_frames(tmp_path, rows[0], 3, source.lmdb)] == [0, 7, 15]
    damaged = tmp_path / "damaged"
    with lmdb.open(str(damaged), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        transaction.put(first.encode(), still())
        transaction.put(second.encode(), still()[:100])
    refused(tmp_path, replace(source, lmdb=damaged), "5 of 5 videos are missing")
    assert [frame.number for frame in video_frames(tmp_path, rows[0], 3, damaged)] == [0]
    for name, fault in ((third, "damaged: holds no {}"), (second, "{}: cannot read this image")):
        with pytest.raises(MediaError, match=fault.format(re.escape(name))):
            list(video_frames(tmp_path, rows[0]._replace(frames=(name,)), 3, damaged))
    refused(tmp_path, replace(source, lmdb=tmp_path / "nowhere"), "nowhere: cannot open this LMDB")
    put(tmp_path, "bench.json", data=one({"frames": ["/".join(["a" * 200] * 3)]}))
    refused(tmp_path, source)


def test_compression_in_the_middle_of_a_mix(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    video = Video("a.mp4", 0, "real", "test", corruptions=(("contrast", 5), ("video", 5), ("blocks", 5)))
    uncompressed = video._replace(corruptions=(("contrast", 5), ("blocks", 5)))
    mixed, other = list(video_frames(tmp_path, video, 3)), video_frames(tmp_path, uncompressed, 3)
    assert [frame.number for frame in mixed] == [0, 2, 4]
    assert len([*corrupt_video(tmp_path / "a.mp4", tmp_path / "b.mp4", video.corruptions[:2], 0)]) == 5
    whole, plains = (read_frames(tmp_path / name, 3) for name in ("b.mp4", "a.mp4"))
    for a, b, c, plain in zip(mixed, other, whole, plains, strict=True):
        assert (a.image == 128).all(2).mean() > 0.3, "blocks come after the compression and are sharp"
        rest = (a.image != 128).any(2) & (b.image != 128).any(2)
        assert a.image[rest].mean() == pytest.approx(0.35 * plain.image[rest].mean(), rel=0.1)
        assert np.abs(a.image[rest].astype(int) - b.image[rest]).mean() > 0.5, "compressed"
        assert np.abs(a.image[rest].astype(int) - c.image[rest]).mean() < 0.2, "as a video, not frame by frame"
    put(tmp_path, "a.mp4", data=b"no video")
    with pytest.raises(MediaError, match=r"a\.mp4: cannot read this video"):
        list(video_frames(tmp_path, video, 3))


def test_landmarks(tmp_path: Path) -> None:
    path, points = tmp_path / "FF/landmarks/000/007.npy", np.arange(162.0).reshape(81, 2)
    assert landmarks(tmp_path, "FF/frames/000/007.png") is None
    put(tmp_path, "FF/landmarks/000/007.npy")
    np.save(path, points)
    found = landmarks(tmp_path, "FF/frames/000/007.png")
    assert found is not None
    assert found.dtype == np.float32
    assert np.array_equal(found, points)
    assert landmarks(tmp_path, "FF/pictures/000/007.png") is None


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\3\4", np.zeros((3, 3)), np.full((3, 2), np.nan), [["a", "b"]]])
def test_damaged_landmarks_name_themselves(tmp_path: Path, data: Any) -> None:
    put(tmp_path, "x/landmarks/a.npy", data=data if isinstance(data, bytes) else b"")
    if not isinstance(data, bytes):
        np.save(tmp_path / "x/landmarks/a.npy", data)
    with pytest.raises(MediaError, match=r"landmarks/a\.npy"):
        landmarks(tmp_path, "x/frames/a.png")
