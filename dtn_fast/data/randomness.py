"""Random numbers per sample: the same in any batch, on any rank and after any interruption (splitmix64)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15


def sample_seeds(seed: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit seed for each position in an epoch."""
    return _mix(_mix(np.uint64(seed * _GOLDEN % 2**64) + places.astype(np.uint64)))


def uniform(seeds: NDArray[np.uint64], columns: int) -> NDArray[np.float64]:
    """Uniform random numbers [n, columns] in [0, 1); each row depends on its seed alone."""
    steps = np.uint64(_GOLDEN) * np.arange(columns, dtype=np.uint64)
    return (_mix(seeds[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One round of splitmix64; the arithmetic is modulo 2**64 on purpose."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
