"""The verdict on an input: scored faces are grouped into people and forged spans, and their scores aggregated."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box
from dtn_fast.data.finder_base import MAX_FACES
from dtn_fast.data.video import Reading
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.limits import EVEN, Limits, limits_of
from dtn_fast.detect.regions import Region
from dtn_fast.errors import one_line
from dtn_fast.model.card import Card
from dtn_fast.model.detector import Depth

RULE = (
    "person score = mean P(fake) over the frames with that person's face; input score = the highest person score among "
    "people seen in at least a tenth of the frames with a face; if nobody is, the mean over frames of each frame's "
    "highest score"
)
CLIP_RULE = "a person's score in a video is the temporal head's: the mean P(fake) of the clips of the person's frames"
"""Rule of models with a temporal head, beside RULE."""


def rule_of(clips: bool) -> str:
    """The rule of aggregation in words; ``clips``: whether a temporal head scores videos."""
    return f"{RULE}; {CLIP_RULE}" if clips else RULE


class Face(NamedTuple):
    box: Box
    score: float
    person: int = 0
    """Number of the person's track in this input, from 0."""
    novelty: float | None = None
    """Distance from the training data, about 1 for faces like it; None: the model does not measure it."""
    regions: tuple[Region, ...] | None = None
    """Outlines of the forged regions in pixels of the frame; None: the face is not called fake, or the model has no
    mask head."""

    def to_json(self) -> dict[str, Any]:
        regions = None if self.regions is None else [region.tolist() for region in self.regions]
        return {**self._asdict(), "box": list(self.box), "regions": regions}


class FrameResult(NamedTuple):
    number: int
    seconds: float
    faces: list[Face]
    place: int = 0
    """Place among the analysed frames, of which those without a face have no result."""

    @property
    def score(self) -> float:
        return max(face.score for face in self.faces)


class Span(NamedTuple):
    """A stretch of a video in which a person's score is at or over the threshold.

    Between two analysed frames that do not follow each other directly, it begins or ends in the middle.
    """

    start: float
    """Start in seconds from the first frame."""
    end: float
    score: float
    """Mean P(fake) over its frames."""

    def to_json(self) -> dict[str, float]:
        return {"start": round(self.start, 3), "end": round(self.end, 3), "score": self.score}


class Person(NamedTuple):
    number: int
    score: float
    frames: int
    """Number of frames in which the person's face was found."""
    spans: list[Span]


class Picture(NamedTuple):
    """A face kept for the report."""

    number: int
    seconds: float
    score: float
    crop: NDArray[np.uint8]
    heat: NDArray[np.float32] | None = None
    """Heat map [S, S] of the class fake, in [0, 1]."""
    heat_depth: Depth | Literal["mask head"] | None = None
    """Place in the model that the heat map is from."""
    heat_reason: str = ""
    """Why there is no heat map; empty with one."""
    mask: NDArray[np.float32] | None = None
    """P(forged) of the crop's pixels [m, m]; None: the model has no mask head."""

    def to_json(self) -> dict[str, Any]:
        """All but the images."""
        return {name: value for name, value in self._asdict().items() if name not in ("crop", "heat", "mask")}


@dataclass
class Timing:
    """Seconds of work in each stage, and seconds elapsed in total (``wall``); the stages overlap."""

    decode: float = 0.0
    find_faces: float = 0.0
    score: float = 0.0
    wall: float = 0.0

    def shares(self) -> str:
        """Each stage's share of the work as text, in percent."""
        total = self.decode + self.find_faces + self.score or 1.0
        parts = (("decoding", self.decode), ("finding faces", self.find_faces), ("scoring", self.score))
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts)

    def add(self, other: Timing) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Result:
    """Result of one input."""

    path: Path
    verdict: str = "failed"
    """``fake``, ``real``, ``uncertain``, ``no face`` or ``failed``."""
    reasons: list[str] = field(default_factory=list)
    """Reasons why the verdict is uncertain."""
    score: float | None = None
    novelty: float | None = None
    """Mean novelty of the faces that decide the score; None: not measured."""
    limits: Limits = EVEN
    """Limits between the verdicts on this input."""
    frame_limits: Limits = EVEN
    """Limits between the verdicts on a single frame."""
    frames_read: int = 0
    reading: Reading = field(default_factory=Reading)
    """Count of the frames asked for, lost and missing."""
    crowded: int = 0
    """Number of frames with more faces than are judged, of which the largest were."""
    analysed: list[tuple[float, float]] = field(default_factory=list)
    """Seconds at which each analysed frame appears and ends."""
    frames: list[FrameResult] = field(default_factory=list)
    """The frames with at least one face."""
    people: list[Person] = field(default_factory=list)
    """People, highest score first."""
    clips: dict[int, float] = field(default_factory=dict)
    """Each person's score by the temporal head, by number; empty: frames alone are scored."""
    pace: str = ""
    """That the frames follow each other otherwise than in the training of the temporal head; empty: they do not."""
    pictures: list[Picture] = field(default_factory=list)
    whole: NDArray[np.uint8] | None = None
    """A still picture [H, W, 3] with its faces framed; None: a video."""
    error: str | None = None
    timing: Timing = field(default_factory=Timing)

    @property
    def ok(self) -> bool:
        return self.score is not None

    @property
    def moving(self) -> bool:
        """Whether the input is a video or moving picture."""
        return self.reading.seconds > 0

    @property
    def name(self) -> str:
        """The path in one line, as tables and pages show it."""
        return one_line(str(self.path))

    @property
    def notes(self) -> list[str]:
        """What the verdict does not rest on: frames that were lost, faces beyond the largest of a crowd, and frames
        that are nearer or farther apart than the temporal head knows."""
        frames = f"{self.crowded} frame{'s' * (self.crowded != 1)}"
        crowd = [f"in {frames} only the {MAX_FACES} largest faces are judged"] * bool(self.crowded)
        return [note for note in (self.reading.note(), *crowd, self.pace) if note]

    @property
    def spans(self) -> list[Span]:
        """Forged spans of all people, by start."""
        return sorted(span for person in self.people for span in person.spans)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": "video" if self.moving else "picture",
            "seconds": round(self.reading.seconds, 3),
            "verdict": self.verdict,
            "reasons": self.reasons,
            "score": self.score,
            "novelty": self.novelty,
            "threshold": self.limits.fake_from,
            "limits": self.limits.to_json(),
            "frame_limits": self.frame_limits.to_json(),
            "frames_asked": self.reading.asked or self.frames_read,
            "frames_read": self.frames_read,
            "frames_lost": self.reading.lost,
            "frames_missing": self.reading.missing,
            "notes": self.notes,
            "frames_with_face": len(self.frames),
            "frames_crowded": self.crowded,
            "error": self.error,
            "people": [{**p._asdict(), "spans": [span.to_json() for span in p.spans]} for p in self.people],
            "timing": {name: round(seconds, 3) for name, seconds in vars(self.timing).items()},
            "pictures": [picture.to_json() for picture in self.pictures],
            "frames": [
                {
                    "number": f.number,
                    "seconds": round(f.seconds, 3),
                    "score": f.score,
                    "faces": [face.to_json() for face in f.faces],
                }
                for f in self.frames
            ],
        }


def short_names(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """The folder that all ``paths`` lie in, and the part of each that tells it apart, in one line for tables.

    The folder is empty for a single path, or when they have none in common.
    """
    folders = {path.parent for path in paths}
    try:
        folder = os.path.commonpath(folders) if len(paths) > 1 else ""
    except ValueError:  # relative and absolute ones
        folder = ""
    if folder in ("", "/"):
        return "", [one_line(str(path)) for path in paths]
    return one_line(folder), [one_line(os.path.relpath(path, folder)) for path in paths]


# ------------------------------------------------------------------------------------------------ the rule


def judge(result: Result, card: Card | None, config: DetectConfig) -> None:
    """Fills in the people, score, limits and verdict of ``result`` from its frames and clips, by a model's card."""
    clips = bool(result.clips)
    result.limits, result.frame_limits = (limits_of(card, config, moving, clips) for moving in (result.moving, False))
    if not result.frames:
        result.verdict = "no face"
        result.error = f"{result.path}: no face in {result.frames_read} frame{'s' * (result.frames_read != 1)}"
        return
    result.people = people_of(result.frames, result.frame_limits.fake_from, _stretches(result), result.clips)
    deciding = _deciding(result.people, result.frames)
    if config.threshold is None and 2 * len(deciding) < result.limits.frames:  # means of few frames vary more
        result.limits = result.limits.stricter(result.frame_limits)
    result.score = aggregate(result.people, result.frames)
    measured = [face.novelty for face in deciding if face.novelty is not None]
    result.novelty = float(np.mean(measured)) if measured else None
    result.reasons = _doubts(result, deciding, config)
    result.verdict = "uncertain" if result.reasons else result.limits.verdict(result.score)


def _doubts(result: Result, deciding: list[Face], config: DetectConfig) -> list[str]:
    """Reasons to give no verdict."""
    limits, doubts = result.limits, []
    assert result.score is not None
    if limits.verdict(result.score) == "uncertain":
        doubts.append(f"P(fake) {result.score:.3f} lies between {limits.real_up_to:.3f} and {limits.fake_from:.3f}")
    if result.novelty is not None and limits.novel_from is not None and result.novelty > limits.novel_from:
        doubts.append(f"unlike the training data: novelty {result.novelty:.2f}, over {limits.novel_from:.2f}")
    if result.moving and len(deciding) < min(config.min_frames, result.frames_read):
        doubts.append(f"only {len(deciding)} of {result.frames_read} frames show the face, under --min-frames "
                      f"{config.min_frames}")  # fmt: skip
    width = round(float(np.median([face.box.right - face.box.left for face in deciding])))
    if width < config.min_pixels:
        doubts.append(f"the face is {width} pixels wide, under --min-pixels {config.min_pixels}")
    if result.reading.share > config.max_lost:
        doubts.append(f"{result.reading.note()}, over --max-lost {config.max_lost:g}")
    return doubts


def _stretches(result: Result) -> list[tuple[float, float]]:
    """The stretch of time that each analysed frame stands for; none for a still picture."""
    if not result.moving:
        return []
    between = [(a[1] + b[0]) / 2 for a, b in itertools.pairwise(result.analysed)]
    return list(zip([0.0, *between], [*between, result.reading.seconds], strict=True))


def people_of(
    frames: list[FrameResult], threshold: float, stretches: list[tuple[float, float]], clips: Mapping[int, float] = {}
) -> list[Person]:
    """All people in ``frames``, highest score first; ``stretches``: of each analysed frame, or none; ``clips``: scores
    by the temporal head."""
    seen: dict[int, list[tuple[int, FrameResult, float]]] = {}
    for place, frame in enumerate(frames):
        for face in frame.faces:
            seen.setdefault(face.person, []).append((place, frame, face.score))
    mean = lambda own: float(np.mean([score for *_, score in own]))
    people = [
        Person(number, clips.get(number, mean(own)), len({place for place, *_ in own}),
               _spans(own, threshold, stretches) if stretches else [])
        for number, own in seen.items()
    ]  # fmt: skip
    return sorted(people, key=lambda person: -person.score)


def _spans(
    own: list[tuple[int, FrameResult, float]], threshold: float, stretches: list[tuple[float, float]]
) -> list[Span]:
    """Spans of successive frames with a score at or over the threshold; one frame without the face does not end one."""
    spans: list[Span] = []
    run: list[tuple[int, FrameResult, float]] = []
    for item in [*own, None]:
        goes_on = item is not None and item[2] >= threshold and (not run or item[0] - run[-1][0] <= 2)
        if run and not goes_on:
            start, end = stretches[run[0][1].place][0], stretches[run[-1][1].place][1]
            spans.append(Span(start, end, float(np.mean([score for *_, score in run]))))
            run = []
        if item is not None and item[2] >= threshold:
            run.append(item)
    return spans


def aggregate(people: list[Person], frames: list[FrameResult]) -> float:
    """The input's score by RULE, or CLIP_RULE."""
    decisive = _decisive(people, frames)
    return decisive.score if decisive else float(np.mean([face.score for face in _deciding(people, frames)]))


def _decisive(people: list[Person], frames: list[FrameResult]) -> Person | None:
    """The person whose score is the input's, by RULE; None: the frames' highest scores are."""
    regular = [person for person in people if person.frames * 10 >= len(frames)]
    return max(regular, key=lambda person: person.score, default=None)


def _deciding(people: list[Person], frames: list[FrameResult]) -> list[Face]:
    """The faces that the input's score is of, by RULE."""
    decisive = _decisive(people, frames)
    if decisive is None:
        return [max(frame.faces, key=lambda face: face.score) for frame in frames]
    return [face for frame in frames for face in frame.faces if face.person == decisive.number]
