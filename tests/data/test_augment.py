"""Augmentation on both machines: ranges, determinism per sample, JPEG against a real encoder; self-blending."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch.utils._python_dispatch import TorchDispatchMode

from dtn_fast.data.augment import Augment, DeviceAugment, jpeg
from dtn_fast.data.blend import FIVE, METHOD, BlendedCrops, partly_blended, self_blend, self_blended
from dtn_fast.data.config import AUGMENTATIONS, AugmentPreset
from dtn_fast.data.corrupt import LEVELS, corrupt
from dtn_fast.data.crop_dataset import CropDataset, ShardFiles
from dtn_fast.data.randomness import sample_seeds, uniform
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.metrics import evaluate_scores

FACE = np.ascontiguousarray(cv2.resize(data.astronaut()[:256, 96:352], (128, 128), interpolation=cv2.INTER_AREA))
BATCH = np.stack([np.roll(FACE, 5 * i, 1) for i in range(24)])
SEEDS = sample_seeds(7, np.arange(24))
NOTHING = AugmentPreset(0, 0, brightness_contrast=0, blur=0, noise=0, compression=0)


def on_device(preset: AugmentPreset, crops: np.ndarray = BATCH, seeds: np.ndarray = SEEDS) -> np.ndarray:
    return DeviceAugment(preset)(torch.from_numpy(crops), seeds).numpy()


def on_cpu(preset: AugmentPreset, crops: np.ndarray = BATCH, seeds: np.ndarray = SEEDS) -> np.ndarray:
    return Augment(preset)(crops, seeds)


BOTH = pytest.mark.parametrize("augment", [on_cpu, on_device])


@BOTH
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_seed_gives_the_same_picture_in_any_batch(augment, name: str) -> None:
    preset = AUGMENTATIONS[name]
    before = BATCH.copy()
    whole = augment(preset)
    assert np.array_equal(BATCH, before), "the input is left alone"
    assert (whole.shape, whole.dtype) == (BATCH.shape, BATCH.dtype)
    assert np.array_equal(whole, augment(preset))
    order = np.random.default_rng(0).permutation(24)[:9]
    apart = augment(preset, BATCH[order], SEEDS[order])
    assert np.abs(apart.astype(int) - whole[order]).max() <= 1  # a batched product may round another way
    other = augment(preset, BATCH, sample_seeds(8, np.arange(24)))
    assert (np.abs(other.astype(int) - whole).max((1, 2, 3)) > 0).mean() > 0.5


class Waiting(TorchDispatchMode):
    """Records operations after which the host waits for the device: copies from the host, values read, inverses."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        copied = name in ("_to_copy", "copy_") and any(
            isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args
        )
        if copied or name in ("_local_scalar_dense", "nonzero", "linalg_inv_ex", "equal"):
            self.found.append(name)
        return func(*args, **kwargs)


def test_the_device_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values (meta): every copy from the host goes through ``to_device``."""
    preset = dataclasses.replace(AUGMENTATIONS["forensic"], noise=0.0)  # a meta device draws no noise
    augment_module = sys.modules["dtn_fast.data.augment"]
    augment_module._jpeg_matrices(torch.device("meta"))  # made once
    monkeypatch.setattr(augment_module, "to_device", lambda values, device: torch.empty(values.shape, device=device))
    with Waiting() as waiting:
        out = DeviceAugment(preset)(torch.empty(BATCH.shape, dtype=torch.uint8, device="meta"), SEEDS)
    assert out.shape == BATCH.shape
    assert waiting.found == []


def test_products_are_exact_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 has 10 bits: it would move pixels by a tenth and colours by a level."""
    seen = []
    augment_module = sys.modules["dtn_fast.data.augment"]
    inside = lambda *_: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)) or _[0]
    monkeypatch.setattr(augment_module, "_affine", inside)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        on_device(dataclasses.replace(NOTHING, shift_scale_rotate=1.0))
        assert seen == [(False, False)]
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@BOTH
def test_nothing_chosen_changes_nothing(augment) -> None:
    assert np.array_equal(augment(NOTHING), BATCH)


@BOTH
@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("flip", 0),
        ("brightness_contrast", 0.2 * 255 + 0.2 * 255 + 1),
        ("noise", 0.04 * 255 * 5.5),
        ("compression", 140),
    ],
)
def test_each_transform_changes_every_chosen_sample_within_its_range(augment, field: str, limit: float) -> None:
    out = augment(dataclasses.replace(NOTHING, **{field: 1.0}))
    reference = BATCH[:, :, ::-1] if field == "flip" else BATCH
    change = np.abs(out.astype(int) - reference)
    assert change.max() <= limit
    if field != "flip":
        assert (change.max((1, 2, 3)) > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("field", "kinds"),
    [("flip", ()), ("shift_scale_rotate", ()), ("brightness_contrast", ("contrast",)), ("blur", ("blur",)),
     ("noise", ("gaussian_noise", "uniform_noise")), ("compression", ("jpeg",))],
)  # fmt: skip
def test_a_preset_knows_the_corruptions_that_it_holds(field: str, kinds: tuple[str, ...]) -> None:
    assert dataclasses.replace(NOTHING, **{field: 0.1}).corruptions == kinds
    assert set(kinds) <= set(LEVELS)
    assert AUGMENTATIONS["geometry"].corruptions == ()


@BOTH
def test_geometry_alone_is_no_corruption(augment) -> None:
    """Colours stay, and its interpolation smooths by a fraction of the mildest blur."""
    out = augment(AUGMENTATIONS["geometry"])
    assert np.abs(np.sort(out.mean((1, 2)), 0) - np.sort(BATCH.mean((1, 2)), 0)).max() < 12
    flat = np.full_like(BATCH, (200, 30, 90))
    assert np.array_equal(augment(AUGMENTATIONS["geometry"], flat), flat)
    detail = lambda crops: np.abs(np.diff(crops.astype(int), axis=2)).mean()
    lost = 1 - detail(out) / detail(BATCH)
    assert 0 < lost < 0.4 * (1 - detail(np.stack([corrupt(c, "blur", 1, 0) for c in BATCH])) / detail(BATCH))


@BOTH
def test_blur_removes_detail_and_keeps_the_light(augment) -> None:
    out = augment(dataclasses.replace(NOTHING, blur=1.0, sigma=(1.0, 1.5)))
    assert out.mean() == pytest.approx(BATCH.mean(), abs=1)
    detail = [np.abs(np.diff(x.astype(int), axis=2)).mean() for x in (BATCH, out)]
    assert detail[1] < 0.8 * detail[0]


@BOTH
def test_geometry_is_a_similarity_within_its_limits(augment) -> None:
    """Where three dots go says how the picture was moved."""
    side = 128
    dots = np.array([[40.0, 40.0], [88.0, 40.0], [64.0, 90.0]])
    yy, xx = np.mgrid[0:side, 0:side]
    crops = np.stack([(np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 18) * 255).astype(np.uint8) for x, y in dots], 2)
    out = augment(dataclasses.replace(NOTHING, shift_scale_rotate=1.0), np.stack([crops] * 24))
    turns, scales, shifts = [], [], []
    for picture in out.astype(float):
        found = np.stack([[(w * xx).sum(), (w * yy).sum()] / w.sum() for w in np.moveaxis(picture, 2, 0)])
        before, after = dots[1] - dots[0], found[1] - found[0]
        scales.append(np.linalg.norm(after) / np.linalg.norm(before))
        turns.append(np.degrees(np.arctan2(after[1], after[0])))
        middle = (found - found.mean(0)) / scales[-1]
        angle = np.radians(turns[-1])
        back = middle @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        assert np.abs(back - (dots - dots.mean(0))).max() < 0.7, "neither sheared nor mirrored"
        rotated = (dots.mean(0) - 63.5) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        shifts.append((found.mean(0) - 63.5 - rotated * scales[-1]) / side)
    assert 0.9 - 0.02 <= min(scales) < 0.95
    assert 1.05 < max(scales) <= 1.12
    assert -10.5 <= min(turns) < -4
    assert 4 < max(turns) <= 10.5
    assert 0.02 < np.abs(shifts).max() <= 0.05 * 1.1 + 0.01


@pytest.mark.parametrize("quality", [10, 40, 60, 75, 90, 100])
def test_jpeg_is_what_an_encoder_makes(quality: int) -> None:
    pictures = np.stack([FACE, data.astronaut()[256:384, 256:384], data.coffee()[100:228, 200:328]])
    ours = jpeg(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), np.full(3, quality)).round()
    for picture, made in zip(pictures, ours.permute(0, 2, 3, 1).numpy(), strict=True):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        real = np.asarray(Image.open(file)).astype(float)
        assert np.abs(made - real).mean() < 0.8  # grey levels: both round, at other places
        lost = [(x - picture).ravel() for x in (made, real)]
        assert np.corrcoef(lost)[0, 1] > (0.9 if quality < 100 else 0.7)


def test_device_augmentation_names_a_wrong_shape() -> None:
    with pytest.raises(UsageError, match="40x40 pixels"):
        on_device(AUGMENTATIONS["light"], BATCH[:, :40, :40])


def test_per_sample_randomness_is_uniform_and_distinct() -> None:
    seeds = sample_seeds(0, np.arange(20_000))
    assert len(np.unique(seeds)) == 20_000
    assert not np.intersect1d(seeds, sample_seeds(1, np.arange(20_000))).size
    draw = uniform(seeds, 4)
    assert np.abs(np.corrcoef(draw.T) - np.eye(4)).max() < 0.03
    assert draw.mean(0) == pytest.approx([0.5] * 4, abs=0.01)
    assert draw.var(0) == pytest.approx([1 / 12] * 4, abs=0.002)
    assert (draw.min() >= 0) & (draw.max() < 1)


def test_a_self_blend_changes_the_inside_of_its_mask_only() -> None:
    """Where the opacity is 0 the picture is the surroundings', untouched or recoloured whole."""
    plain = 0
    for seed in range(20):
        fake, mask = self_blend(FACE, np.random.default_rng(seed))
        assert (fake.shape, fake.dtype, mask.dtype) == (FACE.shape, np.uint8, np.float32)
        assert 0.05 < (mask > 0.5 * mask.max()).mean() < 0.6
        assert 0.2 < mask.max() <= 1.0
        assert mask[:3].max() < 0.02
        change = np.abs(fake.astype(int) - FACE).max(2)
        assert change[mask > 0.9 * mask.max()].max() > 0
        plain += change[mask == 0].max() == 0
    assert 4 <= plain <= 16  # half of the time the surroundings stay


def test_landmarks_give_the_mask_and_unknown_ones_do_not() -> None:
    points = np.array([[20, 30], [35, 30], [50, 30], [50, 70], [20, 70], [35, 90]], np.float32)
    left = [self_blend(FACE, np.random.default_rng(s), points)[1] for s in range(8)]
    assert all((mask[:, 75:] == 0).all() for mask in left)
    unknown = np.full_like(points, np.nan)
    assert np.array_equal(
        self_blend(FACE, np.random.default_rng(1), unknown)[1], self_blend(FACE, np.random.default_rng(1))[1]
    )


def test_five_landmarks_place_and_turn_a_face_s_outline() -> None:
    """The mask lies where the landmarks are, wherever that is, and is taller than wide along the face's own axis."""
    middle, axes = [], []
    for angle, place in ((0, (64, 64)), (0, (40, 50)), (90, (64, 64))):
        turn = np.array([[np.cos(t := np.radians(angle)), np.sin(t)], [-np.sin(t), np.cos(t)]])
        points = (60 * FIVE @ turn + place).astype(np.float32)
        masks = [self_blend(FACE, np.random.default_rng(s), points)[1] for s in range(40)]
        y, x = np.nonzero(np.mean(masks, 0) > 0.2 * np.mean(masks, 0).max())
        middle.append((x.mean(), y.mean()))
        axes.append((np.ptp(x), np.ptp(y)))
    assert middle[0] == pytest.approx((64, 70), abs=6)
    assert middle[1] == pytest.approx((40, 56), abs=6)
    assert axes[0][1] > 1.05 * axes[0][0]
    assert axes[2][0] > 1.05 * axes[2][1]
    points[2:] = np.nan  # eyes alone suffice, one point does not
    assert not np.array_equal(blend(points), blend(None))
    points[1] = np.nan
    assert np.array_equal(blend(points), blend(None))


@pytest.mark.parametrize("count", [5, 68])
@pytest.mark.parametrize("place", [(64.0, 64.0), (400.0, 400.0)], ids=["one spot", "outside"])
def test_landmarks_of_no_use_give_the_ellipse(count: int, place: tuple[float, float]) -> None:
    points = np.full((count, 2), place, np.float32)
    if place[0] > 128:
        points += np.random.default_rng(0).uniform(-20, 20, points.shape).astype(np.float32)
    for seed in range(20):
        assert self_blend(FACE, np.random.default_rng(seed), points)[1].max() >= 0.2


def blend(points: np.ndarray | None) -> np.ndarray:
    return self_blend(FACE, np.random.default_rng(1), points)[1]


def test_a_share_of_the_training_fakes_is_blended_anew_in_each_epoch(dataset: CropDataset) -> None:
    made = partly_blended(dataset, 0.5, seed=3)
    assert made.videos == dataset.videos
    rows = dataset.select("train")
    real = dataset.labels[rows] == 0
    changed = [np.abs(made.get(rows, epoch).astype(int) - dataset.get(rows)).max((1, 2, 3)) > 0 for epoch in range(30)]
    assert np.mean(changed, 0)[~real].mean() == pytest.approx(0.5, abs=0.1)
    assert np.mean(changed, 0)[real].mean() == pytest.approx(0.25, abs=0.06)
    assert (np.std(changed, axis=0)[~real] > 0).mean() > 0.8, "another half in each epoch"
    assert np.array_equal(made.get(rows[::-1].copy(), 2)[::-1], made.get(rows, 2))
    for split in ("val", "test"):
        kept = dataset.select(split)
        assert np.array_equal(made.get(kept), dataset.get(kept))
    only = dataclasses.replace(dataset, videos=[v._replace(label=0, method="real") for v in dataset.videos])
    with pytest.raises(UsageError, match="--blend-share below 1 needs reals and fakes"):
        partly_blended(only, 0.5, 0)


def test_self_blended_shards_double_the_reals(dataset: CropDataset) -> None:
    made = self_blended(dataset, seed=3)
    reals = int((dataset.labels == 0).sum())
    assert len(made.crops) == 2 * reals == len(made.video)
    assert made.methods == (METHOD,)
    assert set(made.labels[:reals]) == {0}
    assert set(made.labels[reals:]) == {1}
    for split in ("train", "val", "test"):
        rows = made.select(split)
        count = (dataset.labels[dataset.select(split)] == 0).sum()
        assert [(made.labels[rows] == label).sum() for label in (0, 1)] == [count, count]
    rows = np.arange(2 * reals)
    first, second = made.get(rows, epoch=0), made.get(rows, epoch=1)
    assert np.array_equal(first, made.get(rows[::-1].copy(), epoch=0)[::-1])
    assert (np.abs(first.astype(int) - second)[reals:].max((1, 2, 3)) > 0).all(), "another fake each epoch"
    source = dataset.get(np.flatnonzero(dataset.labels == 0))
    kept = (np.abs(first[:reals].astype(int) - source).max((1, 2, 3)) == 0).mean()
    assert 0.2 < kept < 0.8, "about half of the reals are recoloured"
    no_reals = dataclasses.replace(dataset, videos=[v._replace(label=1, method="x") for v in dataset.videos])
    with pytest.raises(UsageError, match="needs real faces"):
        self_blended(no_reals, 0)


def test_colour_alone_does_not_tell_a_blend_from_a_real() -> None:
    """A classifier on the mean colour of the surroundings scores chance."""
    crops = ShardFiles([np.stack([FACE] * 300)], 128)
    source = BlendedCrops(crops, np.arange(300), None, seed=1)
    out = np.empty((600, 128, 128, 3), np.uint8)
    source.fill(np.arange(600), out)
    corner = out[:, :8].astype(float).mean((1, 2))
    change = np.abs(corner - FACE[:8].astype(float).mean((0, 1))).mean(1)
    auc = evaluate_scores(np.repeat([0, 1], 300), change, 0.5).auc
    assert auc == pytest.approx(0.5, abs=0.1)
