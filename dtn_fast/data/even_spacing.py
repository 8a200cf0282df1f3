"""Evenly spaced choice of frames and crops."""

from __future__ import annotations

import numpy as np


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` of the numbers 0 to ``total`` - 1 (all, when there are fewer), from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
