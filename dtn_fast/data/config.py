"""Settings of datasets, preparation, augmentation and the synthetic set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtn_fast.data.video_table import Allowance
from dtn_fast.errors import UsageError

PresetName = Literal["none", "light", "forensic"]


@dataclass(frozen=True)
class AugmentPreset:
    """Probability of each transform and the range that its strength is drawn from, uniformly; in this order."""

    flip: float = 0.5
    shift_scale_rotate: float = 0.5
    shift: float = 0.05
    """Largest shift over the side of the crop."""
    scale: float = 0.1
    """Largest change of size."""
    rotate: float = 10.0
    """Largest turn in degrees."""
    brightness_contrast: float = 0.5
    brightness: float = 0.2
    """Largest shift over 255."""
    contrast: float = 0.2
    """Largest change of the factor about mid-grey."""
    blur: float = 0.1
    sigma: tuple[float, float] = (0.3, 1.5)
    """Of the Gaussian, in pixels."""
    noise: float = 0.1
    std: tuple[float, float] = (0.01, 0.04)
    """Of Gaussian noise over 255."""
    compression: float = 0.5
    quality: tuple[int, int] = (40, 100)
    """Of JPEG, both included."""


PRESETS: dict[str, AugmentPreset] = {
    "light": AugmentPreset(
        shift_scale_rotate=0.0, brightness_contrast=0.3, brightness=0.1, contrast=0.1, blur=0.0,
        noise=0.1, std=(0.005, 0.02), compression=0.15, quality=(70, 100),
    ),
    "forensic": AugmentPreset(),
}  # fmt: skip
"""light: for clean, small sets; forensic: the field's usual, against compression and camera."""

MARGIN = 1.3
"""Side of the crop over the longest side of the detection, the habit of FaceForensics++."""


@dataclass(frozen=True)
class PrepareConfig:
    """How faces are found and cropped."""

    frames: int = 8
    """Frames per video, spread evenly."""
    margin: float = MARGIN
    """Side of the crop over the longest side of the face."""
    faces: Literal["largest", "all"] = "largest"
    """Which faces of a frame."""
    reuse_boxes: bool = False
    """Crop a fake where the face of its real is, when both have the same frames: no detection, aligned pairs."""
    every: int = 8
    """The whole frame is searched once in so many; between, only where the faces were.  1: always."""

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
