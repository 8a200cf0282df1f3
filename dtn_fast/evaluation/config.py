"""Settings of evaluation, robustness and figures."""

from __future__ import annotations

from dataclasses import dataclass

from dtn_fast.data.config import Split
from dtn_fast.data.corrupt import PERTURBATIONS, check
from dtn_fast.errors import UsageError

FIGURES = ("grad-cam", "attention", "scales", "collapse", "feature-maps", "t-sne", "soft-labels")


@dataclass(frozen=True)
class EvaluateConfig:
    """Split, threshold and confidence intervals of an evaluation."""

    split: Split = "test"
    """Split to measure."""
    threshold: float = 0.5
    """P(fake) at and above which a face or a video counts as fake: in accuracy, verdicts and spans."""
    bootstrap_draws: int = 1000
    """Number of bootstrap draws of videos for each confidence interval."""
    confidence: float = 0.95
    """Confidence level of the AUC's intervals."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: must be from 0 to 1")
        if self.bootstrap_draws < 1:
            raise UsageError(f"--bootstrap-draws {self.bootstrap_draws}: must be at least 1")
        if not 0 < self.confidence < 1:
            raise UsageError(f"--confidence {self.confidence}: must be between 0 and 1")


@dataclass(frozen=True)
class RobustnessConfig:
    """Corruptions and levels to measure."""

    kinds: tuple[str, ...] = (*("uniform_noise" if k == "gaussian_noise" else k for k in PERTURBATIONS), "jpeg")
    """Kinds of corruption.  Default: the paper's, which are DeeperForensics' seven, with uniform instead of Gaussian
    noise (the gate is trained with Gaussian noise), and JPEG."""
    levels: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Levels from 1 (mild) to 5 (strong); 0 is the untouched crops."""
    split: Split = EvaluateConfig.split
    """Split to measure."""
    seed: int = 0
    """Random seed of noise and blocks."""
    workers: int = 2
    """Number of threads that corrupt crops."""

    def __post_init__(self) -> None:
        for name in ("kinds", "levels"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UsageError(f"--{name} {' '.join(map(str, given))}: name at least one, and each once")
        for kind in self.kinds:
            for level in self.levels:
                check(kind, level)
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: must be at least 1")


@dataclass(frozen=True)
class FigureConfig:
    """Figures to draw, and the crops to draw them on."""

    kinds: tuple[str, ...] = FIGURES
    """Figures to draw."""
    split: Split = EvaluateConfig.split
    """Split of the crops."""
    count: int = 400
    """Number of crops in the t-SNE figure."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in FIGURES:
                raise UsageError(f"unknown figure {kind!r}; there are {', '.join(FIGURES)}")
        if self.count < 1:
            raise UsageError(f"--count {self.count}: must be at least 1")
