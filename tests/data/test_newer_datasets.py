"""AI-Face, Deepfake-Eval-2024, FakeAVCeleb and folders of generators: planted faults, attributes, families."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from data.test_datasets import AV_HEADER, aiface, deepfake_eval, fakeavceleb, put, refused

from dtn_fast.data.config import PrepareConfig, Source, WorkConfig
from dtn_fast.data.crop_dataset import open_crop_dataset
from dtn_fast.data.datasets import aiface as aiface_module
from dtn_fast.data.datasets import read
from dtn_fast.data.forgery_families import by_family, families_of, named_families
from dtn_fast.data.prepare import prepare
from dtn_fast.data.video_table import Video, video_of
from dtn_fast.errors import UsageError


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def counted(root: Path, source: Source) -> Source:
    return replace(source, allow=("counts",))


def test_fakeavceleb_audio_alone_is_no_visual_fake(tmp_path: Path) -> None:
    source, _, _ = fakeavceleb(tmp_path)
    table = read(tmp_path, counted(tmp_path, source))
    assert not any("RealVideo-FakeAudio" in video.path for video in table.videos)
    assert "left out: 3 videos of RealVideo-FakeAudio, whose picture is that of the real videos" in table.notes
    assert "left out: 3 rows of files that are listed before, some with another method" in table.notes
    assert "left out: 3 videos whose people are in different splits" in table.notes
    assert {v.method for v in table.videos} == {"real", "wav2lip", "fsgan"}, "the first of two methods counts"
    homes: dict[str, set[str]] = {}
    for video in table.videos:
        for person in video.identities:
            homes.setdefault(person, set()).add(video.split)
    assert len(homes) == 3
    assert all(len(splits) == 1 for splits in homes.values())
    whole = read(tmp_path, replace(source, split="0/0/100", allow=("counts",)))
    assert {video.split for video in whole.videos} == {"test"}
    assert any("3 of 12 videos are missing" in note for note in whole.notes), "nothing is astride"


@pytest.mark.parametrize(("old", "new", "text"), [
    ("A,FakeVideo-FakeAudio,African", "A,RealVideo-RealAudio,African",
     "FakeVideo-FakeAudio/.* is listed as RealVideo-RealAudio, method wav2lip"),
    ("rtvc,A,RealVideo-FakeAudio,African", "real,A,RealVideo-FakeAudio,African", "is listed as .*, method real"),
    ("A,RealVideo-RealAudio", "A,RealVideo", "row 2 has the type 'RealVideo'; known are RealVideo-RealAudio"),
    ("FakeAVCeleb/RealVideo-RealAudio/African", "FakeAVCeleb/../African", "is not a path inside the dataset"),
    (AV_HEADER, AV_HEADER.replace("race", "origin"), "has no column 'race'; its columns are source, target1"),
    (AV_HEADER, f"{AV_HEADER}folder", "has no last column without a name"),
])  # fmt: skip
def test_fakeavceleb_planted_faults(tmp_path: Path, old: str, new: str, text: str) -> None:
    source, _, _ = fakeavceleb(tmp_path)
    edit(tmp_path / "meta_data.csv", old, new)
    assert "--allow" not in refused(tmp_path, counted(tmp_path, source), text)


def test_fakeavceleb_as_pandas_writes_it(tmp_path: Path) -> None:
    source, rows, _ = fakeavceleb(tmp_path)
    edit(tmp_path / "meta_data.csv", AV_HEADER, f"{AV_HEADER}Unnamed: 9")
    assert sorted(read(tmp_path, counted(tmp_path, source)).videos) == sorted(rows)


@pytest.mark.parametrize("name", ["fakeavceleb", "aiface", "deepfake-eval-2024"])
def test_missing_files_and_lists(tmp_path: Path, name: str) -> None:
    make = {"fakeavceleb": fakeavceleb, "aiface": aiface, "deepfake-eval-2024": deepfake_eval}[name]
    source, rows, _ = make(tmp_path)
    (tmp_path / rows[1].path).unlink()
    assert rows[1].path in refused(tmp_path, source, "1 of .* are missing, the first is")
    accepted = read(tmp_path, counted(tmp_path, source))
    assert sorted(accepted.videos) == sorted([rows[0], *rows[2:]])
    for path in [*tmp_path.rglob("*.csv")]:
        path.unlink()
    refused(tmp_path, source, r"no test\.csv|no video-metadata-publish\.csv or|meta_data\.csv: the list cannot be read")


def test_deepfake_eval_labels_are_of_the_picture(tmp_path: Path) -> None:
    source, _, _ = deepfake_eval(tmp_path)
    notes = read(tmp_path, source).notes
    assert "1 videos whose sound alone is forged are reals" in notes
    assert "left out: 1 files of video-metadata-publish.csv whose label is unknown" in notes
    assert "left out: 1 rows of image-metadata-publish.csv without a file's name" in notes
    assert "people are not published: the splits are not audited for them" in notes
    odd = "a.mp4,2024-11-14,Fake,Unknown,\u2028 odd\x0b signs,test"  # comments are the public's
    edit(tmp_path / "video-metadata-publish.csv", "a.mp4,2024-11-14,Fake,Unknown,,test", odd)
    edit(tmp_path / "video-metadata-publish.csv", '"voice, cloned"', '"voice,\ncloned"')
    assert len(read(tmp_path, source).videos) == 5
    (tmp_path / "video-metadata-publish.csv").unlink()
    table = read(tmp_path, source)
    assert "video-metadata-publish.csv is missing: its video-data is not read" in table.notes
    assert len(table.videos) == 2


@pytest.mark.parametrize(("old", "new", "text"), [
    ("a.mp4,2024-11-14,Fake", "a.mp4,2024-11-14,Fale", "row 2 has the label 'Fale' and the set 'test'; Real, Fake"),
    (",train\n", ",dev\n", "the set 'dev'"),
    ("d.mp4,2024-11-13,Unknown,Fake,,test", "a.mp4,2024-11-13,Fake,Fake,,train", "a.mp4 is in both test and train"),
    ("d.mp4,2024-11-13,Unknown,Fake,,test", "d.mp4,2024-11-13,Fake,Fake,,test,x", "row 5 has more cells than the head"),
    ("Finetuning Set", "Set", "has no column 'finetuning set'"),
])  # fmt: skip
def test_deepfake_eval_planted_faults(tmp_path: Path, old: str, new: str, text: str) -> None:
    source, _, _ = deepfake_eval(tmp_path)
    edit(tmp_path / "video-metadata-publish.csv", old, new)
    assert "--allow" not in refused(tmp_path, source, text)


@pytest.mark.parametrize(("old", "new", "text"), [
    ("AttGAN/a.png,0,3,1,0,1", "AttGAN/a.png,0,3,1,0,0", "train.csv lists AttGAN/a.png as real, which its folder co"),
    ("FFHQ/b.png,0,3,3,0,0", "FFHQ/b.png,0,3,3,0,1", "lists FFHQ/b.png as fake"),
    ("FFHQ/b.png,0,3,3,0,0", "FFHQ/b.png,0,3,3,0,2", "row 4 has the target '2'; 0 .real. or 1 was expected"),
    ("FFHQ/b.png,0", "imdb_wiki/d.png,0", "imdb_wiki/d.png is in both train and test|in both test and train"),
    ("Image Path", "Path", "has no column 'image path'"),
])  # fmt: skip
def test_aiface_planted_faults(tmp_path: Path, old: str, new: str, text: str) -> None:
    source, _, _ = aiface(tmp_path)
    edit(tmp_path / "dataset/train.csv", old, new)
    assert "--allow" not in refused(tmp_path, source, text)


def test_aiface_numbers_that_are_not_published_stay_numbers(tmp_path: Path) -> None:
    source, _, _ = aiface(tmp_path)
    edit(tmp_path / "dataset/test.csv", "Latent_Diffusion/c.png,1,3", "Latent_Diffusion/c.png,1,2.0")
    table = read(tmp_path, source)
    ages = {(video.split == "test", dict(video.attributes)["age"]) for video in table.videos}
    assert ages == {(False, "adult"), (True, "2"), (True, "3")}
    assert any("test.csv: age has the number 2, whose meaning is not published" in note for note in table.notes)


def test_aiface_frames_of_a_video_stay_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"AttGAN/{n:05d}.png" for n in range(40)]
    put(tmp_path, "test.csv", data="Image Path,Target\nFFHQ/x.png,0\n")
    put(tmp_path, "train.csv", data="Image Path,Target\n" + "".join(f"/their/set/{name},1\n" for name in names))
    put(tmp_path, "FFHQ/x.png", *names)
    assert "--root-map /their/set=. finds it" in refused(tmp_path, Source("aiface"))
    source = Source("aiface", root_map=("/their/set=.",))
    splits = lambda: Counter(video.split for video in read(tmp_path, source).videos if video.label)
    assert splits() == {"train": 40}
    monkeypatch.setattr(aiface_module, "ONE_VIDEO", 39)
    assert splits().keys() == {"train", "val"}
    assert {v.split for v in read(tmp_path, replace(source, splits=("test",))).videos} == {"test"}


def test_df40_lists_are_read_together(tmp_path: Path) -> None:
    """Forty lists, one that joins others: each video once, by the forgery of its own list."""

    def listed(name: str, **labels: list[str]) -> None:
        rows = {label: {"test": {folder.rpartition("/")[2]: {"label": label, "frames": [f"{folder}/0.png"]}
                                 for folder in folders}, "train": {}} for label, folders in labels.items()}  # fmt: skip
        put(tmp_path, f"dataset_json/{name}.json", data={name: rows})

    reals = ["FF/frames/000", "FF/frames/003"]
    swaps, talks = ["simswap/ff/frames/000_003"], ["wav2lip/ff/frames/003_000"]
    put(tmp_path, *(f"{folder}/0.png" for folder in (*reals, *swaps, *talks)))
    listed("simswap_ff", simswap_Real=reals, simswap_Fake=swaps)
    listed("wav2lip_ff", wav2lip_Real=reals, wav2lip_Fake=talks)
    listed("FSAll_ff", FSAll_Real=reals, FSAll_Fake=swaps)
    source = Source("deepfakebench", lists=tmp_path / "dataset_json")
    table = read(tmp_path, source)
    assert sorted((v.method, v.path) for v in table.videos) == sorted(
        [("real", path) for path in reals] + [("simswap_Fake", swaps[0]), ("wav2lip_Fake", talks[0])]
    )
    assert "left out: 5 videos of test that are in it twice" in table.notes
    assert by_family({v.method for v in table.videos if v.label}, {}).keys() == {"swap", "reenactment"}
    put(tmp_path, "sadtalker/train/frames/000_003/0.png")  # a pair of the test split in another list's training split
    rows = {"000_003": {"label": "sadtalker_Fake", "frames": ["sadtalker/train/frames/000_003/0.png"]}}
    put(tmp_path, "dataset_json/sadtalker.json", data={"sadtalker": {"sadtalker_Fake": {"train": rows}}})
    refused(tmp_path, source, r"identity pair 000\+003 is in both .*--allow leaks accepts that")
    for path in (tmp_path / "dataset_json").iterdir():
        path.unlink()
    refused(tmp_path, source, "no JSON file there")


def test_a_folder_of_generators_needs_no_reader(tmp_path: Path) -> None:
    for folder in ("real", "DDIM", "Inpaint", "DiffSwap", "StyleGAN2", "diffusion", "Strange"):
        put(tmp_path, *(f"{folder}/{name}/0.png" for name in ("anna", "ben")))
    methods = {v.method for v in read(tmp_path, Source("folder")).videos if v.label}
    found = by_family(sorted(methods), {})
    assert found == {
        "swap": ("DiffSwap",), "whole-face": ("DDIM", "StyleGAN2"), "editing": ("Inpaint",),
        "diffusion": ("DDIM", "DiffSwap", "Inpaint", "diffusion"), "other": ("Strange",),
    }  # fmt: skip
    assert by_family(["A", "B"], {}) == {}, "all in one family"
    assert by_family(["A", "B"], named_families(["A=swap,diffusion"])) == {
        "swap": ("A",), "diffusion": ("A",), "other": ("B",)
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"--families C=.*: no such forgery here; there are A, B"):
        by_family(["A", "B"], {"C": ("swap",)})
    for wrong in ("A", "=swap", "A=", "A=Swap", "A=swap,"):
        with pytest.raises(UsageError, match="FORGERY=FAMILY was expected"):
            named_families([wrong])


DF40 = {
    "swap": "FSGAN faceswap simswap inswap blendface uniface mobileswap e4s facedancer deepfacelab",
    "reenactment": "fomm facevid2vid wav2lip MRAA one_shot_free pirender tpsm lia danet sadtalker mcnet hyperreenact "
    "heygen",
    "whole-face": "VQGAN StyleGAN2 StyleGAN3 StyleGANXL sd2.1 ddim rddm pixart DiT SiT MidJourney whichisreal",
    "editing": "CollabDiff e4e stargan starganv2 styleclip",
}
"""DF40's forty forgeries as its configuration names them, 10, 13, 12 and 5."""


def test_families_of_df40_and_ffpp() -> None:
    assert [len(names.split()) for names in DF40.values()] == [10, 13, 12, 5]
    for family, names in DF40.items():
        for name in names.split():
            assert families_of(f"{name}_Fake")[0] == family, name
    assert families_of("Deepfakes") == families_of("FaceShifter") == families_of("end_to_end_level_3") == ("swap",)
    assert families_of("NeuralTextures") == ("reenactment",)
    assert families_of("fsgan-wav2lip") == ("swap", "reenactment")
    assert families_of("Stable Diffusion v1.5") == ("whole-face", "diffusion")
    assert families_of("nobody's") == ("other",)


def test_attributes_reach_the_crops_and_older_files_stay_as_they_were(tmp_path: Path) -> None:
    source, rows, _ = aiface(tmp_path / "set")
    table = read(tmp_path / "set", source)
    list(prepare(table, tmp_path / "crops", 64, PrepareConfig(frames=1), WorkConfig(workers=1)))
    made = open_crop_dataset(tmp_path / "crops")
    assert sorted(made.videos) == sorted(rows)
    plain = Video("a.mp4", 0, "real", "test")
    assert "attributes" not in plain.to_json()
    assert video_of(json.loads(json.dumps(plain.to_json()))) == plain
