"""Settings of datasets, preparation, augmentation and the synthetic set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from dtn_fast.data.video_table import Allowance
from dtn_fast.errors import UsageError
from dtn_fast.model.config import MAX_MARGIN, Alignment, CropPolicy, FinderName
from dtn_fast.ranges import Count, Positive, Range, Seed, Workers, check_ranges

AugmentName = Literal["none", "light", "forensic", "geometry"]


@dataclass(frozen=True)
class AugmentPreset:
    """Training augmentation: the probability of each transform, and the range its strength is drawn from uniformly."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    shift_scale_rotate: float = 0.5
    """Probability of an affine transform, with the three ranges below."""
    shift: float = 0.05
    """Largest shift, as a fraction of the crop's side."""
    scale: float = 0.1
    """Largest relative change of size."""
    rotate: float = 10.0
    """Largest rotation in degrees."""
    brightness_contrast: float = 0.5
    """Probability of a change of brightness and contrast."""
    brightness: float = 0.2
    """Largest change of brightness, as a fraction of 255."""
    contrast: float = 0.2
    """Largest deviation from 1 of the factor that multiplies the pixels."""
    blur: float = 0.1
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.3, 1.5)
    """Range of the Gaussian kernel's standard deviation, in pixels."""
    noise: float = 0.1
    """Probability of Gaussian noise."""
    std: tuple[float, float] = (0.01, 0.04)
    """Range of the Gaussian noise's standard deviation, as a fraction of 255."""
    compression: float = 0.5
    """Probability of JPEG compression."""
    quality: tuple[int, int] = (40, 100)
    """Range of the JPEG quality, both ends included."""

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Kinds of corruption (:mod:`dtn_fast.data.corrupt`) that share a transform with the preset.  Gaussian noise on
        pixels counts for uniform noise too, which differs in its distribution alone."""
        shared = (
            (self.brightness_contrast, ("contrast",)),
            (self.noise, ("gaussian_noise", "uniform_noise")),
            (self.blur, ("blur",)),
            (self.compression, ("jpeg",)),
        )
        return tuple(kind for probability, kinds in shared if probability for kind in kinds)


NO_AUGMENTATION = AugmentPreset(
    flip=0.0, shift_scale_rotate=0.0, brightness_contrast=0.0, blur=0.0, noise=0.0, compression=0.0
)
AUGMENTATIONS: dict[str, AugmentPreset] = {
    "light": AugmentPreset(
        shift_scale_rotate=0.0, brightness_contrast=0.3, brightness=0.1, contrast=0.1, blur=0.0,
        noise=0.1, std=(0.005, 0.02), compression=0.15, quality=(70, 100),
    ),
    "forensic": AugmentPreset(),
    "geometry": AugmentPreset(brightness_contrast=0.0, blur=0.0, noise=0.0, compression=0.0),
}  # fmt: skip
"""Presets by name: ``light`` for small, clean datasets; ``forensic`` adds affine transforms and blur, with more noise
and stronger JPEG compression; ``geometry`` flips, shifts, scales and rotates alone.

The paper names Albumentations but no transform, measures "various unseen corruptions" (Figure 5), and gives as examples
of augmentation "rotation, flipping, scaling, etc." (section 6): ``geometry`` is these, and shares nothing with a
corruption but the slight smoothing of bilinear interpolation."""
SELF_BLEND_CORRUPTIONS = ("saturation", "contrast", "pixelation")
"""Kinds of corruption that share a transform with the recolouring of self-blended crops (data/blend.py)."""


def trained_corruptions(augment: str, self_blend: bool) -> set[str]:
    """Kinds of corruption that training with these options shows to a model."""
    kinds = {*AUGMENTATIONS[augment].corruptions} if augment in AUGMENTATIONS else set()
    return kinds | {*SELF_BLEND_CORRUPTIONS} if self_blend else kinds


def turned_more(preset: AugmentPreset | None) -> AugmentPreset:
    """``preset`` with more "rotation, flipping, scaling", as the paper's conclusion has it, for ambiguous crops
    (*choice* of the amounts)."""
    return replace(preset or NO_AUGMENTATION, flip=0.5, shift_scale_rotate=1.0, scale=0.2, rotate=20.0)


@dataclass(frozen=True)
class FinderConfig:
    """The face finder, and the faces it looks for."""

    faces: FinderName | None = None
    """Face finder.  dlib: the paper's HOG, for upright faces; yunet: OpenCV's FaceDetectorYN, which also finds small,
    turned and half hidden faces, and five landmarks, in a tenth of the time; dlib-cnn: dlib's MMOD network, slow on a
    CPU.  Default: the one that the model's crops were cut with, and dlib for new crops."""
    face_model: Path | None = None
    """The finder's model file.  yunet: fetched once from the Hugging Face hub when left out; dlib-cnn:
    mmod_human_face_detector.dat, needed; dlib: none."""
    landmark_model: Path | None = None
    """A shape predictor of dlib (5, 68 or more points), whose landmarks are kept in place of the finder's."""
    min_face: Positive = 0.037
    """Side of the smallest face to find: in pixels, or below 1 as a fraction of the frame's shorter side but at least
    40 pixels.  The default is 40 pixels in frames of up to 1920x1080.  Frames are searched at 12 million pixels at
    most: at 3840x2160 dlib finds faces from 75 pixels, at 7680x4320 from 150."""
    turned: bool = False
    """Always search the frame turned by every 45 degrees too, for lying heads; without it, only a frame in which
    nothing was found."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class PrepareConfig:
    """Settings for finding and cropping faces."""

    frames: Count = 32
    """Number of frames per video, evenly spaced in time (*choice*: the paper states none; 32 are DeepfakeBench's)."""
    finder: FinderConfig = FinderConfig()
    """The face finder."""
    margin: Annotated[float, Range(above=0, high=MAX_MARGIN)] = CropPolicy.margin
    """Side of the crop divided by the side of the face; stored with every model trained on the crops."""
    align: Alignment = CropPolicy.align
    """landmarks: turn each crop so that the eyes are level (needs landmarks); none: crop upright in the frame."""
    people: Literal["one", "all"] = "one"
    """Faces to crop in each frame: one or all.  One is the largest, or in a fake with a mask the face that the mask
    touches; with all, the faces that the mask leaves alone are left out, as they are no fakes."""
    masks: bool = True
    """Store the mask of each crop, one bit a pixel, where the dataset has masks: ``dtn-fast train --mask-weight``
    learns from them, ``evaluate`` and ``explain`` measure by them."""
    reuse_boxes: bool = False
    """Crop each fake at the face boxes of the real video that it was made from, where both have the same frames:
    faster, and each fake crop is aligned with its real crop."""
    every: Count = 8
    """Search the whole image for faces in every N-th frame, and in between only near the faces already found."""

    def __post_init__(self) -> None:
        check_ranges(self)
        policy = self.policy
        if policy.align == "landmarks" and policy.finder != "yunet" and self.finder.landmark_model is None:
            raise UsageError("--align landmarks: needs landmarks; add --faces yunet or --landmark-model FILE")

    @property
    def policy(self) -> CropPolicy:
        """How the crops are cut."""
        return CropPolicy(self.finder.faces or CropPolicy.finder, self.margin, self.align)


Dataset = Literal[
    "ffpp", "dfd", "celebdf-v1", "celebdf-v2", "dfdc", "dfdc-preview", "deeperforensics", "deepfakebench", "aiface",
    "deepfake-eval-2024", "fakeavceleb", "folder", "reals",
]  # fmt: skip
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Source:
    """The dataset in a folder, and the part of it to read."""

    dataset: Dataset = "ffpp"
    """Layout of the dataset.  folder: <split>/<real or a forgery's name>/ with videos, pictures or folders of pictures,
    or without <split>/, divided by --split.  reals: any folder of real faces or videos, divided by file name, or by
    folder for pictures in folders; one folder for each person keeps each person in one split."""
    splits: tuple[Split, ...] = ()
    """Splits to read.  Default: all, but only test for Celeb-DF, DFD and DFDC, as the protocols never train on them."""
    split: str = "80/10/10"
    """Percent that are train, val and test of a folder without split folders, of reals, and of FakeAVCeleb's people.
    All of a person's folder (the one directly in the class folder, of the same name for reals and forgeries), and equal
    files, go to one."""
    methods: tuple[str, ...] = ()
    """Forgeries to read.  Default: all that the dataset contains."""
    compression: str = "c23"
    """Compression level to read (raw, c23 or c40) of a dataset that comes in several."""
    lists: Path | None = None
    """Folder of FF++'s train.json, val.json and test.json (default: ROOT/splits, or else ROOT), or DeepfakeBench's JSON
    file of the dataset, or a folder of such files that are read together, as DF40 has them (default: the only file in
    ROOT or its dataset_json)."""
    root_map: tuple[str, ...] = ()
    """Pairs OLD=NEW for the lists of DeepfakeBench and AI-Face: paths that begin with the folder OLD, such as /data or
    C:/data, are in the folder NEW, which is below ROOT (. for ROOT itself) or an absolute path."""
    ffpp: Path | None = None
    """Root folder of FaceForensics++, whose real videos are the reals of DeeperForensics."""
    variants: tuple[str, ...] = ("end_to_end_random_level",)
    """Folders to read of DeeperForensics' eleven; the reals get the perturbations of their fakes.  Default: each video
    with a perturbation of random type and level, because the paper calls the set "a challenging benchmark since
    extensive real-world perturbations are applied" (section 5.3; *choice* among its nine perturbed folders).
    end_to_end is the clean one."""
    corrupt: tuple[str, ...] = ()
    """Corruptions to apply to whole videos before their faces are found, each at all --corrupt-levels, for dtn-fast
    robustness --videos; such as video, which codes them anew with H.264 (Figure 5: "video compression controls the
    compression quality of the video via the constant rate factor [30, 32, 35, 38, 40]").  Default: none."""
    corrupt_levels: Annotated[tuple[int, ...], Range(1, 5)] = (1, 2, 3, 4, 5)
    """Levels of --corrupt."""
    lmdb: Path | None = None
    """DeepfakeBench's LMDB with the frames; default: the frames are files."""
    allow: tuple[Allowance, ...] = ()
    """Audit findings to accept: counts (an incomplete download), leaks (identities shared between splits)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        parts = self.split.split("/")
        if len(parts) != 3 or not all(map(str.isdecimal, parts)) or sum(self.shares) != 100:
            raise UsageError(f"--split {self.split}: percent of train, val and test were expected, such as 80/10/10")

    @property
    def shares(self) -> tuple[int, int, int]:
        """Percent of train, val and test."""
        train, val, test = map(int, self.split.split("/"))
        return train, val, test


@dataclass(frozen=True)
class WorkConfig:
    """Distribution of the work of preparing a dataset; it does not change the result."""

    workers: Workers = 2
    """Number of worker processes."""
    share: str = "1/1"
    """Worker share i/n: make every n-th shard file, beginning with the i-th, such as 3/8 on the third of eight
    machines.  The share that finishes last writes the index."""
    verify: bool = False
    """Compare the checksums of existing shard files, and make damaged ones again."""

    def __post_init__(self) -> None:
        check_ranges(self)
        number, slash, total = self.share.partition("/")
        if not (slash and number.isdecimal() and total.isdecimal()):
            raise UsageError(f"--share {self.share}: i/n was expected, for example 1/4")
        if not 1 <= int(number) <= int(total):
            raise UsageError(f"--share {self.share}: i must be between 1 and n")

    @property
    def place(self) -> tuple[int, int]:
        """The share as (number from 0, number of shares)."""
        number, _, total = self.share.partition("/")
        return int(number) - 1, int(total)


@dataclass(frozen=True)
class SyntheticConfig:
    """Size of the synthetic demo set."""

    train: Annotated[int, Range(2, 1000)] = 56
    """Number of training identities (even, because they are paired)."""
    val: Annotated[int, Range(2, 1000)] = 14
    """Number of validation identities (even)."""
    test: Annotated[int, Range(2, 1000)] = 20
    """Number of test identities (even)."""
    frames: Count = 10
    """Number of frames per video, at 5 frames/s."""
    size: Annotated[int, Range(64, 4096)] = 256
    """Side of the square frames in pixels."""
    seed: Seed = 0
    """Random seed of the faces and forgeries."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("train", "val", "test", "size"):
            if getattr(self, name) % 2:
                raise UsageError(f"--{name} {getattr(self, name)}: must be an even number")
