"""Evenly spaced choice of frames and crops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST = 10_000_000
"""Number of points in time beyond which all frames are chosen."""


class PerSecond(float):
    """Number of frames per second of video."""


Wanted = int | PerSecond | Sequence[int] | None
"""Frames of a video: a number of frames evenly spaced in time (or fewer), a number per second, or the frames with these
numbers; None: all."""


def chosen(times: NDArray[np.float64], count: Wanted) -> list[int] | None:
    """Numbers of the frames wanted, None: all; times: [frames + 1] seconds, as in :func:`evenly_timed`."""
    if count is None:
        return None
    if isinstance(count, PerSecond):
        return at_rate(times, count)
    if isinstance(count, int):
        return evenly_timed(times, count)
    return sorted({number for number in count if number < len(times) - 1})


def evenly_spaced(total: int, count: int) -> list[int]:
    """``count`` of the numbers 0 to ``total`` - 1 (all, when there are fewer), from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def evenly_timed(times: NDArray[np.float64], count: int) -> list[int]:
    """Numbers of ``count`` frames (or fewer), from the first to the last, that are evenly spaced in time.

    times: [frames + 1] seconds at which each frame appears, and at which the last ends.  Where frames follow each other
    regularly these are evenly spaced numbers; else the frames nearest to evenly spaced points in time, each once.
    """
    total = len(times) - 1
    steps = np.diff(times[:-1])
    usual = float(np.median(steps)) if len(steps) else 0.0
    if total <= max(count, 2) or (steps.min() >= 0.5 * usual and steps.max() <= 1.5 * usual):
        return evenly_spaced(total, count)
    return _nearest(times[:-1], np.linspace(0, times[-2], count))


def at_rate(times: NDArray[np.float64], rate: float) -> list[int]:
    """Numbers of the frames nearest to the points in time 0, 1/rate, 2/rate ... seconds, each once; times as above."""
    points = times[-2] * rate
    if points > MOST:
        return list(range(len(times) - 1))
    return _nearest(times[:-1], np.arange(int(points + 1e-6) + 1) / rate)


def _nearest(times: NDArray[np.float64], points: NDArray[np.float64]) -> list[int]:
    after = np.searchsorted(times, points).clip(1, len(times) - 1) if len(times) > 1 else np.zeros(len(points), int)
    before = np.maximum(after - 1, 0)
    return np.unique(np.where(points - times[before] <= times[after] - points, before, after)).tolist()
