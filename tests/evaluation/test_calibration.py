"""Calibration: the temperature and limits against known answers, the card, and what the model's files carry of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest
from skimage import data
from sklearn.metrics import brier_score_loss
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.calibration import Calibrated, calibrate
from dtn_fast.evaluation.card_page import write_card_page
from dtn_fast.evaluation.config import CalibrateConfig
from dtn_fast.evaluation.reliability import (
    brier_score,
    calibration_error,
    even_odds,
    fit_temperature,
    level_of,
    operating_point,
    rate_interval,
    reliability,
    upper_limit,
    video_weights,
)
from dtn_fast.export.to_mnn import export_mnn
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.model.card import CARD, Card, remarks
from dtn_fast.model.detector import read_card
from dtn_fast.model.novelty import FILE
from dtn_fast.runtime.load import best_checkpoint, load_model, load_scorer


def drawn(count: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Labels, and logits [n, 2] whose softmax is the probability by which the labels were drawn, at even odds."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2.5, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-z))).astype(np.int64)
    return labels, np.stack([-z / 2, z / 2], 1)


def p_fake(logits: NDArray) -> NDArray:
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_of_scores_made_miscalibrated_is_the_factor(factor: float) -> None:
    labels, logits = drawn(20000)
    weights = np.ones(len(labels))
    temperature = fit_temperature(labels, factor * logits, weights)
    assert temperature == pytest.approx(factor, rel=0.05)
    before, after = (
        calibration_error(reliability(labels, p_fake(factor * logits / t), weights)) for t in (1, temperature)
    )
    assert after < 0.015
    assert factor == 1 or before > 3 * after


def test_classes_weigh_the_same_whatever_their_numbers() -> None:
    labels, logits = drawn(20000)
    kept = (labels == 1) | (np.random.default_rng(1).random(len(labels)) < 0.1)
    few = fit_temperature(labels[kept], 2 * logits[kept], np.ones(kept.sum()))
    assert few == pytest.approx(2, rel=0.08)
    weights = even_odds(np.array([0, 1, 1, 1]), np.ones(4))
    assert weights.tolist() == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])


def test_errors_against_their_definitions() -> None:
    rng = np.random.default_rng(2)
    labels, scores, weights = rng.integers(0, 2, 300), rng.random(300), rng.random(300) + 0.1
    even = even_odds(labels, weights)
    assert brier_score(labels, scores, weights) == pytest.approx(brier_score_loss(labels, scores, sample_weight=even))
    expected = 0.0
    for low in range(15):
        own = (scores >= low / 15) & (scores < (low + 1) / 15)
        expected += abs((even[own] * (scores[own] - labels[own])).sum())
    assert calibration_error(reliability(labels, scores, weights)) == pytest.approx(expected)


@pytest.mark.parametrize(("cases", "rate"), [(19, 0.1), (99, 0.01), (50, 0.05), (5, 0.01)])
def test_a_limit_keeps_its_rate_on_new_inputs(cases: int, rate: float) -> None:
    rng = np.random.default_rng(3)
    over, bounds = [], set()
    for _ in range(3000):
        scores = rng.random(cases + 20)
        limit, bound = upper_limit(scores[:cases], np.ones(cases), rate)
        over.append((scores[cases:] >= limit).mean())
        bounds.add(bound)
    (bound,) = bounds
    assert bound <= max(rate, 1 / (cases + 1)) + 1e-12
    assert np.mean(over) == pytest.approx(bound, abs=5 * np.std(over) / 3000**0.5)  # neither over it nor far under


def test_limits_of_videos_of_unlike_lengths_and_of_ties() -> None:
    rng = np.random.default_rng(4)
    over = []
    for _ in range(2000):
        counts = rng.integers(1, 30, 25)
        levels = rng.random(25)  # frames of a video are alike
        scores = np.repeat(levels, counts) + 0.01 * rng.random(counts.sum())
        videos = np.repeat(np.arange(25), counts).astype(str)
        known = videos != "24"
        limit, bound = upper_limit(scores[known], video_weights(videos[known].tolist()), 0.1)
        over.append((scores[~known] >= limit).mean())
        assert bound <= 0.1 + 1e-12
    assert np.mean(over) <= 0.1 + 4 * np.std(over) / 2000**0.5
    limit, bound = upper_limit(np.array([0.2, 0.9, 0.9, 0.9]), np.ones(4), 0.5)  # 0.9 thrice is over half of five
    assert limit > 0.9
    assert bound == 0.2


def test_operating_points_say_when_reals_are_too_few() -> None:
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 200)
    scores = np.concatenate([rng.random(200) * 0.8, 0.3 + 0.7 * rng.random(200)])
    found = operating_point(labels, scores, np.ones(400), 0.01, 0.95)
    assert found.threshold is not None
    assert ((scores[:200] >= found.threshold).sum() + 1) / 201 <= 0.01
    assert found.detected == pytest.approx((scores[200:] >= found.threshold).mean())
    assert found.low < found.detected < found.high
    assert operating_point(labels, scores, np.ones(400), 0.001, 0.95).threshold is None
    for hits, cases in ((0, 10), (3, 10), (10, 10)):
        known = binomtest(hits, cases).proportion_ci(0.95, "exact")
        assert rate_interval(hits / cases, cases, 0.95) == pytest.approx((known.low, known.high))


def test_limits_of_a_weak_and_of_a_perfect_model() -> None:
    rng = np.random.default_rng(6)
    labels = np.repeat([0, 1], 100)
    noise = rng.random(200)
    weak = level_of(labels, noise, noise, np.ones(200), None, (0.05, 0.1, 0.01), 0.95, 1)
    assert weak.real_up_to < 0.2
    assert weak.fake_from > 0.9  # nearly everything is uncertain
    clear = np.where(labels == 1, 0.9, 0.1) + 0.05 * noise
    sure = level_of(labels, clear, clear, np.ones(200), None, (0.05, 0.1, 0.01), 0.95, 1)
    assert sure.real_up_to < sure.fake_from  # between the classes, uncertain; in neither
    assert (clear[labels == 0] <= sure.real_up_to).mean() > 0.9
    assert (clear[labels == 1] >= sure.fake_from).mean() > 0.85
    assert (sure.false_alarms, sure.misses) == (1 / 101, 1 / 101)  # of the limits in force, which changed places
    assert [sure.false_alarms_at(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 1 / 101, 1 / 101])


def test_ties_and_separable_classes() -> None:
    labels, ones = np.repeat([0, 1], 20), np.ones(40)
    same = np.full(40, 0.7)
    tied = level_of(labels, same, same, ones, None, (0.05, 0.05, 0.01), 0.95, 1)
    assert tied.real_up_to < 0.7 < tied.fake_from  # no score is called anything
    z = np.where(labels == 1, 1.0, -1.0) + np.linspace(-0.4, 0.4, 40)
    temperature = fit_temperature(labels, np.stack([-z / 2, z / 2], 1), ones)
    assert 0.1 < temperature < 1  # sharper, within what twenty of each tell


def test_novelty_limit_holds_for_each_class() -> None:
    rng = np.random.default_rng(7)
    labels, scores = np.repeat([0, 1], [100, 400]), rng.random(500)
    novelty = rng.random(500) + (labels == 0)
    found = level_of(labels, scores, scores, np.ones(500), novelty, (0.05, 0.1, 0.05), 0.95, 1)
    assert found.novel_from is not None
    assert (novelty[labels == 0] > found.novel_from).mean() <= 0.05


@pytest.fixture(scope="module")
def calibrated(trained: Path, crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(trained, run)
    *steps, made = calibrate(run, crops, CalibrateConfig(false_alarms=0.2))
    assert "scoring the val split" in steps
    assert isinstance(made, Calibrated)
    assert any("false alarms: 20.00% takes 4 real videos, there are 2" in note for note in made.notes)
    return run


def test_training_writes_a_card_and_calibration_completes_it(
    trained: Path, calibrated: Path, dataset: CropDataset
) -> None:
    before, after = (read_card(best_checkpoint(run)) for run in (trained, calibrated))
    assert before is not None
    assert after is not None
    assert before.calibration is None
    assert before == dataclasses.replace(after, calibration=None)
    assert [(s.split, s.reals, s.fakes) for s in before.splits] == [
        (split, sum(v.split == split and not v.label for v in dataset.videos),
         sum(v.split == split and bool(v.label) for v in dataset.videos)) for split in ("train", "val")
    ]  # fmt: skip
    assert before.synthetic
    assert before.forgeries
    assert before.val_auc is not None
    made = after.calibration
    assert made is not None
    assert made.video is not None
    assert [m.level for m in made.measured] == ["frame", "video"]
    assert made.video.false_alarms == pytest.approx(1 / (made.video.reals + 1))  # two reals promise one third
    page = (best_checkpoint(calibrated) / "card.html").read_text()
    assert "too few reals to say" in page
    assert "synthetic" in page
    weights = [(best_checkpoint(run) / "model.safetensors").read_bytes() for run in (trained, calibrated)]
    assert weights[0] == weights[1]


def test_every_file_carries_the_calibration(calibrated: Path, dataset: CropDataset, tmp_path: Path) -> None:
    model = load_model(calibrated)
    export_onnx(model, tmp_path / "m.onnx")
    export_mnn(model, tmp_path / "m.mnn")
    crops = dataset.get(np.arange(8))
    scorers = [load_scorer(path) for path in (calibrated, tmp_path / "m.onnx", tmp_path / "m.mnn")]
    reference = scorers[0].judge(crops)
    temperature = model.config.card.calibration.temperature
    assert reference.score == pytest.approx(p_fake(scorers[0].logits(crops) / temperature))
    assert reference.novelty is not None
    for scorer in scorers[1:]:
        assert scorer.config.card == model.config.card
        got = scorer.judge(crops)
        assert got.score == pytest.approx(reference.score, abs=1e-4)
        assert got.novelty == pytest.approx(reference.novelty, rel=1e-3)
    onnx: Any = scorers[1]
    (in_graph,) = onnx.session.run(["score"], onnx.feed(crops))
    assert in_graph == pytest.approx(reference.score, abs=1e-5)


def test_pictures_unlike_the_training_data_are_novel(calibrated: Path, dataset: CropDataset) -> None:
    scorer = load_scorer(calibrated)
    rng, side = np.random.default_rng(0), SMALL.image_size
    face = data.astronaut()[20:200, 140:320]
    photo = np.ascontiguousarray(face[:: 180 // side + 1, :: 180 // side + 1][:side, :side])
    photo = np.pad(photo, ((0, side - len(photo)), (0, side - photo.shape[1]), (0, 0)), "edge")
    cartoon = np.full((side, side, 3), (250, 220, 60), np.uint8)
    cartoon[side // 3 : side // 2, side // 4 : side // 3] = cartoon[side // 3 : side // 2, -side // 3 : -side // 4] = 0
    noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    limit = scorer.config.card.calibration.frame.novel_from
    novelty = scorer.judge(np.stack([photo, cartoon, noise])).novelty
    assert novelty is not None
    assert (novelty > limit).all()
    own = scorer.judge(dataset.get(dataset.select("test"))).novelty
    assert own is not None
    assert novelty.min() > 1.2 * own.max()


def test_new_weights_leave_no_calibration_of_the_old(calibrated: Path, tmp_path: Path) -> None:
    model, folder = load_model(calibrated), tmp_path / "copy"
    assert model.novelty is not None
    model.save_pretrained(folder)
    assert load_model(folder).config.card == model.config.card
    (folder / FILE).unlink()
    with pytest.raises(UsageError, match=r"novelty\.safetensors: missing .* delete card\.json beside it"):
        load_model(folder)
    torch.manual_seed(1)
    other = DTN(dataclasses.replace(model.config, card=None))
    other.save_pretrained(folder)
    assert load_model(folder).config.card is None
    shutil.copy(best_checkpoint(calibrated) / CARD, folder)
    with pytest.raises(UsageError, match=r"card\.json: its calibration is of other weights; delete it"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"temperature": 0}, "temperature is 0; it must be from 0.001 to 1000"),
        ({"temperature": "1"}, "temperature is '1'; it must be float"),
        ({"frame": None}, "frame is 'None'; it must be Level"),
        ({"measured": [[1]]}, "measured"),
    ],
)
def test_a_damaged_card_is_one_line(calibrated: Path, tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    shutil.copytree(best_checkpoint(calibrated), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / CARD).read_text())
    stored["calibration"] |= change
    (tmp_path / "run" / CARD).write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=problem):
        load_model(tmp_path / "run")


def test_what_cannot_be_calibrated_is_said(calibrated: Path, crops: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="calibrate the run or checkpoint, then export it again"):
        list(calibrate(tmp_path / "m.onnx", crops))
    reals = tmp_path / "reals" / "val" / "real"
    reals.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)).save(reals / f"{number}.png")
    with pytest.raises(UsageError, match="calibration needs reals and fakes"):
        list(calibrate(calibrated, tmp_path / "reals", CalibrateConfig()))


def test_a_model_without_a_card_gets_one(crops: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    DTN(SMALL).save_pretrained(tmp_path / "m")
    *_, made = calibrate(tmp_path / "m", crops)
    assert isinstance(made, Calibrated)
    assert made.card.data == "unknown"
    assert load_model(tmp_path / "m").config.card == made.card


def test_remarks_name_what_a_reader_must_know() -> None:
    card = Card("d", "f", False, (), ("a",), "dlib", "", (), 0.55, (0.5, 0.6), "1", "c")
    assert remarks(None)[0].startswith("no model card")
    near, uncalibrated = remarks(card)
    assert near == "near chance: validation AUC 0.55 (0.50-0.60), where 0.5 is guessing"
    assert "not calibrated" in uncalibrated
    assert remarks(dataclasses.replace(card, val_auc=0.9, val_auc_interval=(0.8, 0.95))) == [uncalibrated]


def test_the_page_escapes_names(tmp_path: Path) -> None:
    card = Card("<b>&", "f", False, (), ("<i>",), "dlib", "", (), None, None, "1", "c")
    page = write_card_page(tmp_path, card, "").read_text()
    assert "<b>&" not in page
    assert "&lt;i&gt;" in page
