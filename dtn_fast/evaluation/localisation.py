"""Masks of a mask head scored against those of the fakes: IoU, pixel AUC and pointing game, beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.data.masks import FORGED
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.heat_scores import HEAD, Map, Mask, cell, chance_maps, percent, pixel_auc, pointing
from dtn_fast.runtime.scorer import BATCH, Scorer

CUT = 0.5
"""P(forged) from which on a pixel counts as forged in the IoU; of a map that knows nothing of the model, the share of
its maximum."""
METRICS = {"iou": f"IoU at {CUT:g}", "auc": "pixel AUC", "pointing": "pointing game"}
"""Title of each metric."""


class MaskScore(NamedTuple):
    """Scores of the masks of one group of fakes."""

    fakes: str
    """Title of the group."""
    map: str
    """HEAD, or the name of a map that knows nothing of the model."""
    crops: int
    videos: int
    values: dict[str, list[float] | None]
    """Metric -> mean, and bounds of its bootstrap interval over videos; None: no crop."""


def enlarged(mask: NDArray[np.float32], side: int) -> Map:
    """A mask [m, m] at the size of its crop, [S, S]."""
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_LINEAR)


def iou(found: Mask, wanted: Mask) -> float:
    """Intersection over union of two masks [S, S], of which one is not empty."""
    return float((found & wanted).sum() / (found | wanted).sum())


def localisation(
    scorer: Scorer, dataset: CropDataset, groups: Mapping[str, tuple[str, ...]], config: EvaluateConfig
) -> list[MaskScore]:
    """Scores of the masks of each group of forgeries, on up to ``config.mask_fakes`` evenly spaced fakes of each
    forgery whose masks are known and not empty; empty when model or data have no masks."""
    if not scorer.config.mask_head or dataset.masks is None:
        return []
    kinds = np.array([v.method for v in dataset.videos])[dataset.video]
    fakes = dataset.select(config.split)
    fakes = fakes[(dataset.labels[fakes] == 1) & dataset.masked[fakes]]
    chosen = [own[evenly_spaced(len(own), config.mask_fakes)]
              for own in (fakes[kinds[fakes] == method] for method in dataset.methods)]  # fmt: skip
    measured: list[tuple[int, dict[str, dict[str, float]]]] = []
    rows = np.concatenate(chosen) if chosen else fakes
    for part in (rows[start : start + BATCH] for start in range(0, len(rows), BATCH)):
        wanted, found = dataset.get_masks(part) >= FORGED, scorer.judge(dataset.get(part)).mask
        assert found is not None
        for row, mask, own in zip(part.tolist(), wanted, found, strict=True):
            if mask.any():
                maps = {HEAD: enlarged(own, dataset.size), **chance_maps(dataset.size)}
                measured.append((row, {name: _scores(heat, mask) for name, heat in maps.items()}))
    table = []
    for title, methods in groups.items():
        group = [(row, values) for row, values in measured if kinds[row] in methods]
        videos = dataset.video[[row for row, _ in group]]
        for name in (HEAD, *chance_maps(1)) if group else ():
            values = {metric: cell(np.array([of[name][metric] for _, of in group]), videos, config)
                      for metric in METRICS}  # fmt: skip
            table.append(MaskScore(title, name, len(group), len(np.unique(videos)), values))
    return table


def _scores(heat: Map, mask: Mask) -> dict[str, float]:
    return {"iou": iou(heat >= CUT, mask), "auc": pixel_auc(heat, mask, ~mask), "pointing": pointing(heat, mask)}


def mask_table(scores: Sequence[MaskScore]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, in percent, with intervals."""
    header = ["fakes", "map", "crops", *METRICS.values()]
    return header, [[s.fakes, s.map, str(s.crops), *(percent(s.values[metric]) for metric in METRICS)] for s in scores]
