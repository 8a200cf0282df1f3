"""Corruption by level by model: figures against a direct computation, resumable, refused where it must be."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.data.config import trained_corruptions
from dtn_fast.data.corrupt import LEVELS, corrupt
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.evaluation.config import RobustnessConfig
from dtn_fast.evaluation.metrics import by_video, evaluate_scores
from dtn_fast.evaluation.robustness import robustness, seen
from dtn_fast.export.pipeline import export
from dtn_fast.model.config import TrainedOn
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import run_folder
from dtn_fast.train.config import PRESETS


@pytest.fixture(scope="module")
def scorers() -> dict[str, TorchScorer]:
    models = {}
    for seed in range(2):
        torch.manual_seed(seed)
        models[f"model <{seed}>"] = TorchScorer(DTN(SMALL).eval())
    return models


def read(out: Path) -> dict:
    return json.loads((out / "robustness.json").read_text())["auc"]


def test_the_papers_corruptions() -> None:
    printed = ("saturation", "contrast", "blocks", "uniform_noise", "blur", "pixelation", "video", "jpeg")
    assert RobustnessConfig.kinds == printed


def test_figures_are_those_of_corrupted_crops(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    states = list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("blocks", "jpeg"), (0, 2, 5))))
    assert [s.name for s in states] == ["untouched", "blocks 2", "blocks 5", "jpeg 2", "jpeg 5", ""]
    assert states[-1].done == states[-1].total == 5
    got, rows = read(tmp_path), dataset.select("test")
    labels, videos = dataset.labels[rows], dataset.video[rows].astype(str)
    for name, scorer in scorers.items():
        assert set(got[name]) == {"untouched", "blocks 2", "blocks 5", "jpeg 2", "jpeg 5"}
        for cell, kind, level in (("untouched", "", 0), ("blocks 5", "blocks", 5), ("jpeg 2", "jpeg", 2)):
            crops = dataset.get(rows)
            if level:
                place = list(LEVELS).index(kind)
                crops = np.stack(
                    [corrupt(c, kind, level, (0, int(r), place, level)) for c, r in zip(crops, rows, strict=True)]
                )
            scores = scorer.score(crops)
            assert got[name][cell]["frame"] == evaluate_scores(labels, scores, 0.5).auc
            assert got[name][cell]["video"] == evaluate_scores(*by_video(videos, labels, scores), 0.5).auc
    table = (tmp_path / "robustness.md").read_text()
    value = got["model <0>"]["jpeg 5"]["frame"]
    mean = (got["model <0>"]["blocks 5"]["frame"] + value) / 2
    assert f"| {value:.4f} |\n| mean" in table
    assert f"{mean:.4f} |" in table
    picture = (tmp_path / "robustness.svg").read_text()
    assert picture.count("<svg") == 1
    assert "<!-- model &lt;1&gt; -->" in picture
    assert "test split, 10 videos (2 real, 8 fake), 3.0 frames each on average, one face of a frame;" in table
    list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("blocks", "jpeg"), (0, 2, 5))))
    assert (tmp_path / "robustness.svg").read_text() == picture


OLD = Path(__file__).parents[1] / "old_files"


def trained_on(kinds: tuple[str, ...] | None, **model: Any) -> TorchScorer:
    facts = None if kinds is None else TrainedOn(("x",), kinds)
    return TorchScorer(DTN(dataclasses.replace(SMALL, trained_on=facts, **model)).eval())


def test_each_corruption_says_whether_the_model_was_trained_on_it(dataset: CropDataset, tmp_path: Path) -> None:
    models = {
        "unseen": trained_on(()), "forensic": trained_on(("contrast", "jpeg")), "old": trained_on(None),
        "gate": trained_on((), noise="blur"),
    }  # fmt: skip
    kinds = ("jpeg", "blur", "gaussian_noise")
    with pytest.warns(DtnWarning, match="forensic: was trained on jpeg, gaussian_noise: no unseen corruptions"):
        list(robustness(models, dataset, tmp_path, RobustnessConfig(kinds, (0,))))
    stored = json.loads((tmp_path / "robustness.json").read_text())["trained on"]
    assert stored == {
        "unseen": {"jpeg": "no", "blur": "no", "gaussian_noise": "in the gate"},
        "forensic": {"jpeg": "yes", "blur": "no", "gaussian_noise": "in the gate"},
        "old": {"jpeg": "not recorded", "blur": "not recorded", "gaussian_noise": "in the gate"},
        "gate": {"jpeg": "no", "blur": "in the gate", "gaussian_noise": "no"},
    }
    text = (tmp_path / "robustness.md").read_text()
    assert "| corruption | trained on it | level 0 |" in text
    assert [text.count(f"| jpeg | {state} |") for state in ("no", "yes", "not recorded")] == [2, 1, 1]
    assert text.count("| mean of the unseen | no |") == 3, "of the old model nothing is known to be unseen"
    picture = (tmp_path / "robustness.svg").read_text()
    for title in ("jpeg (trained on: 1 of 4, not recorded: 1)", "blur (trained on: 1 of 4, not recorded: 1)",
                  "gaussian_noise (trained on: 3 of 4)", "hollow marker: trained on this corruption"):  # fmt: skip
        assert f"<!-- {title}" in picture
    geometry = trained_on(tuple(trained_corruptions("geometry", False)))
    assert {seen(geometry.config, kind) for kind in RobustnessConfig.kinds} == {"no"}, "Figure 5's are all unseen"
    assert PRESETS["robustness"].recipe == dataclasses.replace(PRESETS["ffpp-c23"].recipe, augment="geometry")


def test_training_writes_what_it_was_on(dataset: CropDataset, trained: Path, tmp_path: Path) -> None:
    """Into every checkpoint and exported file; of a run of an earlier version its recipe says it."""
    now = load_scorer(trained).config.trained_on
    forensic = ("blur", "contrast", "gaussian_noise", "jpeg", "uniform_noise")
    assert now == TrainedOn(dataset.methods, forensic)
    export(trained, tmp_path / "model.onnx")
    assert load_scorer(tmp_path / "model.onnx").config.trained_on == now
    assert load_scorer(OLD / "run").config.trained_on == TrainedOn((), forensic)
    assert load_scorer(OLD / "model.onnx").config.trained_on is None
    one = changed(RECIPE, augment="geometry", methods=dataset.methods[:1])
    assert run_folder.trained_on(one, dataset) == TrainedOn(dataset.methods[:1], ())
    videos = [v._replace(corruptions=(("blocks", 2),)) if v.split == "train" else v for v in dataset.videos]
    perturbed = dataclasses.replace(dataset, videos=videos)
    assert run_folder.trained_on(one, perturbed).corruptions == ("blocks",)
    blend = changed(RECIPE, augment="none", self_blend=True)
    assert run_folder.trained_on(blend, dataset) == TrainedOn(
        ("SelfBlended",), ("contrast", "pixelation", "saturation")
    )
    half = changed(blend, blend_share=0.5, methods=dataset.methods[:1])
    assert run_folder.trained_on(half, dataset).forgeries == tuple(sorted((dataset.methods[0], "SelfBlended")))


def test_what_is_there_is_not_measured_again(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    whole, name = tmp_path / "whole", "model <0>"
    list(robustness(scorers, dataset, whole, RobustnessConfig(("jpeg",), (0, 1, 2))))
    events = robustness({name: scorers[name]}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2)))
    for state in events:
        if state.done == 2:
            events.close()
    before = read(tmp_path / "paused")
    assert set(before[name]) == {"untouched", "jpeg 1"}
    path = tmp_path / "paused" / "robustness.json"
    path.write_text(re.sub(r'("videos": "\w{16})-\w{8}"', r'\1"', path.read_text()))  # as earlier versions wrote it

    class Counting(TorchScorer):
        asked = 0

        def score(self, crops):
            Counting.asked += 1
            return super().score(crops)

    counting = Counting(scorers[name].model)
    list(robustness({name: counting}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    assert Counting.asked == 1, "the one cell that was missing"
    list(robustness({name: scorers["model <1>"]}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    assert read(tmp_path / "paused")[name] == read(whole)["model <1>"], "another model under the same name"
    list(robustness({name: counting}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    list(robustness(scorers, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    assert read(tmp_path / "paused") == read(whole)


def test_another_model_that_is_as_sure_is_another(dataset: CropDataset, tmp_path: Path) -> None:
    """Scores of a trained model are 0.0000 on easy crops; logits tell models apart."""
    figures = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = DTN(SMALL).eval()
        with torch.no_grad():
            model.head.bias[0] += 30
        scorer = TorchScorer(model)
        assert scorer.score(dataset.get(dataset.select("test"))).max() < 1e-9
        list(robustness({"same": scorer}, dataset, tmp_path, RobustnessConfig(("jpeg",), (0,))))
        figures.append(read(tmp_path)["same"])
    assert figures[0] != figures[1]


def test_other_pixels_are_other_data(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("jpeg",), (0,))))
    everything = np.arange(len(dataset.video))
    again = dataclasses.replace(dataset, crops=ShardFiles([255 - dataset.get(everything)], dataset.size))
    with pytest.raises(UsageError, match="other data, split or seed"):
        list(robustness(scorers, again, tmp_path, RobustnessConfig(("jpeg",), (0,))))


def test_refusals(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    def run(scorers=scorers, **how) -> None:
        list(robustness(scorers, dataset, tmp_path, RobustnessConfig(**{"levels": (0,), **how})))

    run(kinds=("jpeg",))
    for how, message in (
        ({"kinds": ("fog",)}, "unknown corruption"),
        ({"levels": (6,)}, "--levels 6"),
        ({"levels": ()}, "--levels : name at least one"),
        ({"kinds": ("blur", "blur")}, "--kinds blur blur: name at least one, and each once"),
        ({"split": "nowhere"}, "needs reals and fakes"),
        ({"seed": 3}, "other data, split or seed"),
        ({"split": "val"}, "other data, split or seed"),
        ({"scorers": {"big": TorchScorer(DTN(SMALL.preset("tiny")).eval())}}, "big: takes 128 pixels"),
    ):
        with pytest.raises(UsageError, match=message):
            run(**how)
    whole = json.loads((tmp_path / "robustness.json").read_text())
    for damage in ([1], {**whole, "auc": [1]}, {**whole, "auc": {"model <0>": {"untouched": 0.5}}}):
        (tmp_path / "robustness.json").write_text(json.dumps(damage))
        with pytest.raises(UsageError, match="damaged"):
            run()
