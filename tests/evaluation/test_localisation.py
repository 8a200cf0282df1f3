"""Scores of masks: by an oracle and by hand, per forgery, beside chance; in evaluate's table, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.cli.evaluate import evaluate as verb
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.evaluate import evaluate
from dtn_fast.evaluation.heat_scores import GAUSSIAN, HEAD, UNIFORM, HeatScore, heat_scores
from dtn_fast.evaluation.localisation import iou, localisation
from dtn_fast.runtime.scorer import Scored
from dtn_fast.runtime.torch_scorer import TorchScorer

MASKED = dataclasses.replace(SMALL, mask_head=True)
CONFIG = EvaluateConfig(mask_fakes=3, bootstrap_draws=50)


class Oracle(TorchScorer):
    """Knows the masks of a dataset, at a quarter of their sides, or their opposite."""

    def __init__(self, dataset: CropDataset, right: bool) -> None:
        torch.manual_seed(0)
        super().__init__(DTN(MASKED).eval())
        rows = np.flatnonzero(dataset.labels)
        small = lambda mask: cv2.resize(mask, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        self.known = {dataset.get(rows[i : i + 1])[0].tobytes(): small(mask)
                      for i, mask in enumerate(dataset.get_masks(rows))}  # fmt: skip
        self.right = right

    def judge(self, crops: np.ndarray) -> Scored:
        masks = np.stack([self.known[crop.tobytes()] for crop in crops])
        return Scored(np.ones(len(crops)), None, masks if self.right else 1 - masks)


def test_an_oracle_is_perfect_and_its_opposite_worse_than_chance(dataset: CropDataset) -> None:
    groups = {"all": dataset.methods, **{method: (method,) for method in dataset.methods}}
    for right in (True, False):
        table = localisation(Oracle(dataset, right), dataset, groups, CONFIG)
        assert [(s.fakes, s.map) for s in table] == [(g, m) for g in groups for m in (HEAD, UNIFORM, GAUSSIAN)]
        assert {s.crops for s in table if s.fakes != "all"} == {3}, "mask_fakes of each forgery"
        assert {s.crops for s in table if s.fakes == "all"} == {3 * len(dataset.methods)}
        for score in table:
            (overlap, *interval), auc, pointing = (score.values[m] for m in ("iou", "auc", "pointing"))
            assert interval[0] <= overlap <= interval[1]
            if score.map == HEAD and right:
                assert overlap > 0.85
                assert auc[0] > 0.99
                assert pointing[0] == 1
            elif score.map == HEAD:
                assert (overlap, auc[0], pointing[0]) < (0.1, 0.05, 0.1)
            elif score.map == UNIFORM:
                assert auc[0] == 0.5
    masks = dataset.get_masks(np.flatnonzero(dataset.labels)) > 0
    assert iou(np.ones((64, 64), bool), masks[0]) == pytest.approx(masks[0].mean())


def test_without_a_head_or_without_masks_nothing_is_measured(dataset: CropDataset, small: DTN) -> None:
    groups = {"all": dataset.methods}
    assert localisation(TorchScorer(small), dataset, groups, CONFIG) == []
    bare = dataclasses.replace(dataset, masks=None, mask_known=None)
    assert localisation(TorchScorer(DTN(MASKED).eval()), bare, groups, CONFIG) == []
    unknown = dataclasses.replace(dataset, mask_known=dataset.labels == 0)
    assert localisation(TorchScorer(DTN(MASKED).eval()), unknown, groups, CONFIG) == []
    assert evaluate(TorchScorer(small), dataset, CONFIG, masks=True).masks == []


def test_evaluate_prints_and_writes_the_scores_of_masks(crops: Path, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    DTN(MASKED).save_pretrained(tmp_path / "model")
    verb([crops], [tmp_path / "model"], config=CONFIG, out=tmp_path / "test")
    assert "Masks against the data's" in capsys.readouterr().out
    stored = json.loads((tmp_path / "test.json").read_text())["masks"]
    assert {row["map"] for row in stored} == {HEAD, UNIFORM, GAUSSIAN}
    assert all(len(row["values"]["iou"]) == 3 for row in stored)
    assert f"| {HEAD} |" in (tmp_path / "test.md").read_text()


def test_heat_scores_have_a_row_of_the_mask_head(dataset: CropDataset) -> None:
    torch.manual_seed(0)
    steps = heat_scores({"m": DTN(MASKED).eval()}, {"d": dataset}, "test", 4, (), CONFIG)
    found: list[HeatScore] = []

    def run() -> Generator[str, None, None]:
        found.extend((yield from steps))

    list(run())
    assert HEAD in {score.map for score in found}
