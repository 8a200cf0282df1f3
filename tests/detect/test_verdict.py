"""Verdicts by a model's limits: real, fake, or uncertain and why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data
from small import SMALL

from dtn_fast import DTN
from dtn_fast.cli.detect import UNCERTAIN
from dtn_fast.cli.detect import detect as verb
from dtn_fast.data.faces import Box
from dtn_fast.data.video import Reading
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.limits import EVEN, Limits, limits_of
from dtn_fast.detect.verdict import Face, FrameResult, Result, judge
from dtn_fast.model.card import Calibration, Card, Level, OperatingPoint
from dtn_fast.model.novelty import Novelty

CURVE = ((0.1, 1.0, 1.0), (0.5, 0.25, 0.9), (0.7, 0.05, 0.8))


def level(fake_from: float, real_up_to: float, novel_from: float | None = 2.0, frames: int = 1) -> Level:
    point = OperatingPoint(0.01, None)
    return Level(
        frames, 20, 20, fake_from, real_up_to, 0.05, 0.1, 0.1, 0.01, 0.02, 0.1, 0.1, (), (), (point,), CURVE, novel_from
    )


CALIBRATED = Calibration("crops", "f", "", (), 1.0, level(0.8, 0.2), level(0.7, 0.4, frames=10))
CARD = Card("crops", "f", False, (), (), "dlib", "", (), 0.9, (0.85, 0.95), "1", "c", CALIBRATED)


def test_limits_are_the_model_s_unless_the_user_names_a_threshold() -> None:
    video, picture = (limits_of(CARD, DetectConfig(), moving) for moving in (True, False))
    assert (video.fake_from, video.real_up_to, video.novel_from) == (0.7, 0.4, 2.0)
    assert (picture.fake_from, picture.real_up_to) == (0.8, 0.2)
    assert [video.verdict(score) for score in (0.4, 0.41, 0.69, 0.7)] == ["real", "uncertain", "uncertain", "fake"]
    named = limits_of(CARD, DetectConfig(threshold=0.6, novelty=False), True)
    assert named == Limits(0.6, 0.6, 6 / 21, 20, 10, None)  # five of 20 reals at or over the next lower threshold
    assert str(named) == "fake from P(fake) 0.600 (expected false alarms 28.6% per person, on 20 reals)"
    assert str(video).endswith("real up to 0.400")
    stills = dataclasses.replace(CARD, calibration=dataclasses.replace(CALIBRATED, video=None))
    assert limits_of(stills, DetectConfig(), True).fake_from == 0.8
    for nothing in (None, dataclasses.replace(CARD, calibration=None)):
        assert limits_of(nothing, DetectConfig(), True) == EVEN
        assert limits_of(nothing, DetectConfig(threshold=0.9), False) == Limits(0.9, 0.9)


def video(score: float = 0.9, frames: int = 10, width: int = 100, novelty: float | None = 1.0, lost: int = 0) -> Result:
    reading = Reading(asked=10 + lost, lost=lost)
    reading.seconds = 10.0
    made = Result(Path("v.mp4"), frames_read=10, reading=reading)
    made.analysed = [(float(number), number + 1.0) for number in range(10)]
    faces = [Face(Box(0, 0, width, width), score, 0, novelty)]
    made.frames = [FrameResult(number, float(number), list(faces), number) for number in range(frames)]
    return made


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({}, "fake", ""),
        ({"score": 0.3}, "real", ""),
        ({"score": 0.5}, "uncertain", "P(fake) 0.500 lies between 0.400 and 0.700"),
        ({"novelty": 3.0}, "uncertain", "unlike the training data: novelty 3.00, over 2.00"),
        ({"novelty": None}, "fake", ""),
        ({"frames": 2}, "uncertain", "only 2 of 10 frames show the face, under --min-frames 3"),
        ({"width": 39}, "uncertain", "the face is 39 pixels wide, under --min-pixels 40"),
        ({"lost": 2}, "uncertain", "over --max-lost 0.1"),
    ],
)
def test_doubts(change: dict[str, Any], verdict: str, reason: str) -> None:
    result = video(**change)
    judge(result, CARD, DetectConfig())
    assert result.verdict == verdict
    assert [reason in text for text in result.reasons] == [True] * bool(reason)
    stored = result.to_json()
    assert (stored["verdict"], stored["reasons"], stored["threshold"]) == (
        verdict,
        result.reasons,
        result.limits.fake_from,
    )
    assert json.loads(json.dumps(stored))["limits"]["real_up_to"] == result.limits.real_up_to


def test_few_frames_are_judged_by_the_stricter_limits() -> None:
    for frames, verdict in ((5, "fake"), (4, "uncertain")):
        result = video(score=0.75, frames=frames)
        judge(result, CARD, DetectConfig())
        assert result.verdict == verdict


def test_doubts_can_be_switched_off() -> None:
    result = video(frames=1, width=10, novelty=9.0, lost=2, score=0.5)
    judge(result, CARD, DetectConfig(min_frames=0, min_pixels=0, novelty=False, max_lost=1, threshold=0.5))
    assert (result.verdict, result.reasons) == ("fake", [])
    judge(result, CARD, DetectConfig())
    assert len(result.reasons) == 5


def test_the_deciding_person_s_faces_count_alone() -> None:
    result = video(score=0.9)
    for frame in result.frames:
        frame.faces.append(Face(Box(0, 0, 10, 10), 0.1, 1, 9.0))  # small and novel, but not the one that decides
    judge(result, CARD, DetectConfig())
    assert (result.verdict, result.novelty) == ("fake", 1.0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    sure = dataclasses.replace(CALIBRATED, frame=level(0.9, 0.1), video=None)
    model = DTN(dataclasses.replace(SMALL, card=dataclasses.replace(CARD, calibration=sure)))
    width = 4 * SMALL.channels[3]
    model.novelty = Novelty.fit(np.random.default_rng(0).normal(size=(100, width)))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_verb_ends_with_3_and_says_why(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    assert verb([str(tmp_path / "face.png")], checkpoint, out=tmp_path / "out") == UNCERTAIN == 3
    printed = capsys.readouterr().out
    assert "uncertain: P(fake) 0." in printed
    assert "real up to 0.100" in printed
    assert "not calibrated" not in printed
    (stored,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert stored["verdict"] == "uncertain"
    assert "Uncertain: P(fake) 0." in (tmp_path / "out" / "report.html").read_text()
    plain = DetectConfig(threshold=0.1, novelty=False)
    assert verb([str(tmp_path / "face.png")], checkpoint, out=tmp_path / "out", config=plain) == 0


def test_an_uncalibrated_model_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DTN(SMALL).save_pretrained(tmp_path / "model")
    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    assert verb([str(tmp_path / "face.png")], tmp_path / "model", out=tmp_path / "out") == 0
    assert "There is no model card" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["remarks"]
