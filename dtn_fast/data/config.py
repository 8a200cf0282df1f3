"""Settings of datasets, preparation, augmentation and the synthetic set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtn_fast.data.video_table import Allowance
from dtn_fast.errors import UsageError
from dtn_fast.model.config import DTNConfig

AugmentName = Literal["none", "light", "forensic"]


@dataclass(frozen=True)
class AugmentPreset:
    """Training augmentation: each transform's probability, and the range of its strength, drawn uniformly."""

    flip: float = 0.5
    """Probability of a horizontal flip."""
    shift_scale_rotate: float = 0.5
    """Probability of an affine transform, with the three ranges below."""
    shift: float = 0.05
    """Largest shift over the side of the crop."""
    scale: float = 0.1
    """Largest change of size."""
    rotate: float = 10.0
    """Largest rotation in degrees."""
    brightness_contrast: float = 0.5
    """Probability of a change of brightness and contrast."""
    brightness: float = 0.2
    """Largest shift over 255."""
    contrast: float = 0.2
    """Largest change of the factor about mid-grey."""
    blur: float = 0.1
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.3, 1.5)
    """Range of the Gaussian kernel's standard deviation, in pixels."""
    noise: float = 0.1
    """Probability of Gaussian noise."""
    std: tuple[float, float] = (0.01, 0.04)
    """Range of the Gaussian noise's standard deviation, over 255."""
    compression: float = 0.5
    """Probability of JPEG compression."""
    quality: tuple[int, int] = (40, 100)
    """Range of the JPEG quality, both ends included."""


AUGMENTATIONS: dict[str, AugmentPreset] = {
    "light": AugmentPreset(
        shift_scale_rotate=0.0, brightness_contrast=0.3, brightness=0.1, contrast=0.1, blur=0.0,
        noise=0.1, std=(0.005, 0.02), compression=0.15, quality=(70, 100),
    ),
    "forensic": AugmentPreset(),
}  # fmt: skip
"""Augmentation by name: ``light`` for small, clean sets; ``forensic`` adds blur, noise and strong JPEG."""


@dataclass(frozen=True)
class PrepareConfig:
    """How faces are found and cropped."""

    frames: int = 8
    """Frames per video, evenly spaced."""
    margin: float = DTNConfig.margin
    """Side of the crop over the longest side of the face; models trained on the crops remember it."""
    faces: Literal["largest", "all"] = "largest"
    """Which faces of a frame."""
    reuse_boxes: bool = False
    """Crop a fake at its real's face boxes where both have the same frames: faster, and the pairs are aligned."""
    every: int = 8
    """Search the whole frame for faces in every N-th frame, and in between only near the faces found before."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.every < 1 or not self.margin > 0:
            raise UsageError("--frames and --every must be at least 1, --margin above 0")


Dataset = Literal[
    "ffpp", "dfd", "celebdf-v1", "celebdf-v2", "dfdc", "dfdc-preview", "deeperforensics", "deepfakebench", "folder",
    "reals",
]  # fmt: skip
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Source:
    """Which dataset lies at the root, and which part of it is wanted."""

    dataset: Dataset = "ffpp"
    """Its layout.  folder: <split>/<real or a forgery's name>/ of videos, pictures or folders of pictures; reals: any
    folder of real faces or videos, split by file name, or by folder where pictures lie in folders: one for each person
    keeps people out of two splits."""
    splits: tuple[Split, ...] = ()
    """Splits to read.  Default: all; of Celeb-DF, DFD and DFDC only test, since the protocols never train on them."""
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


@dataclass(frozen=True)
class WorkConfig:
    """How the work of preparing a dataset is spread; it changes nothing in the result."""

    workers: int = 2
    """Worker processes."""
    share: str = "1/1"
    """Worker share i/n: do every n-th shard of the work, beginning with the i-th, such as 3/8 on the third of eight
    machines.  Whichever share ends last writes the index."""
    verify: bool = False
    """Compare the checksums of shards that are already there, and make damaged ones again."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")
        number, slash, total = self.share.partition("/")
        if not (slash and number.isdecimal() and total.isdecimal()):
            raise UsageError(f"--share {self.share}: i/n was expected, for example 1/4")
        if not 1 <= int(number) <= int(total):
            raise UsageError(f"--share {self.share}: the first number runs from 1 to the second")

    @property
    def place(self) -> tuple[int, int]:
        """The share as (number from 0, total)."""
        number, _, total = self.share.partition("/")
        return int(number) - 1, int(total)


@dataclass(frozen=True)
class SyntheticConfig:
    """Size of the demo set."""

    train: int = 56
    """Training identities (an even number: they are paired)."""
    val: int = 14
    """Validation identities."""
    test: int = 20
    """Test identities."""
    frames: int = 10
    """Frames per video, at ``FPS`` frames/s."""
    size: int = 256
    """Side of the square frames in pixels."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                raise UsageError(f"SyntheticConfig.{name} is {value}; identities come in pairs: an even number >= 2")
        if self.frames < 1 or self.size < 64 or self.size % 2:
            raise UsageError("SyntheticConfig: frames must be >= 1 and size an even number >= 64")
