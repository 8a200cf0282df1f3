"""The forged regions of a face in its frame: outlines from a mask head's map."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.faces import Box, Cut, mapped

CUT = 0.5
"""P(forged) at and above which a pixel belongs to a region."""
FINE = 8
"""Outline points per pixel of the map, along a side."""
SMOOTH = 0.25
"""Largest distance of an outline from the map's, in pixels of the map."""
TINT = 0.25
"""Opacity of a region's colour."""
Region = NDArray[np.int32]
"""Outline [K, 2] (x, y) in pixels of the frame."""


def regions_of(mask: NDArray[np.float32], cut: Cut) -> tuple[Region, ...]:
    """Outlines of the parts of a map [m, m] that reach CUT, for the part ``cut`` of a frame; empty: none does."""
    side = FINE * len(mask)
    reached = (cv2.resize(mask, (side, side), interpolation=cv2.INTER_LINEAR) >= CUT).astype(np.uint8)
    outlines, _ = cv2.findContours(reached, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    back = cv2.invertAffineTransform(cut.matrix(side))
    found = (cv2.approxPolyDP(outline, SMOOTH * FINE, True)[:, 0] for outline in outlines)
    return tuple(np.rint(mapped(back, outline + 0.5)).astype(np.int32) for outline in found if len(outline) > 2)


def moved(regions: tuple[Region, ...], before: Box, after: Box) -> tuple[Region, ...]:
    """Regions of a face whose box has moved from ``before`` to ``after``."""
    zoom = after.side / max(before.side, 1)
    return tuple(np.rint((region - before.center) * zoom + after.center).astype(np.int32) for region in regions)


def draw(image: NDArray[np.uint8], regions: tuple[Region, ...], color: tuple[int, int, int], thick: int) -> None:
    """Tints and outlines regions in ``image`` [H, W, 3]."""
    if regions:
        tinted = cv2.fillPoly(image.copy(), regions, color)
        cv2.addWeighted(tinted, TINT, image, 1 - TINT, 0, dst=image)
        cv2.polylines(image, regions, True, color, thick, cv2.LINE_AA)
