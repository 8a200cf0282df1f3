"""The interface of every runtime, ``score``: uint8 face crops -> P(fake), from any thread.

Checkpoints run in torch_scorer.py, .onnx in onnx.py, .mnn in mnn.py, .engine and .rtx in tensorrt.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import DtnError, UsageError

BATCH = 64
"""Number of crops that a scorer runs at once."""


class Scorer(ABC):
    """Base class of the runtimes, which score face crops.  Any number of threads may call a scorer."""

    def __init__(self, config: Any, notice: str, name: str, batch_size: int = BATCH) -> None:
        self.config = config
        """The detector's configuration: image_size, mean, std, num_classes."""
        self.notice = notice
        """Statement that every report of this model must show; empty: none."""
        self.name = name
        self.batch_size = batch_size
        """Number of crops that are run at once."""

    @abstractmethod
    def _logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits [B, classes] of 1 to ``batch_size`` crops."""

    def logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits of RGB crops [B, S, S, 3] uint8, S = config.image_size: [B, classes].

        Raises UsageError for another shape or dtype, DtnError when a logit is not finite (half-precision overflow).
        """
        side = self.config.image_size
        if crops.dtype != np.uint8 or crops.shape[1:] != (side, side, 3):
            raise UsageError(
                f"{self.name}: got {crops.dtype} {list(crops.shape)}; it takes uint8 [B, {side}, {side}, 3]"
            )
        return self._gather(crops[part] for part in _parts(len(crops), self.batch_size))

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """P(fake) of the crops: [B]."""
        return probability(self.logits(crops))

    def score_rows(self, dataset: CropDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(fake) [n] of the crops ``rows``, without reading them all into memory."""
        return probability(self.logits_rows(dataset, rows))

    def logits_rows(self, dataset: CropDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits [n, classes] of the crops ``rows``."""
        return self._gather(dataset.get(rows[part]) for part in _parts(len(rows), self.batch_size))

    def _gather(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
        parts = [self._logits(batch) for batch in batches]
        logits = np.concatenate(parts) if parts else np.zeros((0, self.config.num_classes))
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits)).any(1).sum())
            raise DtnError(
                f"{self.name}: logits of {bad} of {len(logits)} crops are not finite; use a model of higher precision"
            )
        return logits


def probability(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(fake) [B] of logits [B, 2]: softmax(logits)[:, 1]."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers[:, 1] / powers.sum(1)


def _parts(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
