"""Settings of detection."""

from __future__ import annotations

from dataclasses import dataclass

from dtn_fast.data.config import PrepareConfig
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig


@dataclass(frozen=True)
class DetectConfig:
    """Which frames are looked at, and what counts as fake."""

    frames: int = 32
    """Frames per video, evenly spaced; 0: every frame."""
    rate: float = 0.0
    """Frames per second of video instead; 0: as --frames says."""
    threshold: float = EvaluateConfig.threshold
    """P(fake) at and above which the verdict is fake and a span counts as forged."""
    every: int = PrepareConfig.every
    """Search the whole frame for faces in every N-th frame, and in between only near the faces found before."""

    def __post_init__(self) -> None:
        if self.frames < 0 or not self.rate >= 0:
            raise UsageError(f"--frames {self.frames}, --rate {self.rate}: not below 0")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: from 0 to 1")
        if self.every < 1:
            raise UsageError(f"--every {self.every}: at least 1")
