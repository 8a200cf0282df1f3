"""The interface of every runtime, ``score``: uint8 face crops -> P(fake), from any thread.

Checkpoints run in torch_scorer.py, .onnx in onnx.py, .mnn in mnn.py, .engine and .rtx in tensorrt.py, a server's
model through triton_server.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import DtnError, UsageError
from dtn_fast.model.card import measures_novelty, temperature_of
from dtn_fast.model.config import ModelConfig, mask_side

BATCH = 64
"""Number of crops that a scorer runs at once."""


FEATURES = "features"
"""Output of an exported file that its temporal head takes beside the logits."""
COLUMNS = ("logits", "novelty", FEATURES, "mask")
"""Outputs of an exported file that make the columns of a scorer's outputs: novelty [B] is there if the model measures
it, features [B, C] where its temporal head is run, mask [B, m, m], m * m columns, if it has a mask head."""


class Scored(NamedTuple):
    """Scores of crops."""

    score: NDArray[np.float64]
    """P(fake) [B], by the model's temperature if it is calibrated."""
    novelty: NDArray[np.float64] | None
    """Distance [B] from the training data, about 1 for inputs like it; None: the model does not measure it."""
    mask: NDArray[np.float32] | None = None
    """P(forged) of the crop's pixels [B, m, m]; None: not asked for, or the model has no mask head."""
    logits: NDArray[np.float64] | None = None
    """Logits [B, classes] for the temporal head; None: there is none."""
    features: NDArray[np.float64] | None = None
    """Features [B, C] for the temporal head."""


class ClipScorer(ABC):
    """A temporal head in some runtime.  Any number of threads may call it."""

    def __init__(self, frames: int, features: int, step: float) -> None:
        self.frames, self.features, self.step = frames, features, step
        """Number of frames of a clip, of features of a frame, and of the video's frames from one of the clip's to the
        next in training (0: unknown)."""

    @abstractmethod
    def logits(self, features: NDArray[np.float64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logits [B, classes] of clips, from the features [B, T, C] and logits [B, T, classes] of their frames."""


class Scorer(ABC):
    """Base class of the runtimes, which score face crops.  Any number of threads may call a scorer."""

    clips: ClipScorer | None = None
    """The model's temporal head in this runtime; None: it has none, or the runtime cannot run it."""

    def __init__(self, config: Any, notice: str, name: str, batch_size: int = BATCH) -> None:
        self.config = config
        """The detector's configuration: image_size, mean, std, num_classes, card."""
        self.notice = notice
        """Statement that every report of this model must show; empty: none."""
        self.name = name
        self.batch_size = batch_size
        """Number of crops that are run at once."""

    @abstractmethod
    def _outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Outputs of 1 to ``batch_size`` crops, those of COLUMNS that the model gives side by side: [B, columns]."""

    def outputs(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Outputs of RGB crops [B, S, S, 3] uint8, S = config.image_size: logits and, as further columns, novelty if
        the model measures it and features for its temporal head.

        Raises UsageError for another shape or dtype, DtnError when a value is not finite (half-precision overflow).
        """
        return self._gather(self._checked(crops))

    def columns(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """All outputs of crops, a mask's columns too: [B, columns].  Raises as :meth:`outputs`."""
        return self._gather(self._checked(crops), mask_side(self.config) ** 2)

    def _checked(self, crops: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        side = self.config.image_size
        if crops.dtype != np.uint8 or crops.shape[1:] != (side, side, 3):
            raise UsageError(
                f"{self.name}: got {crops.dtype} {list(crops.shape)}; it takes uint8 [B, {side}, {side}, 3]"
            )
        return (crops[part] for part in _parts(len(crops), self.batch_size))

    def logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits [B, classes] of the crops, as the network gives them, whatever its temperature.  Raises as
        :meth:`outputs`."""
        return self.outputs(crops)[:, : self.config.num_classes]

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        """P(fake) of the crops: [B]."""
        return self.scored(self.outputs(crops)).score

    def judge(self, crops: NDArray[np.uint8]) -> Scored:
        """P(fake), novelty and mask of the crops, and what a temporal head takes."""
        side, outputs = mask_side(self.config), self.columns(crops)
        split = outputs.shape[1] - side**2
        mask = outputs[:, split:].reshape(-1, side, side).astype(np.float32) if side else None
        return self.scored(outputs[:, :split])._replace(mask=mask)

    def score_rows(self, dataset: CropDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """P(fake) [n] of the crops ``rows``, without reading them all into memory."""
        return self.scored(self.outputs_rows(dataset, rows)).score

    def outputs_rows(self, dataset: CropDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """:meth:`outputs` of the crops ``rows``."""
        return self._gather(dataset.get(rows[part]) for part in _parts(len(rows), self.batch_size))

    def logits_rows(self, dataset: CropDataset, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits [n, classes] of the crops ``rows``."""
        return self.outputs_rows(dataset, rows)[:, : self.config.num_classes]

    def scored(self, outputs: NDArray[np.float64]) -> Scored:
        """P(fake), novelty and the temporal head's inputs from :meth:`outputs`."""
        classes = self.config.num_classes
        columns = outputs.shape[1] - (self.clips.features if self.clips is not None else 0)
        novelty = outputs[:, classes] if columns > classes else None
        score = probability(outputs[:, :classes] / temperature_of(self.config.card))
        if self.clips is None:
            return Scored(score, novelty)
        return Scored(score, novelty, logits=outputs[:, :classes], features=outputs[:, columns:])

    def _whole(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """``outputs``.  Raises DtnError unless they are those of COLUMNS that the configuration states."""
        side, classes = mask_side(self.config), self.config.num_classes
        features = 0 if self.clips is None else self.clips.features
        if outputs.shape[1] - side**2 - features not in (classes, classes + 1):
            further = f"{features} features" * bool(features), f"a mask of {side}x{side}" * bool(side)
            stated = ", ".join([f"{classes} logits", *filter(None, further)]) + " and at most a novelty"
            raise DtnError(f"{self.name}: gives {outputs.shape[1]} values for a crop, its configuration states "
                           f"{stated}; export the model again")  # fmt: skip
        return outputs

    def _gather(self, batches: Iterable[NDArray[np.uint8]], kept: int = 0) -> NDArray[np.float64]:
        """Outputs of batches of crops, with the first ``kept`` columns of their masks."""
        cut = mask_side(self.config) ** 2 - kept
        parts = [self._whole(self._outputs(batch))[:, : -cut or None] for batch in batches]
        outputs = np.concatenate(parts) if parts else np.zeros((0, self.config.num_classes + kept))
        if not np.isfinite(outputs).all():
            bad = int((~np.isfinite(outputs)).any(1).sum())
            what = "logits" if not np.isfinite(outputs[:, : self.config.num_classes]).all() else "further outputs"
            raise DtnError(
                f"{self.name}: {what} of {bad} of {len(outputs)} crops are not finite; use a model of higher precision"
            )
        return outputs


def outputs_of(config: ModelConfig, clips: bool = False) -> list[str]:
    """Those of COLUMNS that files of a model with this configuration give; the features only with ``clips``, because
    most runtimes run no temporal head."""
    given = {"logits": True, "novelty": measures_novelty(config.card), FEATURES: clips and config.clip > 0,
             "mask": config.mask_head}  # fmt: skip
    return [name for name in COLUMNS if given[name]]


def side_by_side(outputs: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """Outputs of a file, each [B, ...], side by side: [B, columns]."""
    return np.column_stack([output.reshape(len(output), -1) for output in outputs]).astype(np.float64)


def probability(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(fake) [B] of logits [B, classes]: softmax(logits)[:, 1]."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers[:, 1] / powers.sum(1)


def _parts(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
