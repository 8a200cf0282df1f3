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
from dtn_fast.data.video_table import Video
from dtn_fast.errors import UsageError

METHOD = "SelfBlended"
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)
"""Opacities of the blended copy, drawn with equal probability."""


def self_blend(
    face: NDArray[np.uint8], rng: np.random.Generator, points: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Makes a self-blended fake of a face crop [S, S, 3]; returns it and the opacity [S, S] of the blend.

    points: landmarks [K, 2] (x, y) in pixels, whose convex hull is the mask; rows of NaN are left out, and without
    three usable points the mask is an ellipse where the face lies in a crop with the usual margin.
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
    """Changes colours, light and sharpness, as another camera and codec would."""
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
    if len(known) > 2:
        if rng.random() < 0.5:  # the lower face alone, as reenactment changes mouth and chin
            low = known[known[:, 1] > np.median(known[:, 1]) - 0.1 * np.ptp(known[:, 1])]
            known = low if len(low) > 2 else known
        cv2.fillConvexPoly(mask, cv2.convexHull(known.astype(np.float32)).astype(np.int32), 1.0)
    else:
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

    def fill(self, rows: NDArray[np.int64], out: NDArray[np.uint8], epoch: int = 0) -> None:
        real = rows % len(self._rows)
        self._crops.fill(self._rows[real], out, epoch)

        def change(place: int) -> None:
            row, fake = int(real[place]), bool(rows[place] >= len(self._rows))
            rng = np.random.default_rng((self._seed, epoch, row, fake))
            if fake:
                out[place] = self_blend(out[place], rng, None if self._points is None else self._points[row])[0]
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
    fakes = [
        Video(f"{v.path}#{METHOD}", 1, METHOD, v.split, v.identities, v.compression, target=v.path) for v in sources
    ]
    return replace(
        dataset,
        crops=BlendedCrops(dataset.crops, rows, points, seed),
        video=np.concatenate([video, video + count]),
        frame=np.tile(dataset.frame[rows], 2),
        person=np.tile(dataset.person[rows], 2),
        videos=[*sources, *fakes],
        status=[dataset.status[number] for number in reals] * 2,
        landmarks=None if points is None else np.tile(points, (2, 1, 1)),
    )
