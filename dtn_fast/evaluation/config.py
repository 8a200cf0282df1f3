"""Settings of evaluation, robustness and figures."""

from __future__ import annotations

from dataclasses import dataclass

from dtn_fast.data.config import Split
from dtn_fast.data.corrupt import PERTURBATIONS, check
from dtn_fast.errors import UsageError

FIGURES = ("grad-cam", "attention", "scales", "collapse", "feature-maps", "t-sne", "soft-labels")


@dataclass(frozen=True)
class EvaluateConfig:
    """How scores become metrics."""

    split: Split = "test"
    """Split of the crops."""
    threshold: float = 0.5
    """P(fake) at and above which a face or a video counts as fake: in accuracy, verdicts and spans."""
    bootstrap_draws: int = 1000
    """Bootstrap draws of videos behind each interval."""
    confidence: float = 0.95
    """Share of the draws that an interval of the AUC holds."""


@dataclass(frozen=True)
class RobustnessConfig:
    """Which corruptions are measured."""

    kinds: tuple[str, ...] = (*("uniform_noise" if k == "gaussian_noise" else k for k in PERTURBATIONS), "jpeg")
    """Corruptions.  Default: the paper's, which are DeeperForensics' seven with uniform in place of Gaussian noise
    (its gate is trained on that), and JPEG."""
    levels: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Levels, 1 to 5 from mild to strong; 0 is the untouched crops."""
    split: Split = EvaluateConfig.split
    """Split of the crops."""
    seed: int = 0
    """Seed of noise and blocks."""
    workers: int = 2
    """Threads that corrupt crops."""

    def __post_init__(self) -> None:
        for name in ("kinds", "levels"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise UsageError(f"--{name} {' '.join(map(str, given))}: name at least one, and each once")
        for kind in self.kinds:
            for level in self.levels:
                check(kind, level)
        if self.workers < 1:
            raise UsageError(f"--workers {self.workers}: at least 1")


@dataclass(frozen=True)
class FigureConfig:
    """Which figures of trained models are drawn, and on which crops."""

    kinds: tuple[str, ...] = FIGURES
    """Figures to draw."""
    split: Split = EvaluateConfig.split
    """Split of the crops."""
    count: int = 400
    """Crops in the t-SNE."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in FIGURES:
                raise UsageError(f"unknown figure {kind!r}; there are {', '.join(FIGURES)}")
        if self.count < 1:
            raise UsageError(f"--count {self.count}: at least 1")
