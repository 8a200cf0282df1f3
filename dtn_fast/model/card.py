"""The model card: what a model was trained on, how well it did, and the limits between its verdicts.

Training and ``dtn-fast calibrate`` write it as card.json into the checkpoint's folder.  It is part of the model's
configuration, so that exported files and a server's repository carry it too.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from dtn_fast.dataclass_json import from_fields
from dtn_fast.errors import UsageError

CARD, CARD_PAGE = "card.json", "card.html"
CHANCE = 0.6
"""Validation AUC under which, or with an interval that reaches down to 0.5, a model counts as near chance."""


class _Checked:
    """Base class that decodes nested JSON objects and refuses values of another type: cards come with model files."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = _decoded(hint, getattr(self, name), name)
            if not _is(hint, value):
                raise UsageError(f"{type(self).__name__}.{name} is {str(value)[:60]!r}; it must be {_said(hint)}")
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class SplitCounts(_Checked):
    """Videos (or pictures) and crops of a split."""

    split: str
    reals: int
    fakes: int
    crops: int


@dataclass(frozen=True)
class OperatingPoint(_Checked):
    """Threshold for a wanted false-alarm rate."""

    false_alarms: float
    """Wanted share of reals called fake."""
    threshold: float | None
    """P(fake) from which an input is called fake; None: too few reals to say, fewer than 1 / rate - 1."""
    detected: float | None = None
    """Share of the fakes at or over the threshold."""
    low: float | None = None
    """Lower end of the 95 % interval of ``detected`` (Clopper and Pearson, 1934)."""
    high: float | None = None


@dataclass(frozen=True)
class Level(_Checked):
    """Calibration at one level: of single frames and pictures, or of videos."""

    frames: int
    """Median number of frames that a score is the mean of; 1: single frames."""
    reals: int
    """Number of real videos (or pictures) that the limits rest on."""
    fakes: int
    fake_from: float
    """P(fake) at and over which the verdict is fake; never under ``real_up_to``."""
    real_up_to: float
    """P(fake) at and under which the verdict is real; between the two it is uncertain."""
    false_alarms: float
    """Bound on the expected share of reals at or over ``fake_from``, one face track each."""
    false_alarms_high: float
    """Upper end of the 95 % interval of that share, given these reals."""
    misses: float
    """Bound on the expected share of fakes at or under ``real_up_to``."""
    ece: float
    """Expected calibration error (Guo et al., 2017), after the temperature."""
    ece_before: float
    brier: float
    """Brier score after the temperature, reals and fakes weighing the same."""
    brier_before: float
    bins: tuple[tuple[float, float, float], ...]
    """Reliability diagram: mean P(fake), share of fakes and share of the inputs in each bin that is not empty."""
    bins_before: tuple[tuple[float, float, float], ...]
    points: tuple[OperatingPoint, ...]
    curve: tuple[tuple[float, float, float], ...]
    """Thresholds, rising, with the share of reals and of fakes at or over each."""
    novel_from: float | None = None
    """Novelty over which an input is unlike the training data; None: the model does not measure it."""
    novel_rate: float | None = None
    """Bound on the expected share of inputs like the training data over ``novel_from``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (self.false_alarms, self.misses, self.ece, self.brier)
        if not self.real_up_to <= self.fake_from or not all(0 <= share <= 1 for share in shares):
            raise UsageError("Level: its limits cross, or a rate is not from 0 to 1")

    def false_alarms_at(self, threshold: float) -> float:
        """Bound on the expected share of reals at or over ``threshold``, from the validation reals there."""
        above = [rate for at, rate, _ in self.curve if at <= threshold]
        return (self.reals * (above[-1] if above else 1.0) + 1) / (self.reals + 1)


@dataclass(frozen=True)
class Measured(_Checked):
    """Verdicts by the limits on inputs that had no part in choosing them; each rate with its 95 % interval."""

    level: str
    """frame, video or clip (videos that the temporal head scores)."""
    reals: int
    fakes: int
    false_alarms: tuple[float, float, float] | None
    """Share of reals called fake, and its interval; None: no reals."""
    misses: tuple[float, float, float] | None
    """Share of fakes called real."""
    uncertain: tuple[float, float, float] | None
    """Share of all inputs of the split called uncertain, whatever the reason."""
    covered: tuple[float, float, float] | None
    """Share of all inputs whose verdict is not wrong."""
    novel: float | None = None
    """Share of all inputs found unlike the training data."""


@dataclass(frozen=True)
class Calibration(_Checked):
    """Temperature and limits, fitted on a validation split."""

    data: str
    """Folder of the crops."""
    fingerprint: str
    """Hash of the validation crops, as ``CropDataset.fingerprint`` makes it."""
    weights: str
    """Checksum of the weights that were calibrated; empty: unknown."""
    forgeries: tuple[str, ...]
    """Forgeries of the fakes."""
    temperature: float
    """Divisor of the logits before the softmax (Guo et al., 2017)."""
    frame: Level
    video: Level | None
    """Videos whose score is the mean of their frames'; None: the data holds pictures only."""
    measured: tuple[Measured, ...] = ()
    """The same limits tried on the test split; empty: it has none."""
    clip: Level | None = None
    """Videos that the temporal head scores; None: there is none."""
    clip_temperature: float = 1.0
    """Divisor of the logits of clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "clip_temperature"):
            if not 1e-3 <= getattr(self, name) <= 1e3:
                raise UsageError(f"Calibration.{name} is {getattr(self, name)}; it must be from 0.001 to 1000")

    def level(self, moving: bool, clips: bool = False) -> Level:
        """The level of a video or a picture; that of frames where there is no other.

        clips: whether a temporal head scores videos.  Raises UsageError when they were not calibrated so."""
        if moving and clips and self.clip is None:
            raise UsageError("the model was calibrated without the temporal head that scores its videos; run dtn-fast "
                             "calibrate")  # fmt: skip
        if moving and clips and self.clip is not None:
            return self.clip
        return self.video if moving and self.video is not None else self.frame


@dataclass(frozen=True)
class Card(_Checked):
    """Model card."""

    data: str
    """Folder of the training crops."""
    fingerprint: str
    """Hash of the training and validation crops, as a run's crops.json holds it."""
    synthetic: bool
    """Whether the faces are rendered."""
    splits: tuple[SplitCounts, ...]
    forgeries: tuple[str, ...]
    crop: str
    """How faces were cut, in words."""
    recipe: str
    """Losses, initial weights and augmentation in words."""
    corruptions: tuple[str, ...]
    """Kinds of corruption in the training augmentation or the training videos."""
    val_auc: float | None
    """Validation AUC of ``val_unit``; None: one class only."""
    val_auc_interval: tuple[float, float] | None
    """Its 95 % interval, by bootstrap over videos."""
    version: str
    """Version of this library."""
    commit: str
    """Commit of this library that trained the model."""
    calibration: Calibration | None = None
    """None: not calibrated, so that 0.5 stands for no false-alarm rate."""
    val_unit: str = "frames"
    """frames, or videos that the temporal head scores."""


def remarks(card: Card | None) -> list[str]:
    """Sentences that a person must read beside a verdict of this model; the notice on synthetic faces is not here."""
    if card is None:
        return ["no model card, so nothing is known of this model's training (dtn-fast calibrate writes one)"]
    found = []
    low = card.val_auc_interval[0] if card.val_auc_interval else 1.0
    if card.val_auc is not None and (card.val_auc < CHANCE or low <= 0.5):
        interval = f" ({low:.2f}-{card.val_auc_interval[1]:.2f})" if card.val_auc_interval else ""
        found.append(f"near chance: validation AUC {card.val_auc:.2f}{interval}, where 0.5 is guessing")
    if card.calibration is None:
        found.append("not calibrated: the threshold stands for no false-alarm rate (run dtn-fast calibrate)")
    return found


def temperature_of(card: Card | None) -> float:
    """The divisor of a model's logits; 1 for one that is not calibrated."""
    return card.calibration.temperature if card is not None and card.calibration is not None else 1.0


def measures_novelty(card: Card | None) -> bool:
    """Whether a model of this card has statistics of its training data, and its files an output ``novelty``."""
    return card is not None and card.calibration is not None and card.calibration.frame.novel_from is not None


# ------------------------------------------------------------------------------------------- types of JSON values


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _decoded(hint: Any, value: Any, name: str) -> Any:
    """``value`` with JSON lists as tuples and JSON objects as the dataclasses that ``hint`` names."""
    kinds = [kind for kind in _alternatives(hint) if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and kinds:
        return from_fields(kinds[0], value, name)  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        inner = next((get_args(kind)[0] for kind in _alternatives(hint) if get_origin(kind) is tuple), Any)
        return tuple(_decoded(inner, item, name) for item in value)
    return value


def _is(hint: Any, value: Any) -> bool:
    for kind in _alternatives(hint):
        arguments = get_args(kind)
        if get_origin(kind) is tuple:
            own = arguments[:1] * len(value) if isinstance(value, tuple) and arguments[-1] is ... else arguments
            if isinstance(value, tuple) and len(own) == len(value) and all(map(_is, own, value)):
                return True
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return True
        elif kind is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(value, kind):
            return True
    return False


def _said(hint: Any) -> str:
    return str(hint).replace("dtn_fast.model.card.", "") if get_args(hint) else hint.__name__
