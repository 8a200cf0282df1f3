"""Self-blended fakes, made from real faces alone: a transformed copy of a face blended into it through a soft mask.

After the idea of Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images" (CVPR 2022): every face swap
leaves a blending boundary and statistics that differ across it, and a detector can learn those without fakes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset, CropSource
from dtn_fast.data.masks import Masks
from dtn_fast.errors import UsageError

METHOD = "SelfBlended"
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
"""Opacities of the blended copy, drawn with equal probability."""


def self_blend(
    face: NDArray[np.uint8], rng: np.random.Generator, points: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Makes a self-blended fake of a face crop [S, S, 3]; returns it and the opacity [S, S] of the blend.

    points: landmarks [K, 2] (x, y) in pixels, NaN where unknown.  The mask is the convex hull of 68 and more; of five
    (eyes, nose, corners of the mouth) that of a face's outline put on them; without two usable points, an ellipse where
    the face lies in a crop with the usual margin.
    """
    side = face.shape[0]
    inner, outer = face, face
    if rng.random() < 0.5:
        inner = recolour(face, rng)
    else:
        outer = recolour(face, rng)
    move = cv2.getRotationMatrix2D((side / 2, side / 2), 0, rng.uniform(0.95, 1.05))
    move[:, 2] += rng.uniform(-1, 1, 2) * (0.03, 0.015) * side
    inner = cv2.warpAffine(inner, move, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    mask = _mask(side, rng, points)
    mixed = outer + mask[..., None] * (inner.astype(np.float32) - outer)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8), mask


def recolour(face: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Changes colours, light and sharpness, as another camera and codec would (SELF_BLEND_CORRUPTIONS)."""
    hsv = cv2.cvtColor(face, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-3, 3)) % 180
    hsv[..., 1:] = np.clip(hsv[..., 1:] * rng.uniform(0.8, 1.2, 2), 0, 255)
    image = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32)
    image = (image - 128) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-20, 20, 3)
    image = np.clip(image, 0, 255).astype(np.uint8)
    side = face.shape[0]
    if rng.random() < 0.5:
        small = max(side // int(rng.choice([2, 4])), 8)
        interpolation = int(rng.choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA]))
        shrunk = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
        return cv2.resize(shrunk, (side, side), interpolation=interpolation)
    amount = rng.uniform(0.2, 0.5)
    return cv2.addWeighted(image, 1 + amount, cv2.GaussianBlur(image, (0, 0), 2), -amount, 0)


def _mask(side: int, rng: np.random.Generator, points: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Opacity [S, S] float32 in [0, 1]: an outline, distorted, blurred twice, and scaled."""
    mask = np.zeros((side, side), np.float32)
    known = points[np.isfinite(points).all(1)] if points is not None else np.empty((0, 2), np.float32)
    if points is not None and len(points) == len(FIVE):
        known = _outline(points)
    if len(known) > 2:
        if rng.random() < 0.5:  # the lower face alone, as reenactment changes mouth and chin
            low = known[known[:, 1] > np.median(known[:, 1]) - 0.1 * np.ptp(known[:, 1])]
            known = low if len(low) > 2 else known
        cv2.fillConvexPoly(mask, cv2.convexHull(known.astype(np.float32)).astype(np.int32), 1.0)
    if mask.mean() < LEAST_HULL:  # no landmarks, or of no use
        center = (side * rng.uniform(0.47, 0.53), side * rng.uniform(0.5, 0.58))
        axes = (side * rng.uniform(0.24, 0.34), side * rng.uniform(0.28, 0.42))
        cv2.ellipse(mask, (center, (2 * axes[0], 2 * axes[1]), rng.uniform(-8, 8)), 1.0, -1)
    coarse = rng.uniform(-1, 1, (2, 5, 5)).astype(np.float32) * side * 0.05
    bend = [cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC) for field in coarse]
    yy, xx = np.mgrid[0:side, 0:side].astype(np.float32)
    mask = cv2.remap(mask, xx + bend[0], yy + bend[1], cv2.INTER_LINEAR)
    soft = side * rng.uniform(0.01, 0.05)
    mask = np.where(cv2.GaussianBlur(mask, (0, 0), soft) > rng.uniform(0.3, 0.7), 1.0, 0.0).astype(np.float32)
    mask = cv2.GaussianBlur(mask, (0, 0), side * rng.uniform(0.005, 0.04))
    return mask / max(float(mask.max()), 1e-6) * np.float32(rng.choice(RATIOS))


LEAST_HULL = 0.01
"""Share of the crop that a hull of landmarks must cover to be used."""
FIVE = np.array([[-0.22, -0.21], [0.22, -0.21], [-0.01, 0.02], [-0.18, 0.22], [0.18, 0.22]], np.float32)
"""Eyes, nose and corners of the mouth of an upright face, in sides of its box from the box's middle: medians over the
faces that both finders find."""
OUTLINE = np.stack([0.42 * np.cos(a := np.linspace(0, 2 * np.pi, 24, endpoint=False)), 0.06 + 0.5 * np.sin(a)], 1)
"""The same face's outline, from above the brows to the chin."""


def _outline(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """The outline [24, 2] of a face with five landmarks; empty when fewer than two are known."""
    known = np.isfinite(points).all(1)
    if known.sum() < 2:
        return np.empty((0, 2), np.float32)
    # the similarity z -> a z + b, over complex numbers, that maps FIVE to the landmarks with the least square error
    mine, theirs, outline = (p[:, 0] + 1j * p[:, 1] for p in (FIVE[known], points[known], OUTLINE))
    centred = mine - mine.mean()
    a = (centred.conj() * (theirs - theirs.mean())).sum() / (np.abs(centred) ** 2).sum()
    placed = a * (outline - mine.mean()) + theirs.mean()
    return np.stack([placed.real, placed.imag], 1).astype(np.float32)


def _blend_into(
    out: NDArray[np.uint8], place: int, rng: np.random.Generator, points: NDArray[np.float32] | None,
    masks: Masks | None,
) -> None:  # fmt: skip
    """Self-blends the crop ``out[place]``; its mask is where the blend is at least half as opaque as at its most."""
    out[place], opacity = self_blend(out[place], rng, points)
    if masks is not None:
        masks.pixels[place] = 255 * (opacity >= opacity.max() / 2)
        masks.known[place] = True


class BlendedCrops:
    """Real crops in rows 0..N-1 and self-blended fakes of them in rows N..2N-1, drawn anew for each (seed, epoch).

    Half of the real crops are recoloured too, because half of the fakes have a recoloured background; otherwise colour
    would give the label away.
    """

    def __init__(self, crops: CropSource, rows: NDArray[np.int64], points: NDArray[np.float32] | None, seed: int):
        self.size, self._crops, self._rows, self._points, self._seed = crops.size, crops, rows, points, seed
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)  # OpenCV releases the GIL

    def __len__(self) -> int:
        return 2 * len(self._rows)

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        real = rows % len(self._rows)
        self._crops.fill(self._rows[real], out, epoch)

        def change(place: int) -> None:
            row, fake = int(real[place]), bool(rows[place] >= len(self._rows))
            rng = np.random.default_rng((self._seed, epoch, row, fake))
            if fake:
                _blend_into(out, place, rng, None if self._points is None else self._points[row], masks)
            elif rng.random() < 0.5:
                out[place] = recolour(out[place], rng)

        list(self._pool.map(change, range(len(rows))))


def self_blended(dataset: CropDataset, seed: int) -> CropDataset:
    """The reals of ``dataset`` and one self-blended fake of each, in the same splits; its own fakes are left out.

    Raises UsageError when there is no real.
    """
    rows = np.flatnonzero(dataset.labels == 0)
    if not len(rows):
        raise UsageError("self-blending needs real faces; there are none in these crops")
    points = dataset.landmarks[rows] if dataset.landmarks is not None else None
    reals = [number for number, video in enumerate(dataset.videos) if not video.label]
    place = np.zeros(len(dataset.videos), np.int64)
    place[reals] = np.arange(len(reals))
    video, count = place[dataset.video[rows]], len(reals)
    sources = [dataset.videos[number] for number in reals]
    fakes = [v._replace(path=f"{v.path}#{METHOD}", label=1, method=METHOD, target=v.path, corruptions=())
             for v in sources]  # fmt: skip
    return replace(
        dataset,
        crops=BlendedCrops(dataset.crops, rows, points, seed),
        video=np.concatenate([video, video + count]),
        frame=np.tile(dataset.frame[rows], 2),
        person=np.tile(dataset.person[rows], 2),
        videos=[*sources, *fakes],
        status=[dataset.status[number] for number in reals] * 2,
        landmarks=None if points is None else np.tile(points, (2, 1, 1)),
        masks=None,
        mask_known=np.ones(2 * len(rows), bool),
    )


class MixedCrops:
    """Crops of a dataset, in which a fake to be trained on is, with probability ``share``, a self-blended real, drawn
    anew for each (seed, epoch); reals to be trained on are recoloured as often as the blended ones' surroundings."""

    def __init__(self, dataset: CropDataset, share: float, seed: int) -> None:
        train = np.zeros(len(dataset.video), bool)
        train[dataset.select("train")] = True
        self.size, self._crops, self._points = dataset.size, dataset.crops, dataset.landmarks
        self._fake, self._real = train & (dataset.labels == 1), train & (dataset.labels == 0)
        self._reals, self._share, self._seed, self._known = np.flatnonzero(self._real), share, seed, dataset.masked
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self._crops)

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0, masks: Masks | None = None) -> None:
        draws = [np.random.default_rng((self._seed, epoch, int(row), 2)) for row in rows]
        blend = np.array([bool(self._fake[row]) and rng.random() < self._share
                          for row, rng in zip(rows, draws, strict=True)], bool)  # fmt: skip
        source = np.array([rng.choice(self._reals) if b else row
                           for row, rng, b in zip(rows, draws, blend, strict=True)], np.int64)  # fmt: skip
        self._crops.fill(source, out, epoch)
        if masks is not None:
            masks.known[:] = self._known[rows]

        def change(place: int) -> None:
            rng, row = draws[place], source[place]
            if blend[place]:
                _blend_into(out, place, rng, None if self._points is None else self._points[row], masks)
            elif self._real[rows[place]] and rng.random() < self._share / 2:
                out[place] = recolour(out[place], rng)

        list(self._pool.map(change, range(len(rows))))


def partly_blended(dataset: CropDataset, share: float, seed: int) -> CropDataset:
    """``dataset`` with a share of the fakes to be trained on replaced by self-blended reals; validation and test keep
    the dataset's own.

    Raises UsageError when the train split has no real, or no fake of its own.
    """
    rows = dataset.select("train")
    if set(dataset.labels[rows].tolist()) != {0, 1}:
        raise UsageError("--blend-share below 1 needs reals and fakes in the train split; leave it out to blend alone")
    known = dataset.masked.copy()
    known[rows] = True  # may be blended; ``fill`` says which are
    return replace(dataset, crops=MixedCrops(dataset, share, seed), landmarks=None, mask_known=known)
