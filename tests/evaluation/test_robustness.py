"""Corruption by level by model: figures against a direct computation, resumable, refused where it must be."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.data.config import PrepareConfig, Source, WorkConfig, trained_corruptions
from dtn_fast.data.corrupt import LEVELS, corrupt, corrupt_video
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles, open_crop_dataset
from dtn_fast.data.datasets import read
from dtn_fast.data.prepare import prepare
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.evaluation.config import FIGURE5, RobustnessConfig
from dtn_fast.evaluation.metrics import by_video, evaluate_scores
from dtn_fast.evaluation.robustness import OLD_RULE, robustness, seen
from dtn_fast.export.pipeline import export
from dtn_fast.model.config import CropPolicy, TrainedOn
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


def measured(out: Path) -> dict:
    return json.loads((out / "robustness.json").read_text())["auc"]


def test_the_papers_corruptions() -> None:
    printed = ("saturation", "contrast", "blocks", "uniform_noise", "blur", "pixelation", "video", "jpeg")
    assert printed == FIGURE5


def test_figures_are_those_of_corrupted_crops(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    states = list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("blocks", "jpeg"), (0, 2, 5))))
    assert [s.name for s in states] == ["untouched", "blocks 2", "blocks 5", "jpeg 2", "jpeg 5", ""]
    assert states[-1].done == states[-1].total == 5
    got, rows = measured(tmp_path), dataset.select("test")
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
    with pytest.warns(DtnWarning, match="forensic: was trained on jpeg: no unseen corruptions"):
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
    assert {seen(geometry.config, kind) for kind in (*FIGURE5, "h264_still")} == {"no"}, "Figure 5's are all unseen"
    assert PRESETS["robustness"].recipe == dataclasses.replace(PRESETS["ffpp-c23"].recipe, augment="geometry")


def test_training_writes_what_it_was_on(dataset: CropDataset, trained: Path, tmp_path: Path) -> None:
    """Into every checkpoint and exported file; of a run of an earlier version its recipe says it."""
    now = load_scorer(trained).config.trained_on
    forensic = ("blur", "contrast", "gaussian_noise", "jpeg", "uniform_noise")
    said = "CE + Ct-c; from scratch; augmentation forensic"
    assert now == TrainedOn(dataset.methods, forensic, said)
    export(trained, tmp_path / "model.onnx")
    assert load_scorer(tmp_path / "model.onnx").config.trained_on == now
    assert load_scorer(OLD / "run").config.trained_on == TrainedOn((), forensic)
    assert load_scorer(OLD / "model.onnx").config.trained_on is None
    one = changed(RECIPE, augment="geometry", methods=dataset.methods[:1])
    assert run_folder.trained_on(one, dataset) == TrainedOn(
        dataset.methods[:1], (), said.replace("forensic", "geometry")
    )
    videos = [v._replace(corruptions=(("blocks", 2),)) if v.split == "train" else v for v in dataset.videos]
    perturbed = dataclasses.replace(dataset, videos=videos)
    assert run_folder.trained_on(one, perturbed).corruptions == ("blocks",)
    blend = changed(RECIPE, augment="none", self_blend=True)
    recoloured, blends = ("contrast", "pixelation", "saturation"), "none, self-blended fakes"
    expected = TrainedOn(("SelfBlended",), recoloured, said.replace("forensic", blends))
    assert run_folder.trained_on(blend, dataset) == expected
    half = changed(blend, blend_share=0.5, methods=dataset.methods[:1])
    assert run_folder.trained_on(half, dataset).forgeries == tuple(sorted((dataset.methods[0], "SelfBlended")))


def test_what_is_there_is_not_measured_again(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    whole, name = tmp_path / "whole", "model <0>"
    list(robustness(scorers, dataset, whole, RobustnessConfig(("jpeg",), (0, 1, 2))))
    events = robustness({name: scorers[name]}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2)))
    for state in events:
        if state.done == 2:
            events.close()
    before = measured(tmp_path / "paused")
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
    assert measured(tmp_path / "paused")[name] == measured(whole)["model <1>"], "another model under the same name"
    list(robustness({name: counting}, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    list(robustness(scorers, dataset, tmp_path / "paused", RobustnessConfig(("jpeg",), (0, 1, 2))))
    assert measured(tmp_path / "paused") == measured(whole)


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
        figures.append(measured(tmp_path)["same"])
    assert figures[0] != figures[1]


def test_other_pixels_are_other_data(scorers: dict, dataset: CropDataset, tmp_path: Path) -> None:
    list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("jpeg",), (0,))))
    everything = np.arange(len(dataset.video))
    again = dataclasses.replace(dataset, crops=ShardFiles([255 - dataset.get(everything)], dataset.size))
    with pytest.raises(UsageError, match="other data, split or seed"):
        list(robustness(scorers, again, tmp_path, RobustnessConfig(("jpeg",), (0,))))


@pytest.fixture(scope="module")
def whole(video_set: Path, tmp_path_factory: pytest.TempPathFactory) -> CropDataset:
    """Crops of the test videos, coded anew at levels 1 and 5 before faces were found."""
    out = tmp_path_factory.mktemp("whole")
    table = read(video_set, Source(splits=("test",), corrupt=("video",), corrupt_levels=(1, 5)))
    for _ in prepare(table, out, SMALL.image_size, PrepareConfig(frames=3), WorkConfig()):
        pass
    return open_crop_dataset(out)


def test_whole_videos_are_compressed_before_faces_are_found(
    video_set: Path, whole: CropDataset, scorers: dict, dataset: CropDataset, tmp_path: Path
) -> None:
    """The crops are those of a dataset whose videos were coded anew on disk, and what is measured is theirs."""
    for video in read(video_set, Source(splits=("test",))).videos:
        for _ in corrupt_video(video_set / video.path, tmp_path / "set" / video.path, [("video", 5)], 0):
            pass
    shutil.copytree(video_set / "splits", tmp_path / "set" / "splits")
    table = read(tmp_path / "set", Source(splits=("test",), allow=("counts",)))
    table = dataclasses.replace(table, videos=[v._replace(mask="") for v in table.videos])
    for _ in prepare(table, tmp_path / "crops", SMALL.image_size, PrepareConfig(frames=3), WorkConfig()):
        pass
    coded = open_crop_dataset(tmp_path / "crops")
    at = lambda level: np.flatnonzero([whole.videos[v].corruptions == (("video", level),) for v in whole.video])
    by_name = lambda d, rows: {(d.videos[d.video[r]].path, int(d.frame[r])): d.get([r])[0] for r in rows}
    theirs, ours = by_name(coded, range(len(coded.video))), by_name(whole, at(5))
    assert ours.keys() == theirs.keys() == by_name(dataset, dataset.select("test")).keys()
    same = [np.array_equal(ours[name], theirs[name]) for name in ours]
    assert np.mean(same) == 1

    list(robustness(scorers, dataset, tmp_path / "out", RobustnessConfig((), (0, 5)), None))
    before = measured(tmp_path / "out")["model <0>"]
    assert "h264_still 5" in before
    assert "video 5" not in before
    list(robustness(scorers, dataset, tmp_path / "out", RobustnessConfig((), (0, 1, 5)), whole))
    after = measured(tmp_path / "out")["model <0>"]
    for level in (1, 5):
        rows = at(level)
        scores, labels = scorers["model <0>"].score(whole.get(rows)), whole.labels[rows]
        assert after[f"video {level}"]["frame"] == evaluate_scores(labels, scores, 0.5).auc
    assert after["h264_still 5"] == before["h264_still 5"]
    assert after["untouched"] == before["untouched"]
    text = (tmp_path / "out/robustness.md").read_text()
    assert "| video | not recorded |" in text
    assert "h264_still |" not in text
    assert "whole videos without a face, not scored: video 1: 0, video 5: 0; test split" in text
    both = RobustnessConfig(("h264_still", "video"), (5,))
    list(robustness(scorers, dataset, tmp_path / "out", both, whole))
    assert "| h264_still |" in (tmp_path / "out/robustness.md").read_text()


def test_other_corruptions_of_whole_videos_are_named_so(
    whole: CropDataset, scorers: dict, dataset: CropDataset, tmp_path: Path
) -> None:
    videos = [v._replace(corruptions=(("blur", v.corruptions[0][1]),)) for v in whole.videos]
    crops = ShardFiles([255 - whole.get(np.arange(len(whole.video)))], whole.size)
    blurred = dataclasses.replace(whole, videos=videos, crops=crops)
    list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("blur", "jpeg"), (5,)), blurred))
    assert set(measured(tmp_path)["model <0>"]) == {"blur of videos 5", "jpeg 5"}
    with pytest.raises(UsageError, match="other data"):
        list(robustness(scorers, dataset, tmp_path, RobustnessConfig(("video",), (5,)), whole))


def test_other_videos_than_the_crops_are_refused(
    whole: CropDataset, scorers: dict, dataset: CropDataset, tmp_path: Path
) -> None:
    def refused(said: str, videos: CropDataset | None, kinds: tuple[str, ...] = ("video",), level: int = 5) -> None:
        with pytest.raises(UsageError, match=said):
            list(robustness(scorers, dataset, tmp_path, RobustnessConfig(kinds, (level,)), videos))

    refused("--kinds video: needs crops of videos that were coded anew: dtn-fast prepare", None)
    refused("not crops of corrupted videos; make them by dtn-fast prepare --corrupt", dataset)
    refused("holds no video at level 2; prepare it", whole, level=2)
    fewer = [v for n, v in enumerate(whole.videos) if n not in (0, 1)]
    refused("video 1 is of other videos than the test split", dataclasses.replace(whole, videos=fewer))
    wide = dataclasses.replace(whole, crop=CropPolicy(margin=1.7))
    refused(r"cut in another way \(64 pixels, dlib at margin 1.7\)", wide)
    longer = dataclasses.replace(whole, status=[{**state, "asked": 8} for state in whole.status])
    refused("of 8 frames a video, the crops are of 3; prepare them with --frames 3", longer)
    keep = whole.labels == 1
    fakes = dataclasses.replace(whole, crops=ShardFiles([whole.get(np.flatnonzero(keep))], 64), video=whole.video[keep])
    refused("no face of reals or of fakes was found with video 1", fakes)


def test_results_of_an_earlier_version_called_the_quick_form_video(
    scorers: dict, dataset: CropDataset, tmp_path: Path
) -> None:
    some = RobustnessConfig(("h264_still",), (0, 5))
    list(robustness(scorers, dataset, tmp_path, some))
    path, now = tmp_path / "robustness.json", measured(tmp_path)
    stored = json.loads(path.read_text().replace("h264_still 5", "video 5"))
    path.write_text(json.dumps({key: stored[key] for key in ("data", "probes", "auc")} | {"rule": OLD_RULE}))
    list(robustness(scorers, dataset, tmp_path, some))
    assert measured(tmp_path) == now


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
