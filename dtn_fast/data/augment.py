"""Training augmentation with two implementations of each preset: albumentations on the CPU, torch on the device.

kornia draws from one generator per batch, so a sample would depend on its neighbours; made independent it takes four to
six times as long as this file (32 crops of 256x256 on one core), and its JPEG is less exact.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dtn_fast.data.config import AugmentPreset
from dtn_fast.data.randomness import uniform
from dtn_fast.device import exact_products, to_device
from dtn_fast.errors import UsageError
from dtn_fast.packages import require


class Augment:
    """A preset on the CPU, by albumentations.

    A call takes uint8 crops [n, S, S, 3] and a seed per crop and returns the augmented crops; a seed gives the same
    result in any batch.  Crops that are marked in ``strongly`` [n] get ``strong`` in place of ``preset``.  ``masks``
    [n, S, S] uint8 are flipped, shifted, scaled and turned in place as their crops are.  Raises UsageError when
    albumentations is not installed.
    """

    def __init__(self, preset: AugmentPreset, strong: AugmentPreset | None = None) -> None:
        self._pipelines = [self._pipeline(p) for p in (preset, strong or preset)]

    def _pipeline(self, preset: AugmentPreset) -> Any:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import looks for a newer version online
        A = require("albumentations")
        p = preset
        return A.Compose(
            [
                A.HorizontalFlip(p=p.flip),
                A.Affine(
                    translate_percent=(-p.shift, p.shift), scale=(1 - p.scale, 1 + p.scale),
                    rotate=(-p.rotate, p.rotate),
                    keep_ratio=True, border_mode=4, p=p.shift_scale_rotate,
                ),  # border 4: reflected, as in torch's "reflection"
                A.RandomBrightnessContrast(p.brightness, p.contrast, brightness_by_max=True, p=p.brightness_contrast),
                A.GaussianBlur(blur_limit=0, sigma_limit=p.sigma, p=p.blur),
                A.GaussNoise(std_range=p.std, p=p.noise),
                A.ImageCompression(quality_range=p.quality, p=p.compression),
            ]
        )  # fmt: skip

    def __call__(
        self, crops: NDArray[np.uint8], seeds: NDArray[np.uint64], strongly: NDArray[np.bool_] | None = None,
        masks: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:  # fmt: skip
        out = np.empty_like(crops)
        kinds = [0] * len(crops) if strongly is None else strongly.tolist()
        for place, (crop, seed, kind) in enumerate(zip(crops, seeds.tolist(), kinds, strict=True)):
            pipeline = self._pipelines[kind]
            pipeline.set_random_seed(seed % 2**32)
            if masks is None:
                out[place] = pipeline(image=crop)["image"]
            else:
                moved = pipeline(image=crop, mask=masks[place])
                out[place], masks[place] = moved["image"], moved["mask"]
        return out


class DeviceAugment:
    """A preset as one batched torch pipeline on the crops' device.

    A call takes uint8 crops [n, S, S, 3] on any device (S a multiple of 16) and a seed per crop and returns uint8 crops
    there.  The samples that a transform changes are drawn on the host, so only those are computed and the device never
    waits.  A seed gives the same result in any batch, on one kind of device, up to rounding.  ``strong``, ``strongly``
    and ``masks``, uint8 [n, m, m] with any side m, as in :class:`Augment`.
    """

    def __init__(self, preset: AugmentPreset, strong: AugmentPreset | None = None) -> None:
        self.preset, self.strong = preset, strong or preset

    def __call__(
        self, crops: Tensor, seeds: NDArray[np.uint64], strongly: NDArray[np.bool_] | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if strongly is None or not strongly.any():
            if masks is not None:
                masks.copy_(self._moved(masks, seeds, self.preset))
            return self._augmented(crops, seeds, self.preset)
        out = torch.empty_like(crops, memory_format=torch.contiguous_format)
        for preset, rows in ((self.preset, np.flatnonzero(~strongly)), (self.strong, np.flatnonzero(strongly))):
            if len(rows):
                index = to_device(rows, crops.device)
                out.index_copy_(0, index, self._augmented(crops.index_select(0, index), seeds[rows], preset))
                if masks is not None:
                    masks.index_copy_(0, index, self._moved(masks.index_select(0, index), seeds[rows], preset))
        return out

    @exact_products()
    def _augmented(self, crops: Tensor, seeds: NDArray[np.uint64], preset: AugmentPreset) -> Tensor:
        if crops.shape[1] % 16 or crops.shape[1] != crops.shape[2]:
            side = "x".join(map(str, crops.shape[1:3]))
            raise UsageError(f"crops of {side} pixels: the device's augmentation needs squares of a multiple of 16")
        x = crops.permute(0, 3, 1, 2).to(torch.float32)  # [n, 3, S, S], 0..255; a new tensor, changed in place below
        p, batch = preset, _Drawn(x, seeds)
        batch.move(p)
        rows = batch.chosen(6, p.brightness_contrast)
        batch.change(rows, _brightness_contrast, batch.between(rows, 7, -p.brightness, p.brightness),
                     batch.between(rows, 8, 1 - p.contrast, 1 + p.contrast))  # fmt: skip
        rows = batch.chosen(9, p.blur)
        batch.change(rows, _blur, batch.between(rows, 10, *p.sigma), math.ceil(3 * p.sigma[1]))
        rows = batch.chosen(11, p.noise)
        batch.change(rows, _noise, batch.between(rows, 12, *p.std), seeds[rows])
        rows = batch.chosen(13, p.compression)
        low, high = p.quality
        batch.change(rows, jpeg, np.minimum(low + (batch.draw[rows, 14] * (high + 1 - low)).astype(np.int64), high))
        return x.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    @exact_products()
    def _moved(self, masks: Tensor, seeds: NDArray[np.uint64], preset: AugmentPreset) -> Tensor:
        """Masks [n, m, m] moved as ``_augmented`` moves the crops of the same seeds."""
        batch = _Drawn(masks[:, None].to(torch.float32), seeds)
        batch.move(preset)
        return batch.images[:, 0].round_().to(torch.uint8)


class _Drawn:
    """Images [n, C, S, S] float32, changed in place, and the random numbers of each."""

    def __init__(self, images: Tensor, seeds: NDArray[np.uint64]) -> None:
        self.images, self.draw = images, uniform(seeds, 16)

    def chosen(self, column: int, probability: float) -> NDArray[np.int64]:
        return np.flatnonzero(self.draw[:, column] < probability)

    def between(self, rows: NDArray[np.int64], column: int, low: float, high: float) -> Tensor:
        values = (low + (high - low) * self.draw[rows, column]).astype(np.float32)
        return to_device(values, self.images.device)

    def change(self, rows: NDArray[np.int64], function: Any, *parameters: Any) -> None:
        if len(rows):
            index = to_device(rows, self.images.device)
            self.images.index_copy_(0, index, function(self.images.index_select(0, index), *parameters))

    def move(self, p: AugmentPreset) -> None:
        """Flips, shifts, scales and turns."""
        self.change(self.chosen(0, p.flip), lambda images: images.flip(3))
        rows = self.chosen(1, p.shift_scale_rotate)
        self.change(rows, _affine, self.between(rows, 2, -p.shift, p.shift), self.between(rows, 3, -p.shift, p.shift),
                    self.between(rows, 4, 1 - p.scale, 1 + p.scale),
                    self.between(rows, 5, -p.rotate, p.rotate))  # fmt: skip


def _affine(images: Tensor, right: Tensor, down: Tensor, scale: Tensor, degrees: Tensor) -> Tensor:
    """Shifts, scales and rotates images about their centre; pixels from outside are reflected."""
    turn = torch.deg2rad(degrees)
    cos, sin = torch.cos(turn) / scale, torch.sin(turn) / scale
    rows = (cos, -sin, -2 * (cos * right - sin * down), sin, cos, -2 * (sin * right + cos * down))  # output -> input
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _brightness_contrast(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    factor, shift = contrast.view(-1, 1, 1, 1), brightness.view(-1, 1, 1, 1)
    return ((images * factor) + shift * 255).clamp(0, 255)


def _blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    n, channels, side, _ = images.shape
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(steps**2) / (2 * sigma[:, None] ** 2), 1).repeat_interleave(channels, 0)  # [3 n, 2 r + 1]
    flat = images.reshape(1, n * channels, side, side)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), "reflect"), kernel[:, None, None, :], groups=n * channels)
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), "reflect"), kernel[:, None, :, None], groups=n * channels)
    return flat.view(n, channels, side, side)


def _noise(images: Tensor, std: Tensor, seeds: NDArray[np.uint64]) -> Tensor:
    generator = torch.Generator(images.device)
    noise = torch.empty_like(images)
    for place, seed in enumerate(seeds.tolist()):
        noise[place].normal_(generator=generator.manual_seed(seed % 2**63))
    return (images + noise * (std * 255).view(-1, 1, 1, 1)).clamp(0, 255)


# ITU-T T.81 (JPEG), annex K, tables K.1 (luminance) and K.2 (chrominance)
_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *([99] * 32),
)  # fmt: skip


def jpeg(images: Tensor, quality: NDArray[np.int64]) -> Tensor:
    """Simulates JPEG with 4:2:0 chroma on RGB images [n, 3, S, S] in 0..255, S a multiple of 16; quality [n] 1..100.

    The entropy coder is lossless and left out: colour transform, 8x8 DCT, quantisation, and back (ITU-T T.81).
    """
    device = images.device
    scale = np.where(quality < 50, 5000 / np.maximum(quality, 1), 200 - 2 * quality)
    tables = [
        np.clip(np.floor((np.array(base).reshape(1, 8, 8) * scale[:, None, None] + 50) / 100), 1, 255)
        for base in (_LUMINANCE, _CHROMINANCE)
    ]
    luma_table, chroma_table = (to_device(t.astype(np.float32), device) for t in tables)
    to_ycc, to_rgb, dct = _jpeg_matrices(device)
    ycc = torch.einsum("ij,njhw->nihw", to_ycc, images.round()).round_()
    luma = _quantise(ycc[:, :1] - 128, luma_table, dct).round_() + 128
    chroma = _quantise(F.avg_pool2d(ycc[:, 1:], 2).round_(), chroma_table, dct).round_()
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)  # libjpeg's "fancy" upsampling
    return torch.einsum("ij,njhw->nihw", to_rgb, torch.cat([luma, chroma], 1)).clamp(0, 255)


@functools.cache
def _jpeg_matrices(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    to_ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    k = torch.arange(8, dtype=torch.float64)
    dct = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    to_rgb = torch.linalg.inv(to_ycc)  # on the host: on a GPU it waits for the work before it
    return to_ycc.to(device), to_rgb.to(device), dct.float().to(device)


def _quantise(plane: Tensor, table: Tensor, dct: Tensor) -> Tensor:
    """Quantises planes [n, c, S, S]: DCT of 8x8 blocks, division by table [n, 8, 8], rounding, and back."""
    n, channels, height, width = plane.shape
    blocks = plane.view(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    table = table.view(n, 1, 1, 1, 8, 8)
    coefficients = torch.round(dct @ blocks @ dct.T / table) * table
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(n, channels, height, width)
