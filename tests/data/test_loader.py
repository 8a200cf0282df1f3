"""Batches of crops: order, balance, ranks, resuming, prefetching, device memory, pictures instead of shards."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import RECIPE, SMALL, changed

from dtn_fast import DTN
from dtn_fast.data.augment import Augment
from dtn_fast.data.config import AUGMENTATIONS
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.loader import Loader, epoch_order
from dtn_fast.data.open import open_data
from dtn_fast.data.pictures import read_image
from dtn_fast.data.video_table import Video
from dtn_fast.errors import DtnError, DtnWarning, MediaError, UsageError
from dtn_fast.train.config import Execution
from dtn_fast.train.loop import Epoch, fit


def numbered(count: int = 40, fakes: int = 30, side: int = 16) -> CropDataset:
    """Crops that are their own number everywhere, the last ``fakes`` of them fake, in three parts."""
    crops = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3)).copy()
    videos = [Video("real", 0, "real", "train"), Video("fake", 1, "F", "train")]
    video = (np.arange(count) >= count - fakes).astype(np.int64)
    zeros = np.zeros(count, np.int64)
    parts = [crops[:7], crops[7:8], crops[8:]]
    return CropDataset(ShardFiles(parts, side), video, zeros, zeros, videos, [{}, {}], False)


def load(dataset: CropDataset, rows: np.ndarray, batch_size: int, **how: Any) -> Loader:
    return Loader(dataset, rows, batch_size, **{"seed": (0,), "real_repeat": 0, **how})


def rows_of(loader: Loader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.rows.tolist() for batch in loader.epoch(epoch, start)]


def test_batches_hold_the_crops_and_labels_of_their_rows() -> None:
    dataset = numbered()
    for batch in load(dataset, np.arange(40), 8).epoch(0):
        assert batch.crops.dtype == torch.uint8
        assert batch.crops.shape == (8, 16, 16, 3)
        assert torch.equal(batch.crops[:, 3, 5, 1], torch.from_numpy(batch.rows))
        assert torch.equal(batch.labels, torch.from_numpy((batch.rows >= 10).astype(np.int64)))
        assert len(set(batch.seeds.tolist())) == 8


def test_a_batch_that_is_kept_is_never_overwritten_and_released_memory_is_reused() -> None:
    kept = list(load(numbered(), np.arange(40), 2, prefetch=1).epoch(0))
    assert len({batch.crops.data_ptr() for batch in kept}) == len(kept) == 30
    for batch in kept:
        assert torch.equal(batch.crops[:, 3, 5, 1], torch.from_numpy(batch.rows))
    loader, places = load(numbered(), np.arange(40), 2, prefetch=1), set()
    for batch in loader.epoch(0):
        places.add(batch.crops.data_ptr())
        assert torch.equal(batch.crops[:, 3, 5, 1], torch.from_numpy(batch.rows))
        loader.release(batch)
    assert len(places) <= 4, "one in use, one waiting, two being made"


def test_epochs_are_shuffled_balanced_and_repeat() -> None:
    dataset = numbered(40, 30)
    loader = load(dataset, np.arange(40), 6, seed=(3,))
    first = rows_of(loader)
    assert first == rows_of(load(dataset, np.arange(40), 6, seed=(3,)))
    assert first != rows_of(loader, 1)
    assert first != rows_of(load(dataset, np.arange(40), 6, seed=(4,)))
    everything = [row for batch in first for row in batch]
    assert sorted(everything) == sorted([*range(10, 40), *list(range(10)) * 3]), "10 reals three times, 30 fakes once"
    batch, *_ = load(dataset, np.arange(40), 60).epoch(0)
    real = batch.rows < 10
    assert len(set(batch.seeds[real].tolist())) == 30, "each copy of a real is augmented on its own"


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(2, 40), fakes=st.integers(1, 40), size=st.integers(1, 9), world=st.integers(1, 4),
    repeat=st.integers(0, 4), epoch=st.integers(0, 5),
)  # fmt: skip
def test_ranks_share_the_global_batch_without_overlap(count, fakes, size, world, repeat, epoch) -> None:
    dataset = numbered(count, min(fakes, count - 1))
    rows = np.arange(count)
    if count < world:
        with pytest.raises(UsageError, match="cannot be shared"):
            load(dataset, rows, size, world=world)
        return
    whole = rows_of(load(dataset, rows, size * world, real_repeat=repeat), epoch)
    ranks = [rows_of(load(dataset, rows, size, real_repeat=repeat, rank=r, world=world), epoch) for r in range(world)]
    for step, expected in enumerate(whole):
        together = [ranks[r][step] for r in range(world)]
        joined = [together[i % world][i // world] for i in range(len(expected))]
        assert joined == expected
    order = epoch_order(dataset.labels, rows, repeat, 0)
    assert sum(map(len, whole)) == min(len(order), max(len(order) // (size * world), 1) * size * world)


def test_the_rest_of_an_epoch_is_the_same_after_resuming() -> None:
    dataset = numbered()

    def mark(crops: np.ndarray, seeds: np.ndarray, strongly: np.ndarray | None) -> np.ndarray:
        return crops ^ (seeds & np.uint64(255)).astype(np.uint8)[:, None, None, None]

    loader = load(dataset, np.arange(40), 7, transform=mark)
    whole = list(loader.epoch(2))
    rest = list(loader.epoch(2, start=3))
    assert len(rest) == len(loader) - 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.crops, b.crops)
        assert np.array_equal(a.seeds, b.seeds)


def test_resident_crops_are_the_same_batches() -> None:
    dataset = numbered()
    rows = np.array([3, 9, 11, 12, 30, 39])
    plain, resident = (load(dataset, rows, 4, resident=r) for r in (False, True))
    dataset.crops.fill = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        next(plain.epoch(0))
    for batch in resident.epoch(0):
        assert torch.equal(batch.crops[:, 0, 0, 0], torch.from_numpy(batch.rows))
    assert resident.waited == 0


class Slow:
    """Crops that fail on row 5 and count what was asked for."""

    size = 16

    def __init__(self, fail: bool) -> None:
        self.fail, self.asked = fail, 0

    def __len__(self) -> int:
        return 64

    def fill(self, rows, out, epoch) -> None:
        self.asked += 1
        if self.fail and 5 in rows:
            raise MediaError("five.png: cannot read this image")
        out[...] = 0


def slow_shards(source: Slow) -> CropDataset:
    zeros = np.zeros(64, np.int64)
    return CropDataset(source, zeros, zeros, zeros, [Video("a", 0, "real", "train")], [{}], False)


def test_the_readers_error_reaches_the_consumer_and_threads_end() -> None:
    before = threading.active_count()
    with pytest.raises(MediaError, match=r"five\.png"):
        list(load(slow_shards(Slow(True)), np.arange(64), 4).epoch(0))
    source = Slow(False)
    batches = load(slow_shards(source), np.arange(64), 4, prefetch=3).epoch(0)
    next(batches)
    time.sleep(0.3)
    assert 4 <= source.asked <= 5, "a few batches ahead, and no more"
    batches.close()
    assert threading.active_count() == before


def test_rows_outside_are_an_error() -> None:
    crops = numbered().crops
    for row in (-1, 40):
        with pytest.raises(IndexError, match="of 40 crops"):
            crops.fill(np.array([row]), np.empty((1, 16, 16, 3), np.uint8), 0)


@pytest.fixture
def pictures(dataset: CropDataset, tmp_path: Path) -> Path:
    """The shards' crops as a folder of JPEGs."""
    for split in ("train", "val", "test"):
        rows = dataset.select(split)
        for row, crop in zip(rows, dataset.get(rows), strict=True):
            video = dataset.videos[dataset.video[row]]
            path = tmp_path / split / video.method / Path(video.path).stem / f"{dataset.frame[row]:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    return tmp_path


def test_a_folder_of_jpegs_is_as_good_as_shards(dataset: CropDataset, pictures: Path) -> None:
    data = open_data(pictures, 64)
    for split in ("train", "val", "test"):
        a, b = dataset.select(split), data.select(split)
        assert sorted(data.videos[v].method for v in data.video[b]) == sorted(
            dataset.videos[v].method for v in dataset.video[a]
        )
    row = data.select("train")[0]
    video = data.videos[data.video[row]]
    twin = next(
        r for r in dataset.select("train")
        if dataset.videos[dataset.video[r]].method == video.method
        and Path(dataset.videos[dataset.video[r]].path).stem == Path(video.path).name
        and dataset.frame[r] == data.frame[row]
    )  # fmt: skip
    assert np.abs(data.get(np.array([row])).astype(int) - dataset.get(np.array([twin]))).mean() < 4
    assert open_data(pictures, 32).get(np.arange(3)).shape == (3, 32, 32, 3)
    (pictures / video.frames[0]).write_bytes(b"no picture")
    with pytest.raises(MediaError, match=r"\.jpg: cannot read this image"):
        data.get(np.array([row]))
    with pytest.raises(UsageError, match="needs dtn-fast prepare first"):
        open_data(Path(__file__).parent, 64)


def test_pictures_look_as_detection_sees_them(tmp_path: Path) -> None:
    """Transparency, 16 bits, CMYK and orientation mean in training what they mean everywhere else."""
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    turned = Image.Exif()
    turned[274] = 6
    folder = tmp_path / "train/real"
    folder.mkdir(parents=True)
    Image.fromarray(np.dstack([grey] * 3 + [255 - grey])).save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.dstack([grey] * 4), "CMYK").save(folder / "print.jpg")
    Image.fromarray(grey).save(folder / "turned.jpg", exif=turned)
    crops = open_data(tmp_path, 64).get(np.arange(4))
    assert np.array_equal(crops, np.stack([read_image(path) for path in sorted(folder.iterdir())]))
    alpha, deep, _, turned_crop = crops[..., 0].astype(int)
    assert alpha[0, -1] > 250 > 200 > alpha[0, 16]
    assert np.abs(deep - grey).max() <= 1
    assert np.abs(turned_crop - grey.T).max() < 8


def test_pictures_without_split_folders_are_divided_and_said(dataset: CropDataset, tmp_path: Path) -> None:
    rows = dataset.select("train")
    for row, crop in zip(rows, dataset.get(rows), strict=True):
        path = tmp_path / ("Real" if not dataset.labels[row] else "Swap") / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(crop).save(path)
    (tmp_path / "Swap/a.psd").write_bytes(b"8BPS\0\1")
    with pytest.warns(DtnWarning) as said:
        data = open_data(tmp_path, 64)
    texts = [str(warning.message) for warning in said]
    assert any("80/10/10 percent of 60 files by content are train, val and test" in text for text in texts)
    assert any("1 files in forms that are not read, the first is a.psd" in text for text in texts)
    assert {v.split for v in data.videos} == {"train", "val", "test"}
    assert {v.method for v in data.videos} == {"real", "Swap"}


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({}, {"resident": True}),
        ({"augment_on": "cpu"}, {}),
        ({"augment_on": "device"}, {}),
        ({"augment": "none"}, {}),
        ({"self_blend": True, "augment": "light"}, {}),
    ],
)
def test_training_on_every_path_of_the_data(dataset: CropDataset, tmp_path: Path, fields: dict, how: dict) -> None:
    def losses(out: Path) -> list[float]:
        torch.manual_seed(1)
        events = fit(DTN(SMALL), dataset, changed(RECIPE, epochs=1, **fields), out, execution=Execution(**how))
        return [event.losses["loss"] for event in events if isinstance(event, Epoch)]

    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_training_on_a_folder_of_reals(pictures: Path, tmp_path: Path) -> None:
    reals = tmp_path / "reals"
    (reals / "faces").mkdir(parents=True)
    for number, path in enumerate(sorted(pictures.glob("train/real/*/*.jpg"))):
        for copy in range(3):
            (reals / f"{number}-{copy}.jpg").write_bytes(path.read_bytes())
    data = open_data(reals, 64)
    with pytest.raises(UsageError, match="--self-blend makes fakes from reals"):
        next(iter(fit(DTN(SMALL), data, RECIPE, tmp_path / "x")))
    events = list(fit(DTN(SMALL), data, changed(RECIPE, epochs=1, self_blend=True), tmp_path / "run"))
    assert isinstance(events[-1], Epoch)


def test_a_broken_picture_stops_training_by_name(pictures: Path, tmp_path: Path) -> None:
    victim = sorted(pictures.glob("train/real/*/*.jpg"))[0]
    data = open_data(pictures, 64)
    victim.unlink()
    with pytest.raises(DtnError, match=victim.name):
        list(fit(DTN(SMALL), data, RECIPE, tmp_path / "run"))


def test_cpu_augmentation_gets_the_samples_seeds(dataset: CropDataset) -> None:
    rows = dataset.select("train")
    loader = load(dataset, rows, 8, transform=Augment(AUGMENTATIONS["forensic"]))
    batch = next(loader.epoch(4))
    expected = Augment(AUGMENTATIONS["forensic"])(dataset.get(batch.rows), batch.seeds)
    assert np.array_equal(batch.crops.numpy(), expected)
