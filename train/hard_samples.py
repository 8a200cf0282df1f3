"""Crops that a teacher gets wrong or finds ambiguous, and how much its student trains on them (paper, section 6)."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.loader import Emphasis
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.files import write_whole
from dtn_fast.model.detector import Detector, move_to
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.scorer import probability
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.config import Recipe

SAMPLES = "samples.npz"
"""File of a student's folder: every training crop's label, the teacher's P(fake) without augmentation, its weight."""


def weights_of(
    labels: NDArray[np.int64], scores: NDArray[np.float64], recipe: Recipe, before: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Weights [n] of crops with ``labels`` and the teacher's P(fake) ``scores``, by ``recipe.error_weights``.

    before: the weights that the teacher was trained with.  The mean is 1 where the classes are balanced; a class that
    the teacher gets wrong as a whole weighs more.
    """
    weights = np.ones(len(labels))
    if recipe.error_weights == "focal":
        weights += (recipe.error_factor - 1) * np.abs(labels - scores) ** recipe.focal_gamma
    elif recipe.error_weights == "boosted":
        wrong = (scores >= EvaluateConfig.threshold) != labels
        weights = np.where(wrong, recipe.error_factor, 1.0) * (1.0 if before is None else before)
    return weights / np.mean([weights[labels == label].mean() for label in (0, 1)])


def is_ambiguous(scores: NDArray[np.float64], recipe: Recipe) -> NDArray[np.bool_]:
    """Whether a teacher's P(fake) [n] are as near to 0.5 as ``recipe.ambiguous`` says."""
    return (np.abs(scores - 0.5) <= recipe.ambiguous) & (recipe.ambiguous > 0)


def emphasis_of(
    teacher: Detector, dataset: CropDataset, rows: NDArray[np.int64], recipe: Recipe, folders: tuple[Path, Path],
    device: torch.device,
) -> Emphasis | None:  # fmt: skip
    """What the student of ``teacher`` trains on more, of the crops ``rows``; None: on nothing.

    folders: the teacher's, whose weights boosting multiplies, and the student's, where the result is kept, so that a
    resumed run trains on the same.  All processes of a group make the same call and share the scoring.  Raises
    UsageError when a file there is damaged or of other crops.
    """
    if recipe.error_weights == "none" and not recipe.ambiguous:
        return None
    before, path = folders[0] / SAMPLES, folders[1] / SAMPLES
    labels = dataset.labels[rows]
    if path.is_file():
        scores, weights = _read(path, rows)
    else:
        here = distributed.ranks()
        scorer = TorchScorer(move_to(copy.deepcopy(teacher), device), runtime=Runtime(mode="eager"))
        mine = probability(scorer.logits_rows(dataset, rows[here.rank :: here.world]))  # whether calibrated or not
        scores = distributed.interleave(distributed.gather(mine))
        weights = weights_of(labels, scores, recipe, _read(before, rows)[1] if before.is_file() else None)
        if here.main:
            write_whole(path, lambda file: np.savez(file, rows=rows, labels=labels, scores=scores, weights=weights))
    every = np.ones(len(dataset.labels), np.float32)
    every[rows] = weights
    strongly = np.zeros(len(every), np.bool_)
    strongly[rows] = is_ambiguous(scores, recipe)
    return Emphasis(every, strongly, recipe.ambiguous_draws)


def told(folder: Path, recipe: Recipe) -> str:
    """What a student trains on more, in a sentence; empty: nothing, or its file cannot be read."""
    try:
        with np.load(folder / SAMPLES, allow_pickle=False) as file:
            labels, scores, weights = file["labels"], file["scores"], file["weights"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return ""
    wrong, near = (scores >= EvaluateConfig.threshold) != labels, is_ambiguous(scores, recipe)
    parts = [f"its teacher got {wrong.sum():,} of {len(labels):,} training crops wrong"]
    if recipe.error_weights != "none" and wrong.any():
        parts.append(f"they weigh {weights[wrong].mean():.2f} on average")
    if recipe.ambiguous:
        parts.append(f"{near.sum():,} are ambiguous, drawn {recipe.ambiguous_draws} times and augmented more")
    return "; ".join(parts)


def _read(path: Path, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores and weights in ``path``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            known, scores, weights = file["rows"], file["scores"], file["weights"]
        if not np.array_equal(known, rows) or not len(rows) == len(scores) == len(weights):
            raise ValueError("of other crops")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged ({error}); distil this generation again with --restart") from error
    return scores, weights
