"""One reader per dataset: its layout and split files on disk to the table of :mod:`dtn_fast.data.manifest`."""

from __future__ import annotations

import csv
import itertools
import json
import re
import zlib
from collections.abc import Callable, ItemsView, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dtn_fast.data.corrupt import PERTURBATIONS
from dtn_fast.data.manifest import REAL, SPLITS, Allowance, Manifest, Problem, Video, audit
from dtn_fast.data.synthetic import METHODS, expected_counts, is_synthetic
from dtn_fast.data.video import IMAGES, VIDEOS
from dtn_fast.errors import UsageError

Dataset = Literal[
    "ffpp", "dfd", "celebdf-v1", "celebdf-v2", "dfdc", "dfdc-preview", "deeperforensics", "deepfakebench", "folder",
    "reals",
]  # fmt: skip
Split = Literal["train", "val", "test"]
FFPP_METHODS = ("Deepfakes", "Face2Face", "FaceShifter", "FaceSwap", "NeuralTextures")
FFPP_SIZE = {"train": 720, "val": 140, "test": 140}
DFD = "DeepFakeDetection"
VARIANTS = (
    "end_to_end", *(f"end_to_end_level_{level}" for level in range(1, 6)), "end_to_end_random_level",
    *(f"end_to_end_mix_{n}_distortions" for n in (2, 3, 4)), "reenact_postprocess",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Which dataset lies at the root, and which part of it is wanted."""

    dataset: Dataset = "ffpp"
    """Its layout.  folder: <split>/<real or a forgery's name>/ of videos, pictures or folders of pictures; reals: any
    folder of real faces or videos, split by file name, or by folder where pictures lie in folders: one for each person
    keeps people out of two splits."""
    splits: tuple[Split, ...] = ()
    """Splits to read; default: all, but only test of Celeb-DF, DFD and DFDC, which the protocols train on never."""
    methods: tuple[str, ...] = ()
    """Forgeries to read; default: all that are there."""
    compression: str = "c23"
    """raw, c23 or c40, where the dataset comes in several."""
    lists: Path | None = None
    """Folder of FF++'s train.json, val.json and test.json (default ROOT/splits, then ROOT), or DeepfakeBench's JSON."""
    ffpp: Path | None = None
    """Root of FaceForensics++, whose videos are DeeperForensics' reals."""
    variants: tuple[str, ...] = ("end_to_end",)
    """Which of DeeperForensics' eleven folders; reals get the same perturbations."""
    lmdb: Path | None = None
    """DeepfakeBench's LMDB that holds the frames."""
    allow: tuple[Allowance, ...] = ()
    """Audit findings to go on with: counts (an incomplete download), leaks (identities shared between splits)."""


def read(root: Path, source: Source = Source()) -> Manifest:
    """The audited table of a dataset.  Raises UsageError when lists are missing or malformed, or the audit fails."""
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    for split in source.splits:
        if split not in SPLITS:
            raise UsageError(f"--splits {split}: known are {', '.join(SPLITS)}")
    if source.dataset not in READERS:
        raise UsageError(f"--dataset {source.dataset}: known are {', '.join(get_args(Dataset))}")
    return READERS[source.dataset](root, source)


def read_ffpp(root: Path, source: Source = Source()) -> Manifest:
    """FaceForensics++, or a set laid out like it: a pair (a, b) of a list gives reals a, b and fakes a_b, b_a."""
    folder = source.lists or (root / "splits" if (root / "splits").is_dir() else root)
    c = source.compression
    there = sorted(p.parent.parent.name for p in root.glob(f"manipulated_sequences/*/{c}/videos"))
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
    notes = [f"forgeries that are not there: {', '.join(absent)}"] if absent else []
    return audit(Manifest(root, videos, "ffpp", synthetic, notes=notes), published, source.allow)


def read_dfd(root: Path, source: Source = Source()) -> Manifest:
    """DeepFakeDetection inside the FF++ tree; it has no official split: all of it is a test set."""
    c = source.compression
    videos = []
    for path in sorted(root.glob(f"original_sequences/actors/{c}/videos/*.mp4")):
        actor = path.stem.partition("__")[0]
        videos.append(Video(_relative(root, path), 0, REAL, "test", (actor,), c))
    for path in sorted(root.glob(f"manipulated_sequences/{DFD}/{c}/videos/*.mp4")):
        match = re.fullmatch(r"([^_]+)_([^_]+)__(.+)__\w{8}", path.stem)
        if not match:
            raise UsageError(f"{path}: not named <target>_<source>__<scene>__<8 characters>.mp4")
        target, other, scene = match.groups()
        real = f"original_sequences/actors/{c}/videos/{target}__{scene}.mp4"
        mask = f"manipulated_sequences/{DFD}/masks/videos/{path.name}"
        mask = mask if (root / mask).is_file() else ""
        videos.append(Video(_relative(root, path), 1, DFD, "test", (target, other), c, mask, real))
    if not videos:
        raise UsageError(f"{root}: no original_sequences/actors/{c} there; is it the FF++ root with DFD in it?")
    return audit(_only(Manifest(root, videos, "dfd"), source), {("test", REAL): 363, ("test", DFD): 3068}, source.allow)


CELEBDF = {"celebdf-v1": (408, 795, None), "celebdf-v2": (890, 5639, (178, 340))}
"""Published: reals, fakes, and of these (reals, fakes) in the official test list."""


def read_celebdf(root: Path, source: Source) -> Manifest:
    """Celeb-DF: the official list names the test videos, 1 = real there; the rest is train and, by identity, val.

    A train video whose people fall on both sides of train and val is left out.
    """
    listed: dict[str, int] = {}
    path = root / "List_of_testing_videos.txt"
    problems = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            label, _, name = line.strip().partition(" ")
            if label not in ("0", "1") or not name:
                raise UsageError(f"{path}:{number}: not '<0 or 1> <folder>/<file>'")
            key, fake = _safe(name.strip().lower(), path), 1 - int(label)  # its 1 is a real
            if listed.setdefault(key, fake) != fake:
                raise UsageError(f"{path}:{number}: {key} is listed with both labels")
    if not listed:
        raise UsageError(f"{path}: lists no video")
    found: set[str] = set()
    videos, straddling = [], 0
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        kind = folder.name.lower()
        if kind not in ("celeb-real", "youtube-real", "celeb-synthesis"):
            continue
        fake = kind == "celeb-synthesis"
        for file in sorted([*folder.glob("*.mp4"), *folder.glob("videos/*.mp4")]):
            people = tuple(re.findall(r"id\d+", file.stem)) or (file.stem,)
            real = ""
            if fake:
                if not re.fullmatch(r"id\d+_id\d+_\d+", file.stem):
                    raise UsageError(f"{file}: not named idA_idB_NNNN.mp4")
                scene = file.stem.rpartition("_")[2]
                real = f"{_real_folder(root, file)}/{people[0]}_{scene}.mp4"
            name = f"{kind}/{file.name.lower()}"
            sides = {_carve(person, 6) for person in people}
            split = "test" if name in listed else sides.pop() if len(sides) == 1 else ""
            found.add(name)
            if listed.get(name, fake) != fake:
                text = f"{path.name} calls {name} the opposite of its folder (1 is a real there)"
                problems.append(Problem("labels", text))
            if not split:
                straddling += 1
                continue
            method = "Celeb-synthesis" if fake else REAL
            videos.append(Video(_relative(root, file), int(fake), method, split, people, target=real))
    videos += [  # named in the list and not on the disk: the audit counts them
        Video(name, label, "Celeb-synthesis" if label else REAL, "test")
        for name, label in sorted(listed.items())
        if name not in found
    ]
    if not any(video.label for video in videos):
        raise UsageError(f"{root}: no Celeb-synthesis there; is it the Celeb-DF root?")
    reals, fakes, test = CELEBDF[source.dataset]
    splits = source.splits or ("test",)
    published = {}
    if test and len(listed) != sum(test):  # a list cut short would leave test videos to training
        problems.append(Problem("counts", f"{path.name} lists {len(listed)} videos, published are {sum(test)}"))
    if test and "test" in splits:
        published = {("test", REAL): test[0], ("test", "Celeb-synthesis"): test[1]}
    notes = []
    if set(splits) != {"test"}:
        notes = [f"{straddling} videos left out: their people are in both train and val"]
        whole = sum(not v.label for v in videos), sum(v.label for v in videos)
        if sum(whole) + straddling != reals + fakes:
            text = f"{sum(whole) + straddling} videos in all, published are {reals} reals and {fakes} fakes"
            problems.append(Problem("counts", text))
    manifest = _only(Manifest(root, videos, source.dataset, notes=notes), source, ("test",))
    return audit(manifest, published, source.allow, problems)


def read_dfdc(root: Path, source: Source) -> Manifest:
    """DFDC: metadata.json of each training part (a tenth of the originals is val), labels.csv of the test set."""
    videos, problems = [], []
    splits = source.splits or ("test",)
    if set(splits) & {"train", "val"}:
        for path in sorted(root.glob("dfdc_train_part_*/metadata.json")):
            for name, row in _object(path).items():
                label = {"REAL": 0, "FAKE": 1}.get(str(row.get("label")))
                if label is None:
                    raise UsageError(f"{path}: {name} has the label {row.get('label')!r}; REAL or FAKE was expected")
                original = _safe(row["original"], path) if row.get("original") else ""
                if bool(original) != bool(label):
                    text = f"{path.parent.name}/{name} is {row['label']} and has {'an' if original else 'no'} original"
                    problems.append(Problem("labels", text))
                key = original or _safe(name, path)
                file, target = f"{path.parent.name}/{_safe(name, path)}", f"{path.parent.name}/{original}"
                videos.append(Video(file, label, "DFDC" if label else REAL, _carve(key, 10), (key,),
                                    target=target if original else ""))  # fmt: skip
    if "test" in splits:
        tables = sorted(root.glob("labels.csv")) or sorted(root.glob("*/labels.csv"))
        if not tables:
            raise UsageError(f"{root}: no labels.csv in it or one folder below; it lists DFDC's test videos")
        folder = tables[0].parent
        rows = _table(tables[0])
        if not rows:
            raise UsageError(f"{tables[0]}: lists no video")
        for row in rows:
            name, text = row.get("filename", ""), row.get("label", "")
            if text not in ("0", "1"):
                raise UsageError(f"{tables[0]}: {name or 'a row'} has the label {text!r}; 1 (fake) or 0 was expected")
            inside = next((d for d in ("videos", "test_videos") if (folder / d).is_dir()), "")
            file = _relative(root, folder / inside / _safe(name, tables[0]))
            videos.append(Video(file, int(text), "DFDC" if text == "1" else REAL, "test"))
    if not videos:
        raise UsageError(f"{root}: no dfdc_train_part_*/metadata.json there; is it the DFDC root?")
    published = {("test", REAL): 2500, ("test", "DFDC"): 2500} if "test" in splits else {}
    if {"train", "val"} <= set(splits):
        total = sum(video.split != "test" for video in videos)
        if total != 119_154:
            problems.append(Problem("counts", f"{total} training videos, published are 119154"))
    manifest = _only(Manifest(root, videos, "dfdc"), source, ("test",))
    return audit(manifest, published, source.allow, problems)


def read_dfdc_preview(root: Path, source: Source) -> Manifest:
    """DFDC preview: dataset.json with the official train and test sets; a tenth of the train people is val."""
    videos, straddling = [], 0
    path = root / "dataset.json"
    for name, row in _object(path).items():
        label = {"real": 0, "fake": 1}.get(str(row.get("label")))
        if label is None or row.get("set") not in ("train", "test"):
            raise UsageError(f"{path}: {name} needs a label (real, fake) and a set (train, test)")
        people = tuple(dict.fromkeys(str(row[k]) for k in ("target_id", "swapped_id") if row.get(k)))
        split = row["set"]
        if split == "train":
            sides = {_carve(person, 10) for person in people or (name,)}
            if len(sides) > 1:
                straddling += 1
                continue
            split = sides.pop()
        file = _safe(name, path)
        videos.append(Video(file, label, file.split("/")[0] if label else REAL, split, people))
    notes = [f"{straddling} videos left out: their people are in both train and val"] if straddling else []
    return audit(_only(Manifest(root, videos, "dfdc-preview", notes=notes), source), {}, source.allow)


def read_deeperforensics(root: Path, source: Source) -> Manifest:
    """DeeperForensics-1.0; its reals are the FF++ c23 targets with the same first three digits, perturbed alike.

    Which perturbation a fake of a distorted variant got is drawn by DeeperForensics' authors; a real gets one drawn
    by the same rule (types and level of the variant) from its own name.
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
            names = _text(path).split()
            if not names:
                raise UsageError(f"{path}: lists no video")
            for line in names:
                name = _safe(line.removesuffix(".mp4"), path)
                target, _, actor = name.partition("_")
                if not re.fullmatch(r"\d{3}", target) or not actor:
                    raise UsageError(f"{path}: {line!r} is not named TTT_<actor>.mp4")
                real = (source.ffpp / f"original_sequences/youtube/c23/videos/{target}.mp4").absolute().as_posix()
                drawn = perturbations(variant, target)
                row = Video(real, 0, REAL, split, (target,), "c23", corruptions=drawn)
                if row not in shared:  # by variants without perturbations, and by chance
                    videos.append(row)
                shared.add(row)
                fake = f"manipulated_videos/{variant}/{name}.mp4"
                videos.append(Video(fake, 1, variant, split, (target, actor), "c23", target="" if drawn else real))
    sizes = {"train": 703, "val": 96, "test": 201}
    published = {(split, variant): sizes[split] for split in source.splits or SPLITS for variant in source.variants}
    return audit(_only(Manifest(root, videos, "deeperforensics"), source), published, source.allow)


def perturbations(variant: str, name: str) -> tuple[tuple[str, int], ...]:
    """The (perturbation, level) list that a DeeperForensics variant gives to the video ``name``."""
    rng = np.random.default_rng((zlib.crc32(variant.encode()), zlib.crc32(name.encode())))
    if match := re.fullmatch(r"end_to_end_level_(\d)", variant):
        return ((str(rng.choice(PERTURBATIONS)), int(match[1])),)
    if variant == "end_to_end_random_level":
        return ((str(rng.choice(PERTURBATIONS)), int(rng.integers(1, 6))),)
    if match := re.fullmatch(r"end_to_end_mix_(\d)_distortions", variant):
        kinds = rng.choice(PERTURBATIONS, int(match[1]), replace=False)
        return tuple((str(kind), int(rng.integers(1, 6))) for kind in kinds)
    return ()


BENCH_METHODS = dict(zip(("FF-DF", "FF-F2F", "FF-FH", "FF-FS", "FF-NT"), FFPP_METHODS, strict=True))


def read_deepfakebench(root: Path, source: Source) -> Manifest:
    """DeepfakeBench's preprocessed faces: its JSON, frames in folders or in an LMDB, either path separator."""
    if source.lists is None or not source.lists.is_file():
        raise UsageError(f"--lists {source.lists}: name DeepfakeBench's JSON file of the dataset")
    videos = []
    for split, kind, name, row, compression in _bench_rows(source):
        listed: list[Any] = [row.get("frames"), row.get("masks") or []]
        if not listed[0] or not all(isinstance(paths, list) for paths in listed):
            raise UsageError(f"{source.lists}: video {name} of {kind} lists no frames")
        frames, masks = (tuple(_safe(path, source.lists) for path in paths) for paths in listed)
        fake = not kind.lower().endswith("real")
        pair = re.fullmatch(r"(\d{3})_(\d{3})|(id\d+)_(id\d+)_\d+", name)
        people = tuple(part for part in pair.groups() if part) if pair else ()
        mask = masks[0].rpartition("/")[0] if masks else ""
        method = BENCH_METHODS.get(kind, kind) if fake else REAL
        path = frames[0].rpartition("/")[0]
        videos.append(Video(path, int(fake), method, split, people, compression, mask, frames=frames))
    manifest = _only(Manifest(root, videos, "deepfakebench", crops=True, lmdb=source.lmdb), source)
    return audit(manifest, {}, source.allow, exists=_lmdb_holds(source.lmdb) if source.lmdb else None)


def _bench_rows(source: Source) -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """(split, label, video, row, compression) of DeepfakeBench's JSON."""
    path = source.lists
    assert path is not None
    for labels in _object(path).values():
        for kind, splits in labels.items():
            for split, rows in _items(splits, path):
                if split not in SPLITS:
                    raise UsageError(f"{path}: unknown split {split!r}")
                names = dict(_items(rows, path))
                compression = source.compression if source.compression in names else ""
                if not compression and names and set(names) <= {"raw", "c23", "c40"}:
                    raise UsageError(f"{path}: no {source.compression} of {kind}, only {', '.join(names)}")
                for name, row in _items(names[compression], path) if compression else names.items():
                    yield split, kind, name, dict(_items(row, path)), compression


def _items(value: Any, path: Path) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not DeepfakeBench's layout: {str(value)[:60]!r} where an object was expected")
    return value.items()


def read_folder(root: Path, source: Source = Source()) -> Manifest:
    """Any set laid out as <split>/<real or a forgery's name>/, holding videos, pictures or folders of pictures."""
    videos = []
    for split in SPLITS:
        for kind in sorted(p for p in (root / split).glob("*") if p.is_dir()):
            method = REAL if kind.name.lower() == REAL else kind.name
            for path, frames in _media(root, kind):
                videos.append(Video(path, int(method != REAL), method, split, frames=frames))
    if not videos:
        raise UsageError(
            f"{root}: no <split>/<real or a forgery's name>/ with media in it; splits are {', '.join(SPLITS)}"
        )
    return audit(_only(Manifest(root, videos, "folder"), source), {}, source.allow)


def read_reals(root: Path, source: Source = Source()) -> Manifest:
    """A folder of real faces or videos, eight tenths train, one val, one test by the file's (or its folder's) name."""
    videos = []
    for path, frames in _media(root, root):
        draw = zlib.crc32(path.encode()) % 10
        split = "val" if draw == 8 else "test" if draw == 9 else "train"
        videos.append(Video(path, 0, REAL, split, frames=frames))
    if not videos:
        raise UsageError(f"{root}: no pictures or videos in it")
    return audit(_only(Manifest(root, videos, "reals"), source), {}, source.allow)


READERS: dict[str, Callable[[Path, Source], Manifest]] = {
    "ffpp": read_ffpp,
    "dfd": read_dfd,
    "celebdf-v1": read_celebdf,
    "celebdf-v2": read_celebdf,
    "dfdc": read_dfdc,
    "dfdc-preview": read_dfdc_preview,
    "deeperforensics": read_deeperforensics,
    "deepfakebench": read_deepfakebench,
    "folder": read_folder,
    "reals": read_reals,
}


# ------------------------------------------------------------------------------------------------- what they share


def _only(manifest: Manifest, source: Source, default: tuple[str, ...] = SPLITS) -> Manifest:
    """The manifest's videos of the wanted splits and methods."""
    splits = source.splits or default
    known = {video.method for video in manifest.videos}
    if unknown := set(source.methods) - known:
        raise UsageError(
            f"{manifest.root}: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(known - {REAL}))}"
        )
    videos = [
        video
        for video in manifest.videos
        if video.split in splits and (not video.label or not source.methods or video.method in source.methods)
    ]
    return Manifest(manifest.root, videos, manifest.dataset, False, manifest.crops, manifest.lmdb, manifest.notes)


def _carve(key: str, parts: int) -> str:
    """val for about one key in ``parts``, train for the others; the same on every machine."""
    return "val" if zlib.crc32(key.encode()) % parts == 0 else "train"


def _safe(name: object, source: Path) -> str:
    """A relative path with forward slashes that stays inside the root."""
    path = name.replace("\\", "/").removeprefix("./") if isinstance(name, str) else ""
    parts = path.split("/")
    if (
        not path.isprintable()
        or ":" in path
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or len(path.encode()) > 1024
    ):
        raise UsageError(f"{source}: {str(name)[:80]!r} is no path inside the dataset")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the list cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error


def _object(path: Path) -> dict[str, dict[str, Any]]:
    """A JSON object whose values are objects."""
    rows = _json(path)
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise UsageError(f"{path}: an object of objects was expected, one for each video")
    return rows


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    try:
        return [{str(k): str(v) for k, v in row.items()} for row in csv.DictReader(_text(path).splitlines())]
    except csv.Error as error:
        raise UsageError(f"{path}: not a CSV table ({error})") from error


def _pairs(path: Path) -> list[tuple[str, str]]:
    rows = _json(path)
    pairs = []
    for row in rows if isinstance(rows, list) else []:
        ids = [_safe(i, path) for i in row] if isinstance(row, list) else []
        if len(ids) != 2 or any("/" in i for i in ids):
            raise UsageError(f"{path}: not a list of id pairs: {str(row)[:80]}")
        pairs.append((ids[0], ids[1]))
    if not pairs:
        raise UsageError(f"{path}: not a list of id pairs (it is empty, or no list)")
    return pairs


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _masks(root: Path, method: str) -> dict[str, str]:
    return {
        p.stem: _relative(root, p) for p in sorted((root / "manipulated_sequences" / method / "masks").rglob("*.mp4"))
    }


def _real_folder(root: Path, fake: Path) -> str:
    """Where the celebrity reals lie, given a fake's place: the mp4s are directly in the folder or under videos/."""
    return "Celeb-real/videos" if fake.parent.name == "videos" else "Celeb-real"


def _media(root: Path, folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, frames) of every video, loose picture, and folder of pictures below ``folder``."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES | VIDEOS and p.is_file())
    for parent, group in itertools.groupby(sorted(files, key=lambda p: (p.parent, p)), key=lambda p: p.parent):
        media = list(group)
        pictures = [p for p in media if p.suffix.lower() in IMAGES]
        for path in media:
            if path.suffix.lower() in VIDEOS:
                yield _relative(root, path), ()
            elif parent == folder:
                yield _relative(root, path), (_relative(root, path),)
        if pictures and parent != folder:
            yield _relative(root, parent), tuple(_relative(root, path) for path in pictures)


def _lmdb_holds(path: Path) -> Callable[[Video], bool]:
    from dtn_fast.data.frames import open_lmdb

    store = open_lmdb(path)

    def holds(video: Video) -> bool:
        return all(frame in store for frame in video.frames)

    return holds
