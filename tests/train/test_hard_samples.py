"""Wrong and ambiguous samples: the right ones are weighted, drawn and turned more, and a pause changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small import RECIPE, SMALL, changed
from torch import Tensor

from dtn_fast import DTN
from dtn_fast.data.config import AUGMENTATIONS, NO_AUGMENTATION, turned_more
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Loader
from dtn_fast.errors import UsageError
from dtn_fast.runtime.load import load_model
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import hard_samples, loop, losses
from dtn_fast.train.checkpoint import load_state
from dtn_fast.train.config import Execution
from dtn_fast.train.hard_samples import SAMPLES, emphasis_of, is_ambiguous, told, weights_of
from dtn_fast.train.loop import Step, Stopped, fit
from dtn_fast.train.step import TrainStep

LABELS = np.array([0, 0, 0, 1, 1, 1])
SCORES = np.array([0.1, 0.9, 0.5, 0.8, 0.3, 0.45])  # right, wrong, wrong, right, wrong, wrong
CPU = torch.device("cpu")


def test_wrong_samples_weigh_more_by_hand() -> None:
    raw = np.array([1 + 2 * w**2 for w in (0.1, 0.9, 0.5, 0.2, 0.7, 0.55)])
    focal = raw / raw.mean()
    recipe = changed(RECIPE, error_weights="focal", error_factor=3.0, focal_gamma=2.0)
    np.testing.assert_allclose(weights_of(LABELS, SCORES, recipe), focal)
    boosted = weights_of(LABELS, SCORES, changed(recipe, error_weights="boosted"))
    np.testing.assert_allclose(boosted, np.array([1, 3, 3, 1, 3, 3]) * 3 / 7)
    later = weights_of(LABELS, 1 - SCORES, changed(recipe, error_weights="boosted"), boosted)
    np.testing.assert_allclose(later[:3] / later[0], [1, 1, 3])  # wrong once, once, twice (a half is fake)
    np.testing.assert_allclose(later[3:] / later[3], [1, 1, 1])
    assert weights_of(LABELS, SCORES, RECIPE).tolist() == [1] * 6
    for found in (focal, boosted, later):
        assert found.mean() == pytest.approx(1)
    biased = weights_of(np.array([0, 1, 1, 1]), np.full(4, 0.9), changed(recipe, error_weights="boosted"))
    np.testing.assert_allclose(biased, [1.5, 0.5, 0.5, 0.5])  # reals are repeated as often as balances the classes


def test_ambiguous_samples_are_near_a_half() -> None:
    assert is_ambiguous(SCORES, changed(RECIPE, ambiguous=0.2)).tolist() == [False, False, True, False, True, True]
    assert not is_ambiguous(np.array([0.5]), RECIPE).any(), "none unless asked for"


def test_weights_are_in_the_terms_of_the_label_alone() -> None:
    logits, teacher, labels = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    samples, centers = torch.tensor([3.0, 0.5, 0.0, 0.5]), torch.eye(2)
    how = (centers, RECIPE.weights, 2.0, 1.0)
    found = losses.dsd_loss(logits, labels, teacher, *how, None, samples)
    alone = [losses.dsd_loss(logits[i : i + 1], labels[i : i + 1], teacher[i : i + 1], *how) for i in range(4)]
    for name, weights in (("ce", samples), ("center", samples), ("kd", torch.ones(4))):
        expected = sum(float(w) * float(term[name]) for w, term in zip(weights, alone, strict=True)) / 4
        assert float(found[name]) == pytest.approx(expected, rel=1e-5), name
    ones = losses.dsd_loss(logits, labels, teacher, *how, None, torch.ones(4))
    torch.testing.assert_close(ones, losses.dsd_loss(logits, labels, teacher, *how))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_follows_its_samples_weights(accumulate: int) -> None:
    """A sample of weight 0 without KD leaves the gradient alone: its label may be either."""
    torch.manual_seed(0)
    recipe, model = changed(RECIPE, accumulate=accumulate, weights=(4.0, 0.0, 0.6)), DTN(SMALL).eval()
    crops = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    labels, samples = torch.arange(8) % 2, torch.tensor([0.0, 2, 0, 2, 2, 0, 1, 1])
    flipped = torch.where(samples == 0, 1 - labels, labels)

    def trained(given: Tensor) -> Tensor:
        step = TrainStep(load_copy(model), recipe, Execution(), CPU, load_copy(model))
        step.model.eval()  # no noise
        step(crops, given, None, samples)
        return step.model.head.weight.detach().clone()

    assert torch.equal(trained(labels), trained(flipped))
    assert not torch.equal(trained(labels), trained(1 - labels))


def load_copy(model: DTN) -> DTN:
    other = DTN(SMALL)
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module")
def band(trained: Path, dataset: CropDataset) -> float:
    """Distance from 0.5 within which the teacher's scores of four in ten training crops lie."""
    scores = TorchScorer(load_model(trained)).score_rows(dataset, dataset.select("train"))
    return float(np.quantile(np.abs(scores - 0.5), 0.4))


def test_the_teachers_errors_are_found_and_drawn(
    trained: Path, dataset: CropDataset, tmp_path: Path, band: float
) -> None:
    recipe = changed(RECIPE, error_weights="boosted", ambiguous=band, ambiguous_draws=3)
    teacher, rows = load_model(trained), dataset.select("train")
    scores = TorchScorer(teacher).score_rows(dataset, rows)
    near = rows[np.abs(scores - 0.5) <= band]
    assert 0 < len(near) < len(rows), "the case has both kinds"
    found = emphasis_of(teacher, dataset, rows, recipe, (tmp_path / "0", tmp_path / "1"), CPU)
    assert found is not None
    assert np.flatnonzero(found.strongly).tolist() == near.tolist()
    wrong = (scores >= 0.5) != dataset.labels[rows]
    text = told(tmp_path / "1", recipe)
    assert f"{wrong.sum()} of {len(rows)} training crops wrong; they weigh " in text
    assert f"; {len(near)} are ambiguous, drawn 3 times" in text
    assert told(tmp_path / "0", recipe) == ""
    assert wrong.any()
    assert not wrong.all()
    np.testing.assert_allclose(found.weights[rows[wrong]], 3 * found.weights[rows[~wrong]][0], rtol=1e-6)
    loader = Loader(dataset, rows, 4, (0,), 1, emphasis=found)
    batches = list(loader.epoch(0))
    drawn = np.bincount(np.concatenate([b.rows for b in batches]), minlength=len(found.weights))
    assert drawn[near].min() >= 2, "three times, but for the last samples that fill no batch"
    assert drawn[np.setdiff1d(rows, near)].max() == 1
    assert loader.total == len(rows) + 2 * len(near)
    for batch in batches:
        assert batch.weights is not None
        assert batch.strongly is not None
        assert batch.weights.tolist() == found.weights[batch.rows].tolist()
        assert batch.strongly.tolist() == np.isin(batch.rows, near).tolist()
    assert emphasis_of(teacher, dataset, rows, RECIPE, (tmp_path, tmp_path), CPU) is None


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_only_ambiguous_crops_are_turned(
    trained: Path, dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, band: float
) -> None:
    """With no other augmentation, the crops that reach the step are the data's own except the ambiguous ones; the step
    gets the weight of each."""
    recipe = changed(RECIPE, epochs=1, ambiguous=band, ambiguous_draws=1, augment="none", augment_on=where)
    recipe = changed(recipe, error_weights="focal", focal_gamma=1.0)
    seen: list[tuple[Tensor, Tensor]] = []
    real = TrainStep.__call__

    def spy(self, crops, labels, soft, samples, masks):
        seen.append((crops.clone(), samples.clone()))
        return real(self, crops, labels, soft, samples, masks)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    taken = []
    epoch = Loader.epoch

    def watched(self, *given):
        for batch in epoch(self, *given):
            taken.append(batch)
            yield batch

    monkeypatch.setattr(Loader, "epoch", watched)
    list(fit(load_model(trained), dataset, recipe, tmp_path / "generation-1", load_model(trained), 1))
    same: dict[bool, list[bool]] = {True: [], False: []}
    with np.load(tmp_path / "generation-1" / SAMPLES) as file:
        weight = dict(zip(file["rows"].tolist(), file["weights"].tolist(), strict=True))
    assert len(set(weight.values())) > 2
    for (crops, samples), batch in zip(seen, taken, strict=True):
        assert samples.tolist() == pytest.approx([weight[row] for row in batch.rows.tolist()])
        own = dataset.get(batch.rows)
        for mine, given, kind in zip(crops.numpy(), own, batch.strongly.tolist(), strict=True):
            same[kind].append(np.array_equal(mine, given))
    assert all(same[False])
    assert len(same[True]) > 1
    assert not any(same[True])


def test_more_is_rotation_flipping_and_scaling() -> None:
    for preset in (*AUGMENTATIONS.values(), None):
        base, more = preset or NO_AUGMENTATION, turned_more(preset)
        assert (more.shift_scale_rotate, more.flip) == (1.0, 0.5)
        assert more.rotate > base.rotate
        assert more.scale > base.scale
        rest = ("blur", "noise", "compression", "brightness_contrast", "quality")
        assert [getattr(more, name) for name in rest] == [getattr(base, name) for name in rest]


@pytest.mark.parametrize("kind", ["focal", "boosted"])
def test_a_pause_changes_nothing(
    trained: Path, dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, band: float
) -> None:
    recipe = changed(RECIPE, epochs=1, error_weights=kind, ambiguous=band, ema=0.5, cache_teacher=2)
    rows = dataset.select("train")
    run = lambda name, **how: list(
        fit(load_model(trained), dataset, recipe, tmp_path / name / "generation-2", load_model(trained), 2,
            centers=torch.tensor([[1.0, 0.5], [0.2, 2.0]]), **how)
    )  # fmt: skip
    for name in ("whole", "paused", "plain"):  # weights of the generation before, to be multiplied
        (tmp_path / name / "generation-1").mkdir(parents=True)
        np.savez(tmp_path / name / "generation-1" / SAMPLES, rows=rows, scores=rows * 0.0, weights=1 + rows % 3)
    events = run("whole")
    stops = iter([0, 0, 15])
    with pytest.raises(Stopped):
        run("paused", stop=lambda: next(stops), execution=Execution(save_every=0))
    monkeypatch.setattr(hard_samples, "TorchScorer", None)  # the stored samples are read, not found again
    resumed = run("paused")
    assert [e.step for e in resumed if isinstance(e, Step)] == [e.step for e in events if isinstance(e, Step)][3:]
    a, b = (load_state(tmp_path / name / "generation-2" / loop.STATE) for name in ("whole", "paused"))
    for part in ("model", "centers", "optimizer", "ema", "soft"):
        torch.testing.assert_close(b[part], a[part], rtol=0, atol=0, equal_nan=True)
    with np.load(tmp_path / "whole" / "generation-2" / SAMPLES) as file:
        scores, weights = file["scores"], file["weights"]
    labels = dataset.labels[rows]
    np.testing.assert_allclose(weights, weights_of(labels, scores, recipe, 1.0 + rows % 3))
    assert len(np.unique(weights.round(6))) > 2
    assert torch.equal(torch.tensor([e.losses["loss"] for e in resumed[:-1]]),
                       torch.tensor([e.losses["loss"] for e in events[:-1]][3:]))  # fmt: skip


def test_damaged_or_foreign_samples_are_named(trained: Path, dataset: CropDataset, tmp_path: Path) -> None:
    recipe, rows = changed(RECIPE, error_weights="boosted"), dataset.select("train")
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    find = lambda: emphasis_of(load_model(trained), dataset, rows, recipe, (tmp_path / "0", tmp_path / "1"), CPU)
    find()
    good = (tmp_path / "1" / SAMPLES).read_bytes()
    np.savez(tmp_path / "foreign.npz", rows=rows + 1, scores=rows, weights=rows)
    for content in (b"", good[: len(good) // 2], (tmp_path / "foreign.npz").read_bytes()):
        (tmp_path / "1" / SAMPLES).write_bytes(content)
        with pytest.raises(UsageError, match=r"1/samples\.npz: damaged .*with --restart"):
            find()
    shutil.move(tmp_path / "1" / SAMPLES, tmp_path / "0" / SAMPLES)
    with pytest.raises(UsageError, match=r"0/samples\.npz: damaged"):
        find()


def test_blends_have_no_errors_to_weight() -> None:
    for option, fields in (("error-weights", {"error_weights": "focal"}), ("ambiguous", {"ambiguous": 0.1})):
        with pytest.raises(UsageError, match=f"--{option} with --self-blend: blends are new in every epoch"):
            changed(RECIPE, self_blend=True, **fields)
