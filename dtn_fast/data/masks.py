"""Masks of the forged pixels of crops: as datasets give them, and small ones to train on."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

FORGED = 64
"""Least value, of 255, of a pixel that counts as forged: masks are compressed and have soft edges."""
UNKNOWN = 255
"""Value of every pixel of a small mask that is not known; of the others it is the forged percentage of its area."""
NO_MASKS = "these crops have no masks; prepare a dataset that has them, with --masks"


class Masks(NamedTuple):
    """Masks of crops, to be filled beside them."""

    pixels: NDArray[np.uint8]
    """[n, S, S] 0 where untouched, up to 255 where forged."""
    known: NDArray[np.bool_]
    """[n] whether a crop's mask is known; a real's is, and blank."""

    @classmethod
    def empty(cls, count: int, side: int) -> Masks:
        return cls(np.empty((count, side, side), np.uint8), np.empty(count, np.bool_))

    def small(self, side: int) -> NDArray[np.uint8]:
        """[n, ``side``, ``side``] the forged percentage of each pixel's area, or UNKNOWN."""
        out = np.full((len(self.known), side, side), UNKNOWN, np.uint8)
        for place in np.flatnonzero(self.known):
            whole = (self.pixels[place] >= FORGED).astype(np.uint8) * np.uint8(100)
            out[place] = cv2.resize(whole, (side, side), interpolation=cv2.INTER_AREA)
        return out
