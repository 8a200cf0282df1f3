"""Masks beside crops: on disk, in batches, moved with their crops, of self-blended fakes and of joined data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dtn_fast.data.augment import Augment, DeviceAugment
from dtn_fast.data.blend import partly_blended, self_blend, self_blended
from dtn_fast.data.config import AUGMENTATIONS, PrepareConfig, WorkConfig
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles, open_crop_dataset
from dtn_fast.data.datasets.ffpp import read_ffpp
from dtn_fast.data.loader import Loader
from dtn_fast.data.masks import FORGED, UNKNOWN, Masks
from dtn_fast.data.prepare import prepare
from dtn_fast.data.randomness import sample_seeds
from dtn_fast.data.replay import joined
from dtn_fast.errors import DtnWarning

MOVED = dataclasses.replace(AUGMENTATIONS["geometry"], flip=0.5, shift_scale_rotate=0.7)
SEEDS = sample_seeds(3, np.arange(16))


def filled(dataset: CropDataset, rows: np.ndarray, epoch: int = 0) -> tuple[np.ndarray, Masks]:
    masks, crops = Masks.empty(len(rows), dataset.size), np.empty((len(rows), dataset.size, dataset.size, 3), np.uint8)
    dataset.fill(rows, crops, epoch, masks)
    return crops, masks


def test_masks_are_stored_as_bits_and_those_of_earlier_versions_as_bytes_are_read(crops: Path, tmp_path: Path) -> None:
    stored = np.load(next((crops / "shards").glob("*.masks.npy")))
    assert stored.shape[1:] == (64, 8)
    new = open_crop_dataset(crops, verify=True)
    rows = np.arange(len(new.video))
    masks = new.get_masks(rows)
    assert set(np.unique(masks)) == {0, 255}
    assert masks[new.labels == 1].any((1, 2)).all()
    assert not masks[new.labels == 0].any()
    shutil.copytree(crops, tmp_path / "old")
    for path in (tmp_path / "old/shards").glob("*.masks.npy"):
        np.save(path, np.unpackbits(np.load(path), axis=2) * np.uint8(255))
    old = open_crop_dataset(tmp_path / "old")
    assert np.array_equal(old.get_masks(rows), masks)
    assert old.fingerprint(rows) == new.fingerprint(rows)


def test_a_folder_that_was_begun_without_masks_goes_on_without(video_set: Path, tmp_path: Path) -> None:
    run = lambda config: list(prepare(read_ffpp(video_set), tmp_path, 64, config, WorkConfig()))
    run(PrepareConfig(frames=1, masks=False))
    assert json.loads((tmp_path / "job.json").read_text())["masks"] is False
    with pytest.warns(DtnWarning, match="was begun without masks and goes on without"):
        run(PrepareConfig(frames=1))
    assert open_crop_dataset(tmp_path).masks is None


def painted(count: int = 16, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Crops whose red is 255 where their mask is, and both."""
    masks = np.zeros((count, side, side), np.uint8)
    for place, (y, x) in enumerate(np.random.default_rng(0).integers(8, side - 30, (count, 2))):
        masks[place, y : y + 20, x : x + 12] = 255
    crops = np.zeros((count, side, side, 3), np.uint8)
    crops[..., 0] = masks
    return crops, masks


def agreement(crops: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """IoU of each crop's red with its mask."""
    red, mask = crops[..., 0] >= 128, masks >= 128
    return (red & mask).sum((1, 2)) / (red | mask).sum((1, 2))


@pytest.mark.parametrize("strongly", [None, np.arange(16) % 2 == 0])
def test_a_mask_moves_with_its_crop_which_is_augmented_as_without(strongly: np.ndarray | None) -> None:
    crops, masks = painted()
    strong = dataclasses.replace(MOVED, shift_scale_rotate=1.0)
    cpu, device = masks.copy(), torch.from_numpy(masks.copy())
    out = Augment(MOVED, strong)(crops, SEEDS, strongly, cpu)
    assert np.array_equal(out, Augment(MOVED, strong)(crops, SEEDS, strongly))
    assert agreement(out, cpu).min() > 0.85
    assert agreement(out, masks).min() < 0.5, "the crops have moved"
    moved = DeviceAugment(MOVED, strong)(torch.from_numpy(crops), SEEDS, strongly, device)
    assert torch.equal(moved, DeviceAugment(MOVED, strong)(torch.from_numpy(crops), SEEDS, strongly))
    assert agreement(moved.numpy(), device.numpy()).min() > 0.95
    coarse = torch.from_numpy(masks[:, ::4, ::4] // 255 * 100)  # at the side of a mask head
    DeviceAugment(MOVED)(torch.from_numpy(crops), SEEDS, None, coarse)
    whole = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    assert agreement(DeviceAugment(MOVED)(torch.from_numpy(crops), SEEDS).numpy(), whole / 100 * 255).mean() > 0.5
    unknown = torch.full((16, 8, 8), UNKNOWN, dtype=torch.uint8)
    DeviceAugment(MOVED)(torch.from_numpy(crops), SEEDS, None, unknown)
    assert (unknown == UNKNOWN).all()


def test_small_masks_hold_the_forged_share_of_each_pixel_and_unknown_ones_say_so() -> None:
    masks = Masks.empty(3, 16)
    masks.pixels[:], masks.known[:] = 0, [True, False, True]
    masks.pixels[0, :8], masks.pixels[0, 8:12, 8:] = 255, FORGED
    masks.pixels[2] = FORGED - 1
    small = masks.small(2)
    assert small[0].tolist() == [[100, 100], [0, 50]]
    assert (small[1] == UNKNOWN).all()
    assert (small[2] == 0).all()


@pytest.mark.parametrize("resident", [False, True])
def test_batches_bring_the_masks_of_their_rows(dataset: CropDataset, resident: bool) -> None:
    rows = dataset.select("train")
    known = dataset.masked.copy()
    known[rows[dataset.labels[rows] == 1][::2]] = False
    some = dataclasses.replace(dataset, mask_known=known)
    for batch in Loader(some, rows, 8, (0,), 0, mask_side=8, resident=resident).epoch(0):
        assert batch.masks is not None
        wanted = Masks(dataset.get_masks(batch.rows), known[batch.rows]).small(8)
        assert np.array_equal(batch.masks.numpy(), wanted)
        assert torch.equal(batch.crops, torch.from_numpy(dataset.get(batch.rows)))
    plain = next(iter(Loader(dataset, rows, 8, (0,), 0, resident=resident).epoch(0)))
    assert plain.masks is None


def test_the_masks_of_blends_are_those_that_they_were_blended_through(dataset: CropDataset) -> None:
    made = self_blended(dataset, seed=3)
    rows = np.arange(len(made.video))
    crops, masks = filled(made, rows, epoch=2)
    assert np.array_equal(crops, made.get(rows, epoch=2)), "the crops are the same as without masks"
    assert masks.known.all()
    reals = len(rows) // 2
    assert not masks.pixels[:reals].any()
    source = dataset.get(np.flatnonzero(dataset.labels == 0))
    for row in range(reals):
        _, opacity = self_blend(source[row], np.random.default_rng((3, 2, row, True)))
        assert np.array_equal(masks.pixels[reals + row] > 0, opacity >= opacity.max() / 2)


def test_of_partly_blended_data_each_fake_has_its_own_mask(dataset: CropDataset) -> None:
    rows = dataset.select("train")
    unknown = dataclasses.replace(dataset, mask_known=dataset.labels == 0)
    for data in (dataset, unknown):
        made = partly_blended(data, 0.5, seed=3)
        crops, masks = filled(made, rows)
        fake = dataset.labels[rows] == 1
        blended = fake & (crops != dataset.get(rows)).any((1, 2, 3))
        assert 0 < blended.sum() < fake.sum()
        assert masks.pixels[blended].any((1, 2)).all()
        assert np.array_equal(masks.known, ~fake | blended | data.masked[rows])
        kept = fake & ~blended
        assert np.array_equal(masks.pixels[kept], dataset.get_masks(rows[kept]))
        assert not masks.pixels[~fake].any()


def test_joined_data_keep_their_masks(dataset: CropDataset) -> None:
    other = dataclasses.replace(
        dataset, videos=[v._replace(path=f"other/{v.path}") for v in dataset.videos], masks=None, mask_known=None,
        crops=ShardFiles([255 - dataset.get(np.arange(len(dataset.video)))], dataset.size),
    )  # fmt: skip
    both = joined(dataset, [other], (), (), 0)
    rows = np.random.default_rng(0).permutation(len(both.video))
    _, masks = filled(both, rows)
    new = rows < len(dataset.video)
    assert np.array_equal(masks.pixels[new], dataset.get_masks(rows[new]))
    assert masks.known[new].all()
    assert np.array_equal(masks.known[~new], both.labels[rows[~new]] == 0)
    assert np.array_equal(both.masked[rows], masks.known)
