"""Settings of detection."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtn_fast.data.config import FinderConfig, PrepareConfig
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig


@dataclass(frozen=True)
class DetectConfig:
    """Frames to analyse, and threshold of the verdict."""

    frames: int = 32
    """Frames per video, evenly spaced; 0: every frame."""
    rate: float = 0.0
    """Frames per second of video, instead of --frames; 0: use --frames."""
    threshold: float = EvaluateConfig.threshold
    """P(fake) at and above which the verdict is fake and a span counts as forged."""
    max_lost: float = 0.1
    """Share of a video's frames that may be damaged or missing; above it the verdict, on the rest, counts as a
    failure."""
    every: int = PrepareConfig.every
    """Search the whole image for faces in every N-th analysed frame, in between only near the faces found; yunet
    searches every frame."""
    finder: FinderConfig = field(default_factory=FinderConfig)
    """The face finder."""

    def __post_init__(self) -> None:
        if self.frames < 0 or not self.rate >= 0:
            raise UsageError(f"--frames {self.frames}, --rate {self.rate}: must not be below 0")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: must be from 0 to 1")
        if not 0 <= self.max_lost <= 1:
            raise UsageError(f"--max-lost {self.max_lost}: must be from 0 to 1")
        if self.every < 1:
            raise UsageError(f"--every {self.every}: must be at least 1")

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
