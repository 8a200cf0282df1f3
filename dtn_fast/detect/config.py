"""Settings of detection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dtn_fast.data.config import FinderConfig, PrepareConfig
from dtn_fast.ranges import Count, Natural, NotNegative, Range, Share, check_ranges


@dataclass(frozen=True)
class DetectConfig:
    """Frames to analyse, and limits of the verdict."""

    frames: Natural = 32
    """Frames per video, evenly spaced in time; 0: every frame."""
    rate: NotNegative = 0.0
    """Frames per second of video, instead of --frames; 0: use --frames."""
    threshold: Share | None = None
    """P(fake) at and above which the verdict is fake and a span counts as forged, in place of the model's own limits,
    between which it is uncertain.  Default: those of dtn-fast calibrate; 0.5 for a model that is not calibrated."""
    novelty: bool = True
    """Call an input uncertain that is unlike the training data; calibrated models recognise such."""
    min_frames: Natural = 3
    """Call a video uncertain whose verdict rests on fewer frames, unless fewer were analysed."""
    min_pixels: Natural = 40
    """Call an input uncertain whose face is narrower, in pixels."""
    max_lost: Share = 0.1
    """Share of a video's frames that may be damaged or missing; above it the verdict is uncertain, and counts as a
    failure."""
    every: Count = PrepareConfig.every
    """Search the whole image for faces in every N-th analysed frame, in between only near the faces found; yunet
    searches every frame."""
    finder: FinderConfig = field(default_factory=FinderConfig)
    """The face finder."""
    face_device: Literal["cpu", "cuda"] = "cpu"
    """Device that yunet searches on; cuda needs onnxruntime-gpu."""

    decoder: Literal["cpu", "gpu"] = "cpu"
    """Where videos are decoded.  gpu: by torchcodec, except those that are damaged, turned, HDR or of inexact times;
    its colours differ by a few levels."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def analysed(self) -> str:
        """The analysed frames of a video in words: ``32 frames``, ``5 frames per second`` or ``every frame``."""
        return (
            f"{self.rate:g} frames per second"
            if self.rate
            else f"{self.frames} frames"
            if self.frames
            else "every frame"
        )


@dataclass(frozen=True)
class BatchConfig:
    """Work on many inputs."""

    jobs: Annotated[int, Range(0, 1024)] = 0
    """Inputs judged at once; 0: one per core, up to 16.  The results are the same to the bit."""

    def __post_init__(self) -> None:
        check_ranges(self)
