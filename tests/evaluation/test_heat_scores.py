"""Scores of heat maps against masks: by hand, by an oracle, on half-forged faces; their table and picture."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.masks import FORGED
from dtn_fast.data.synthetic_faces import film_and_masks
from dtn_fast.data.synthetic_marker import METHODS
from dtn_fast.data.video_table import Video
from dtn_fast.errors import UsageError
from dtn_fast.evaluation import heat_scores as H
from dtn_fast.evaluation.config import FIGURES, HEAT_SCORES, FigureConfig
from dtn_fast.evaluation.figures import choose, draw
from dtn_fast.evaluation.metrics import mean_interval

SIDE = SMALL.image_size


def small_image(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def masked() -> CropDataset:
    """Two people a split with two frames each, and their forgeries, whole frames as crops, with their masks."""
    videos, crops, masks = [], list[np.ndarray](), list[np.ndarray]()
    for split, first in (("val", 0), ("test", 2)):
        for target, source in ((first, first + 1), (first + 1, first)):
            for method in (None, *METHODS):
                frames, own = film_and_masks(target, source, method, 2, 2 * SIDE, 0)
                videos.append(Video(f"{method}/{target}", int(method is not None), method or "real", split,
                                    target=f"None/{target}" if method else ""))  # fmt: skip
                crops += map(small_image, frames)
                masks += map(small_image, own or [np.zeros((2 * SIDE, 2 * SIDE), np.uint8)] * 2)
    number = np.arange(len(crops))
    state = {"faces": 2, "frames": 2, "asked": 2, "boxes": "real", "error": None}
    return CropDataset(
        ShardFiles([np.stack(crops)], SIDE), number // 2, number % 2, 0 * number, videos, [state] * len(videos), True,
        masks=ShardFiles([np.stack(masks)], SIDE), mask_known=number >= 0,
    )  # fmt: skip


def done(steps: Generator[str, None, list[H.HeatScore]]) -> list[H.HeatScore]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_the_metrics_of_maps_by_hand() -> None:
    mask = np.zeros((100, 100), bool)
    mask[:50] = True
    heat = np.zeros((100, 100), np.float32)
    heat[40:60] = 0.5
    heat[45, 7] = 1.0
    found = H.mask_scores(heat, mask, ~mask)
    assert found["pointing"] == 1
    assert found["energy"] == pytest.approx(500.5 / 1000.5)
    assert found["iou_fixed"] == pytest.approx(1000 / (5000 + 1000)), "at 0.5 all 20 lines count, half of them inside"
    assert H.ious(heat, mask, np.array([0.3, 0.6])) == pytest.approx([1000 / 6000, 1 / 5000])
    assert found["auc"] == pytest.approx(0.5, abs=1e-3), "of either half a fifth is warm"
    assert H.mask_scores(heat * mask, mask, ~mask)["auc"] == pytest.approx(0.6), "a fifth warm, and nothing outside"
    for line, hit in ((49, 1), (52, 1), (53, 0)):  # three pixels are the tolerance
        point = np.zeros((100, 100), np.float32)
        point[line, 50] = 1
        assert H.pointing(point, mask) == hit, line
    assert H.pointing(np.ones((100, 100), np.float32), mask) == pytest.approx(0.53), "several maxima: their share"
    blank = H.mask_scores(np.zeros((100, 100), np.float32), mask, ~mask)
    assert (blank["pointing"], blank["energy"], blank["iou_fixed"], blank["auc"], blank["blank"]) == (0, 0, 0, 0.5, 1)
    assert np.isnan(H.pixel_auc(heat, mask | True, mask & False))
    left = mask & (np.arange(100) < 50)
    assert H.half_scores(heat, left, mask & ~left)["half_pointing"] == 1
    assert H.half_scores(heat, mask & ~left, left)["half_pointing"] == 0
    assert H.half_scores(left.astype(np.float32), left, mask & ~left)["half_auc"] == 1


def test_the_chance_levels_are_those_of_the_masks() -> None:
    """A centred face makes the Gaussian strong and leaves the uniform map at the mask's share of the crop."""
    y, x = np.mgrid[0:64, 0:64] - 31.5
    mask = np.hypot(x, y) < 20
    maps = H.chance_maps(64)
    uniform, gaussian = (H.mask_scores(maps[name], mask, ~mask) for name in (H.UNIFORM, H.GAUSSIAN))
    assert uniform["energy"] == uniform["iou_fixed"] == pytest.approx(mask.mean())
    assert uniform["auc"] == 0.5
    wider = [(np.hypot(x, y) < 20 + more).mean() for more in (0.9, 1.92)]  # pixels are whole
    assert wider[0] < uniform["pointing"] < wider[1]
    assert gaussian["auc"] == pytest.approx(1)
    assert max(gaussian["ious"]) > 0.95
    assert H.half_scores(maps[H.GAUSSIAN], mask & (x < 0), mask & (x > 0))["half_auc"] == pytest.approx(0.5)


def test_intervals_draw_whole_videos() -> None:
    random = np.random.default_rng(0)
    alike = np.repeat(random.random(20), 50)  # all frames of a video have one value
    low, high = mean_interval(alike, np.repeat(np.arange(20), 50), 2000, 0.95)
    apart = mean_interval(alike, np.arange(1000), 2000, 0.95)
    assert low < alike.mean() < high
    deviation = alike.std() / 20**0.5
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert apart[1] - apart[0] < 0.3 * (high - low)


def test_half_forged_crops_are_the_real_s_on_one_side(masked: CropDataset) -> None:
    fakes = H.masked_fakes(masked, "test", 100, "x")
    assert len(fakes.rows) == 2 * 2 * 4, "two people, two frames, four forgeries"
    halves = H.half_forged(masked, fakes)
    assert halves.rows.tolist() == np.repeat(fakes.rows, 2).tolist()
    reals = {(masked.videos[v].path, f): row for row, (v, f) in enumerate(zip(masked.video, masked.frame, strict=True))}
    for row, crop, forged, rest in zip(*halves, strict=True):
        video, frame = masked.videos[masked.video[row]], masked.frame[row]
        fake, real = masked.get(np.array([row, reals[video.target, frame]]))
        sure = ~forged & ~rest  # outside the mask either is alike
        apart = lambda one, other, where: np.abs(one.astype(int) - other)[where].mean()
        assert apart(crop, fake, forged) < apart(crop, real, forged)
        assert apart(crop, real, rest) < apart(crop, fake, rest)
        assert apart(fake, real, sure) < H.ALIGNED
        assert forged.any()
        assert rest.any()
        assert not (forged & rest).any()
        assert np.array_equal(forged | rest, masked.get_masks(np.array([row]))[0] >= FORGED)
    moved = np.roll(masked.get(fakes.rows), 9, 2)  # as if their faces had been found by themselves
    assert not len(H.half_forged(masked, fakes._replace(crops=moved)).rows)


def test_an_oracle_gets_full_marks_and_uniform_maps_get_chance(
    masked: CropDataset, small: DTN, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = H.masked_fakes(masked, "test", 100, "x")
    whole = fakes, H.masked_fakes(masked, "val", 100, "x")
    sources = *whole, *(H.half_forged(masked, some) for some in whole)
    truth = {zlib.crc32(crop): mask for source in sources
             for crop, mask in zip(source.crops, source.forged, strict=True)}  # fmt: skip

    def oracle(_model: object, crops: np.ndarray, depths: list[str]) -> dict[str, np.ndarray]:
        right = np.stack([truth[zlib.crc32(crop)] for crop in crops]).astype(np.float32)
        return dict(zip(depths, (right, np.ones_like(right), np.zeros_like(right)), strict=True))

    monkeypatch.setattr(H, "grad_cams", oracle)
    depths = ["backbone", "gate", "head"]
    scores = done(H.heat_scores({"m": small}, {"d": masked}, "test", 100, depths))
    rows = {score.map: score for score in scores if score.crops == H.ALL}
    assert list(rows) == [*depths, H.UNIFORM, H.GAUSSIAN]
    mean = {
        name: {metric: value and value[0] for metric, value in score.values.items()} for name, score in rows.items()
    }
    assert mean["backbone"] == dict.fromkeys(H.METRICS, 1.0), "where the forgery is"
    assert mean["gate"] == mean[H.UNIFORM]
    assert mean["head"] == {**dict.fromkeys(H.METRICS, 0.0), "auc": 0.5, "half_auc": 0.5}
    assert [rows[depth].blank for depth in depths] == [0, 0, 1]
    assert mean[H.GAUSSIAN]["auc"] > 0.8, "faces lie in the middle"
    assert mean[H.GAUSSIAN]["half_auc"] == pytest.approx(0.5, abs=0.05)
    assert rows["head"].halves == 2 * rows["head"].fakes == 2 * len(fakes.rows)
    assert rows["head"].videos == 8
    assert rows[H.GAUSSIAN].cut == H.CUTS[np.argmax(np.mean([
        H.ious(H.chance_maps(64)[H.GAUSSIAN], mask, H.CUTS) for mask in H.masked_fakes(masked, "val", 100, "").forged
    ], 0))]  # fmt: skip
    on_val = done(H.heat_scores({"m": small}, {"d": masked}, "val", 100, depths))
    assert all(score.cut is None and score.values["iou_val"] is None for score in on_val), "no cut from its own crops"


def test_only_fakes_called_fake_count_as_such(masked: CropDataset, small: DTN) -> None:
    for bias, called in ((99.0, 16), (-99.0, 0)):
        small.head.bias.data = small.head.bias.data.new_tensor([0.0, bias])
        scores = done(H.heat_scores({"m": small}, {"d": masked}, "test", 100, ["head"]))
        assert {score.fakes for score in scores if score.crops == H.CALLED} == {called}
        assert {score.fakes for score in scores if score.crops == H.ALL} == {16}
    none = next(score for score in scores if score.crops == H.CALLED)
    assert none.values == dict.fromkeys(H.METRICS)
    H.plot_heat_scores(scores)


def test_scores_are_drawn_tabulated_and_stored(masked: CropDataset, small: DTN, tmp_path: Path) -> None:
    faces, config = choose({"d": masked}, "test", 4), FigureConfig((HEAT_SCORES,), depths=("last-block", "head"))
    small.notice, small.head.bias.data[1] = "synthetic faces", 9.0
    steps = list(draw({"a|b": small}, faces, tmp_path, config, {}))
    assert steps[0] == HEAT_SCORES
    assert "a|b on d, halves: 0 of 32 crops" in steps
    assert {path.name for path in tmp_path.iterdir()} == {"heat-scores.svg", "heat-scores.md", "figures.json"}
    stored = json.loads((tmp_path / "figures.json").read_text())[HEAT_SCORES]
    scores = [H.HeatScore(**score) for score in stored]
    assert [score.map for score in scores if score.crops == H.ALL] == ["last-block", "head", H.UNIFORM, H.GAUSSIAN]
    (title, header, rows), (other, *_) = H.heat_tables(scores)
    assert title == "Grad-CAM of a|b against the masks of d, called fake, percent"
    assert other == title.replace(H.CALLED, H.ALL)
    assert header == ["map", "blank", *H.METRICS.values()]
    assert {len(row) for row in rows} == {len(header)}
    assert rows[2][header.index("pixel AUC")] == "50 (50-50)"
    page = (tmp_path / "heat-scores.md").read_text()
    assert all(title in page for title, *_ in H.heat_tables(scores))
    assert "| head | " in page
    assert "trained on synthetic faces" in page
    assert "16 of 16 fakes called fake" in page
    drawn = (tmp_path / "heat-scores.svg").read_text()
    assert all(title in drawn for title in H.METRICS.values())


def test_crops_without_masks_are_refused_in_one_line(masked: CropDataset, small: DTN, tmp_path: Path) -> None:
    dataset = dataclasses.replace(masked, masks=None, mask_known=None)
    assert HEAT_SCORES not in FIGURES, "the other figures need no masks"
    steps: Any = draw({"m": small}, choose({"d": dataset}, "test", 4), tmp_path, FigureConfig((HEAT_SCORES,)), {})
    with pytest.raises(UsageError, match=r"d: these crops have no masks; prepare .* with --masks"):
        list(steps)
    unknown = dataclasses.replace(masked, mask_known=np.zeros(len(masked.video), bool))
    with pytest.raises(UsageError, match="d: no fake of the test split has a known mask"):
        done(H.heat_scores({"m": small}, {"d": unknown}, "test", 9, ["head"]))
    alone = dataclasses.replace(masked, videos=[video._replace(target="") for video in masked.videos])
    scores = done(H.heat_scores({"m": small}, {"d": alone}, "test", 9, ["head"]))
    assert all(score.values["half_auc"] is None for score in scores)
    assert any("--masks --reuse-boxes" in note for note in H.heat_notes(scores, "test"))
