"""The limits between the verdicts: the model's own, from its card, or a threshold that the user names."""

from __future__ import annotations

from typing import Any, NamedTuple

from dtn_fast.detect.config import DetectConfig
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.model.card import Card


class Limits(NamedTuple):
    """Limits of P(fake) and of novelty for one kind of input: single frames and pictures, or videos."""

    fake_from: float
    """P(fake) at and over which the verdict is fake."""
    real_up_to: float
    """P(fake) at and under which the verdict is real, unless it is fake; between the two it is uncertain."""
    false_alarms: float | None = None
    """Expected share of real faces' tracks at or over ``fake_from``; None: the model is not calibrated."""
    reals: int | None = None
    """Number of real inputs that this expectation rests on."""
    frames: int = 1
    """Number of frames that the scores behind these limits are means of."""
    novel_from: float | None = None
    """Novelty over which an input is unlike the training data; None: not looked at."""

    def verdict(self, score: float) -> str:
        """``fake``, ``real`` or ``uncertain``."""
        return "fake" if score >= self.fake_from else "real" if score <= self.real_up_to else "uncertain"

    def __str__(self) -> str:
        expected = ""
        if self.false_alarms is not None:
            expected = f" (expected false alarms {self.false_alarms:.1%} per person, on {self.reals} reals)"
        low = f", real up to {self.real_up_to:.3f}" if self.real_up_to < self.fake_from else ""
        return f"fake from P(fake) {self.fake_from:.3f}{expected}{low}"

    def stricter(self, other: Limits) -> Limits:
        """These limits with the higher and the lower of both; between them more is uncertain."""
        both = [limits.novel_from for limits in (self, other) if limits.novel_from is not None]
        return self._replace(
            fake_from=max(self.fake_from, other.fake_from), real_up_to=min(self.real_up_to, other.real_up_to),
            novel_from=max(both) if both else None,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


EVEN = Limits(EvaluateConfig.threshold, EvaluateConfig.threshold)
"""Limits of a model that is not calibrated."""


def limits_of(card: Card | None, config: DetectConfig, moving: bool, clips: bool = False) -> Limits:
    """The limits for videos (``moving``) or for single frames: --threshold if it is given, else those of the model's
    calibration, else 0.5.

    clips: whether a temporal head scores videos.  Raises UsageError when the calibration is of videos without it."""
    calibration = card.calibration if card is not None else None
    if calibration is None:
        return EVEN if config.threshold is None else Limits(config.threshold, config.threshold)
    level = calibration.level(moving, clips)
    novel = level.novel_from if config.novelty else None
    if config.threshold is None:
        return Limits(level.fake_from, level.real_up_to, level.false_alarms, level.reals, level.frames, novel)
    expected = level.false_alarms_at(config.threshold)
    return Limits(config.threshold, config.threshold, expected, level.reals, level.frames, novel)
