"""Training augmentation on uint8 crops with albumentations."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from dtn_fast.errors import UsageError


class Augment:
    """Flip, brightness and contrast, hue shift, JPEG compression, blur, noise: each sometimes, none strong.

    Called with uint8 crops [n, S, S, 3], returns as many augmented ones.  The same ``seed`` gives the same result.
    Raises UsageError when albumentations is not installed.
    """

    def __init__(self, seed: int) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
        try:
            import albumentations as A
        except ImportError as error:
            raise UsageError("albumentations is not installed; run: pip install albumentations==2.0.8") from error
        self._pipeline = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, p=0.3),
                A.HueSaturationValue(hue_shift_limit=5, sat_shift_limit=10, val_shift_limit=5, p=0.2),
                A.ImageCompression(quality_range=(70, 100), p=0.15),
                A.GaussNoise(std_range=(0.005, 0.02), p=0.1),
            ],
            seed=seed,
        )

    def __call__(self, crops: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.stack([self._pipeline(image=crop)["image"] for crop in crops])
