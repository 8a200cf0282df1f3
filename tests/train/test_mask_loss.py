"""Training of the mask head: its loss, what it leaves alone, and a painted set that it localises."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import RECIPE, SMALL, changed
from torch import Tensor

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.masks import UNKNOWN
from dtn_fast.data.video_table import Video
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.evaluation.calibration import calibrate
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.heat_scores import GAUSSIAN, HEAD, UNIFORM
from dtn_fast.evaluation.localisation import localisation
from dtn_fast.model.build import load_detector
from dtn_fast.model.config import DTNConfig
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train.config import Execution, Recipe
from dtn_fast.train.distill import distill
from dtn_fast.train.finetune import begin, finetune
from dtn_fast.train.loop import fit
from dtn_fast.train.losses import known_share, mask_loss
from dtn_fast.train.run_lock import locked
from dtn_fast.train.step import TrainStep

CPU = torch.device("cpu")
MASKED = dataclasses.replace(SMALL, mask_head=True)
LEARNS = changed(RECIPE, mask_weight=1.0)


def steps(config: DTNConfig, recipe: Recipe, masks: Tensor | None, teacher: bool = False, **how: Any) -> TrainStep:
    """A step after three updates."""
    torch.manual_seed(0)
    model = DTN(config)
    step = TrainStep(model, recipe, Execution(**how), CPU, DTN(SMALL) if teacher else None)
    step.model.train()
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        crops = torch.randint(256, (8, 64, 64, 3), generator=generator, dtype=torch.uint8)
        torch.manual_seed(number)
        step.last = step(crops, torch.arange(8) % 2, masks=masks)
    return step


def halves(known: Tensor) -> Tensor:
    """Masks whose upper half is forged, UNKNOWN where not ``known``."""
    masks = torch.zeros(8, 8, 8, dtype=torch.uint8)
    masks[:, :4] = 100
    return torch.where(known[:, None, None], masks, torch.tensor(UNKNOWN, dtype=torch.uint8))


def test_the_loss_is_cross_entropy_plus_dice_of_the_known_masks() -> None:
    logits, masks = torch.randn(8, 8, 8), halves(torch.arange(8) < 3)
    wanted = masks[:3].float() / 100
    each = [F.binary_cross_entropy(p, t) + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            for p, t in zip(logits[:3].sigmoid(), wanted, strict=True)]  # fmt: skip
    assert mask_loss(logits, masks, known_share(masks)).item() == pytest.approx(float(sum(each)) / 3, rel=1e-5)
    right = (wanted * 2 - 1).repeat(3, 1, 1)[:8] * 30
    one, none = torch.ones(1), torch.zeros(1)
    assert mask_loss(right, halves(torch.ones(8, dtype=torch.bool)), one).item() < 1e-3
    assert mask_loss(torch.full((8, 8, 8), -30.0), torch.zeros(8, 8, 8, dtype=torch.uint8), one).item() < 1e-3
    assert mask_loss(logits, halves(torch.zeros(8, dtype=torch.bool)), none).item() == 0
    parts = [mask_loss(p, m, known_share(masks)) for p, m in zip(logits.chunk(2), masks.chunk(2), strict=True)]
    assert sum(parts) / 2 == pytest.approx(mask_loss(logits, masks, known_share(masks)).item()), "as the whole batch's"


@pytest.mark.parametrize("teacher", [False, True])
def test_masks_that_are_not_known_give_no_gradient_and_leave_the_step_as_without_the_head(teacher: bool) -> None:
    plain = steps(SMALL, RECIPE, None, teacher)
    blind = steps(MASKED, LEARNS, halves(torch.zeros(8, dtype=torch.bool)), teacher)
    assert "mask" not in plain.names
    assert "mask" in blind.names
    own, other = plain.model.state_dict(), blind.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own), "to the bit"
    assert blind.model.mask_head is not None
    assert all(p.grad is not None and not p.grad.any() for p in blind.model.mask_head.parameters())
    seeing = steps(MASKED, LEARNS, halves(torch.arange(8) < 4), teacher)
    assert any(p.grad.any() for p in seeing.model.mask_head.parameters())
    assert not torch.equal(seeing.model.backbone[0].weight, blind.model.backbone[0].weight), "trains what is below it"


def test_accumulated_and_traced_steps_and_features_are_the_same_training(monkeypatch) -> None:
    still = changed(LEARNS, accumulate=1)
    quiet = dataclasses.replace(MASKED, noise_std=0.0)
    known = halves(torch.ones(8, dtype=torch.bool))
    one = steps(quiet, still, known)
    names = one.names.index("mask")
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)  # traces as any backend would, in seconds
    monkeypatch.setattr(torch, "compile", whole)
    traced = steps(quiet, still, known, compile="on")
    torch.testing.assert_close(traced.last.values, one.last.values, rtol=1e-3, atol=1e-3)
    parts = steps(quiet, changed(LEARNS, accumulate=2), known)
    assert parts.last.values[names] == pytest.approx(one.last.values[names].item(), rel=0.05)
    some = halves(torch.arange(8) < 3)  # in the first of two parts alone
    whole, halved = (steps(quiet, changed(still, accumulate=count), some).last.values[names] for count in (1, 2))
    assert halved == pytest.approx(whole.item(), rel=0.05)
    features = steps(quiet, changed(LEARNS, center_on="features"), known)
    assert features.last.values[names] == pytest.approx(one.last.values[names].item(), rel=0.05)


def test_a_head_that_is_missing_or_not_trained_is_told() -> None:
    with pytest.raises(UsageError, match="--mask-weight 1: the model has no mask head"):
        TrainStep(DTN(SMALL), LEARNS, Execution(), CPU)
    with pytest.warns(DtnWarning, match="the mask head stays as it is"):
        step = steps(MASKED, RECIPE, None)
    torch.manual_seed(0)
    before = DTN(MASKED).mask_head
    assert before is not None
    assert step.model.mask_head is not None
    for own, other in zip(before.parameters(), step.model.mask_head.parameters(), strict=True):
        assert torch.equal(own, other)


def spotted(count: int = 96) -> CropDataset:
    """Crops of noise; each fake has a square of stripes somewhere, which its mask marks."""
    rng = np.random.default_rng(0)
    crops = rng.integers(90, 160, (count, 64, 64, 3), dtype=np.uint8)
    masks = np.zeros((count, 64, 64), np.uint8)
    fake = np.arange(count) % 2 == 1
    for place in np.flatnonzero(fake):
        y, x = rng.integers(0, 36, 2)
        masks[place, y : y + 28, x : x + 28] = 255
        crops[place, y : y + 28 : 4, x : x + 28] = 255
    number = np.arange(count)
    split = [("train", "train", "val", "test")[4 * place // count] for place in range(count)]
    videos = [Video(str(n), int(f), "Spot" if f else "real", s) for n, f, s in zip(number, fake, split, strict=True)]
    state = {"faces": 1, "frames": 1, "asked": 1, "boxes": "own", "error": None}
    return CropDataset(
        ShardFiles([crops], 64), number, 0 * number, 0 * number, videos, [state] * count, False,
        masks=ShardFiles([np.packbits(masks >= 64, axis=2)], 64), mask_known=number >= 0,
    )  # fmt: skip


def test_a_painted_region_is_localised(tmp_path: Path) -> None:
    data = spotted()
    recipe = changed(LEARNS, epochs=12, lr=3e-3, augment="none", lr_step=20)
    torch.manual_seed(0)
    model = DTN(MASKED)
    events = list(fit(model, data, recipe, tmp_path))
    assert "mask" in events[0].losses
    assert events[-1].losses["mask"] < events[0].losses["mask"] / 2
    scores = {s.map: s for s in localisation(TorchScorer(model.eval()), data, {"Spot": ("Spot",)}, EvaluateConfig())}
    assert set(scores) == {HEAD, UNIFORM, GAUSSIAN}
    iou = {name: score.values["iou"][0] for name, score in scores.items() if score.values["iou"]}
    assert iou[UNIFORM] == pytest.approx(28**2 / 64**2, abs=0.01)
    assert iou[HEAD] > 2 * max(iou[UNIFORM], iou[GAUSSIAN])
    blind = dataclasses.replace(data, mask_known=data.labels == 0)
    with pytest.raises(UsageError, match="--mask-weight: no fake of the train split has a known mask"):
        list(fit(DTN(MASKED), blind, recipe, tmp_path / "blind"))


def test_fine_tuning_adds_a_head_to_a_model_without_one_and_students_keep_it(tmp_path: Path) -> None:
    data, source = spotted(), tmp_path / "source"
    torch.manual_seed(0)
    DTN(SMALL).save_pretrained(source)
    recipe = changed(LEARNS, epochs=1, augment="none", student_centers="new")
    with locked(tmp_path / "run"):
        begin(tmp_path / "run", source, recipe)
        begin(tmp_path / "run", source, recipe)  # as a resumed run does
    list(finetune(tmp_path / "run", data))
    events = list(distill(tmp_path / "run", data, recipe=dataclasses.replace(recipe, generations=1)))
    assert "mask" in events[0].losses
    model = load_detector(tmp_path / "run/generation-1")
    assert TorchScorer(model).judge(data.get(np.arange(2))).mask is not None
    assert model.config.trained_on.recipe.endswith("distilled by CE + KD + Ct-c + mask, augmentation none")
    with pytest.raises(
        UsageError, match="--mask-weight 1: the model has no mask head; dtn-fast train and finetune add"
    ):
        TrainStep(load_detector(source), LEARNS, Execution(), CPU)


def test_fine_tuning_adds_a_head_to_a_calibrated_model(dataset: CropDataset, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    list(calibrate(source, Path(dataset.folder)))
    with locked(tmp_path / "run"):
        begin(tmp_path / "run", source, LEARNS)
    teacher, before = load_detector(tmp_path / "run/teacher"), load_model(source)
    assert teacher.mask_head is not None
    crops = dataset.get(np.arange(4))
    wanted, found = TorchScorer(before).judge(crops), TorchScorer(teacher).judge(crops)
    assert np.array_equal(found.score, wanted.score), "by the same temperature"
    assert np.array_equal(found.novelty, wanted.novelty)
