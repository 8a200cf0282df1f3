"""Forged regions in detection: where they lie, on whom they are shown, in every file and page."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dtn_fast import DTN
from dtn_fast.data.faces import Box, Cut, crop_face
from dtn_fast.data.video import read_frames
from dtn_fast.detect.annotate import annotate
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import CALLED_REAL, NOTHING_FORGED, detect
from dtn_fast.detect.regions import draw, moved, regions_of
from dtn_fast.detect.report import write_report, write_results
from dtn_fast.runtime.scorer import Scored
from dtn_fast.runtime.torch_scorer import TorchScorer


@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_an_outline_lies_where_the_frame_s_pixels_are(degrees: float) -> None:
    """A disc in a frame, cropped, taken as its own mask, gives the disc's outline again."""
    frame = cv2.circle(np.zeros((300, 400), np.uint8), (220, 130), 25, 255, -1)
    cut = Cut((200.0, 140.0), 160, degrees)
    mask = cv2.resize(crop_face(frame, cut, 256), (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    (region,) = regions_of(mask, cut)
    found = cv2.fillPoly(np.zeros_like(frame), [region], 255) > 0
    assert (found & (frame > 0)).sum() / (found | (frame > 0)).sum() > 0.85
    assert regions_of(0.49 * mask, cut) == ()
    (after,) = moved((region,), Box(150, 90, 250, 190), Box(170, 90, 370, 290))
    np.testing.assert_allclose(after, (region - [200, 140]) * 2 + [270, 190], atol=1)


def test_a_region_is_tinted_and_outlined_inside_alone() -> None:
    image = np.full((100, 100, 3), 120, np.uint8)
    draw(image, (np.array([[20, 20], [60, 20], [60, 60], [20, 60]], np.int32),), (220, 40, 40), 1)
    assert image[40, 40].tolist() == [145, 100, 100]
    assert image[20, 40, 0] > 200, "the outline"
    assert (image[70:] == 120).all()
    before = image.copy()
    draw(image, (), (220, 40, 40), 1)
    assert np.array_equal(image, before)


class Told(TorchScorer):
    """Every face has one score and one mask."""

    def __init__(self, model: DTN, score: float, mask: np.ndarray) -> None:
        super().__init__(model)
        self.score_of_all, self.mask = score, mask.astype(np.float32)

    def judge(self, crops: np.ndarray) -> Scored:
        return Scored(np.full(len(crops), self.score_of_all), None, np.stack([self.mask] * len(crops)))


UPPER = np.vstack([np.ones((4, 8)), np.zeros((4, 8))])


@pytest.fixture(scope="module")
def clip(video_set: Path) -> Path:
    return sorted((video_set / "manipulated_sequences").rglob("c23/videos/*.mp4"))[0]


@pytest.mark.parametrize(("score", "mask", "reason"), [
    (0.9, UPPER, ""), (0.1, UPPER, CALLED_REAL), (0.9, 0.4 * UPPER, NOTHING_FORGED),
])  # fmt: skip
def test_faces_called_fake_show_their_regions_and_real_ones_none(
    clip: Path, small: DTN, tmp_path: Path, score: float, mask: np.ndarray, reason: str
) -> None:
    result = detect(clip, Told(small, score, mask), DetectConfig(frames=3, min_pixels=0))
    assert result.frames, result.error
    for picture in result.pictures:
        assert picture.heat_reason == reason
        assert picture.heat_depth == (None if reason else "mask head")
    for face in (face for frame in result.frames for face in frame.faces):
        if reason == CALLED_REAL:
            assert face.regions is None
        elif reason:
            assert face.regions == ()
        else:
            assert face.regions is not None
            (region,) = face.regions
            middle = face.box.center
            assert region[:, 1].min() < face.box.top + 0.1 * face.box.side
            assert region[:, 1].max() == pytest.approx(middle[1], abs=0.06 * face.box.side)
    write_results(tmp_path / "results.json", [result], "", [])
    stored = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert [len(face["regions"] or ()) for frame in stored["frames"] for face in frame["faces"]] == \
        [int(not reason)] * len(result.frames)  # fmt: skip
    write_report(tmp_path / "report.html", "t", [], results=[result])
    page = (tmp_path / "report.html").read_text()
    assert ("maps of the model's mask head: warm regions seem forged" in page) == (not reason)
    assert "Grad-CAM" not in page
    assert (reason in page) if reason else ("heat map from the model's mask head" in page)


def test_an_annotated_copy_shows_the_region(clip: Path, small: DTN, tmp_path: Path) -> None:
    shown = {}
    for name, mask in (("with", UPPER), ("without", 0 * UPPER)):
        result = detect(clip, Told(small, 0.9, mask), DetectConfig(frames=3, min_pixels=0))
        list(annotate(result, tmp_path / f"{name}.mp4"))
        shown[name] = next(iter(read_frames(tmp_path / f"{name}.mp4", 1))).image.astype(int)
    face = result.frames[0].faces[0]
    change = np.abs(shown["with"] - shown["without"]).mean(2)
    box, height = face.box, face.box.side // 4
    upper = change[box.top + height // 2 : box.top + height, box.left + height : box.right - height]
    lower = change[box.bottom - height : box.bottom - height // 2, box.left + height : box.right - height]
    assert upper.mean() > 10
    assert lower.mean() < 5


def test_without_a_mask_head_results_are_as_before(clip: Path, small: DTN) -> None:
    result = detect(clip, TorchScorer(small), DetectConfig(frames=2))
    assert all(face.regions is None for frame in result.frames for face in frame.faces)
    assert all(picture.heat_depth != "mask head" for picture in result.pictures)
