"""Calibration of a model on prepared crops: its temperature, the limits between its verdicts, its novelty statistics.

The result is the model card in the checkpoint's folder, which exported files and every verdict then carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.data.open import open_data
from dtn_fast.device import choose_device
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.card_page import write_card_page
from dtn_fast.evaluation.config import CalibrateConfig, EvaluateConfig
from dtn_fast.evaluation.evaluate import are_stills, forgeries_of
from dtn_fast.evaluation.metrics import auc_interval, by_video, evaluate_scores
from dtn_fast.evaluation.reliability import fit_temperature, level_of, rate_interval, video_weights
from dtn_fast.model.card import Calibration, Card, Level, Measured, SplitCounts
from dtn_fast.model.config import crop_policy
from dtn_fast.model.detector import CONFIG, Detector, device_of, move_to, weights_checksum, write_card
from dtn_fast.model.fold import frozen
from dtn_fast.model.hooks import hooked
from dtn_fast.model.novelty import Novelty, pooled
from dtn_fast.model.preprocess import normalise
from dtn_fast.provenance import commit
from dtn_fast.runtime.clips import score_clips
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import best_checkpoint, load_model
from dtn_fast.runtime.scorer import BATCH, Scorer, probability
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.version import __version__


class Calibrated(NamedTuple):
    """Result of a calibration."""

    folder: Path
    """Checkpoint folder that received the card."""
    card: Card
    page: Path
    notes: list[str]
    """Facts that limit what the calibration promises."""


class _Scores(NamedTuple):
    """Outputs on the crops of a split."""

    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    novelty: NDArray[np.float64] | None
    videos: list[str]
    clips: NDArray[np.float64] | None = None
    """[n, classes] logits of each crop's clip; None: the model has no temporal head."""


def calibrate(
    run: Path, data: Path, config: CalibrateConfig = CalibrateConfig(), runtime: Runtime = Runtime()
) -> Generator[str | Calibrated, None, None]:
    """Calibrates the best generation of a run, or a checkpoint folder, on a validation split; yields the step that
    begins, and at last the result.

    The weights stay as they are.  The folder receives card.json, card.html and novelty.safetensors.  Raises UsageError
    when ``run`` is no checkpoint, or the split lacks reals or fakes.
    """
    if run.is_file() and run.name != CONFIG:
        raise UsageError(f"{run}: a file cannot be calibrated; calibrate the run or checkpoint, then export it again")
    model = move_to(load_model(run), choose_device(runtime.device))
    folder = best_checkpoint(run)
    dataset = open_data(data, model.config.image_size)
    dataset.check_fits(model.config, str(run))
    dataset.tell_differences(model.config, str(run))
    rows = _rows(dataset, config.split, model)
    if len(set(dataset.labels[rows].tolist())) < 2:
        raise UsageError(f"{data}: the {config.split} split holds {'no crops' if not len(rows) else 'one class only'}; "
                         "calibration needs reals and fakes")  # fmt: skip
    yield "statistics of the training crops"
    model.novelty = _novelty(model, dataset, config.images)
    scorer = TorchScorer(model, runtime=runtime)
    yield f"scoring the {config.split} split"
    scores = _scores(scorer, dataset, rows)
    stills = are_stills(dataset, rows)
    temperature = fit_temperature(scores.labels, scores.logits, video_weights(scores.videos))
    rates = (config.false_alarms, config.misses, config.unlike)
    levels = [_level(scores, scores.logits, temperature, moving, rates)
              for moving in ((False,) if stills else (False, True))]  # fmt: skip
    clip, clip_temperature = None, 1.0
    if scores.clips is not None and not stills:
        clip_temperature = fit_temperature(scores.labels, scores.clips, video_weights(scores.videos))
        clip = _level(scores, scores.clips, clip_temperature, True, rates)
    made = Calibration(
        data=dataset.folder, fingerprint=dataset.fingerprint(rows), weights=weights_checksum(model),
        forgeries=forgeries_of(dataset, [model.config.trained_on])[0], temperature=temperature,
        frame=levels[0], video=levels[1] if len(levels) > 1 else None, clip=clip, clip_temperature=clip_temperature,
    )  # fmt: skip
    tested = _rows(dataset, "test", model) if config.split != "test" else rows[:0]
    if len(tested):
        yield "scoring the test split"
        on_test = _scores(scorer, dataset, tested)
        tried = ("frame", *("video",) * (made.video is not None), *("clip",) * (made.clip is not None))
        made = dataclasses.replace(made, measured=tuple(_measured(on_test, made, level) for level in tried))
    card = model.config.card or _card_of_old(model, scores)
    card = dataclasses.replace(card, calibration=made)
    yield "writing the card"
    if model.novelty is not None:
        model.novelty.save(folder)
    write_card(folder, card)
    page = write_card_page(folder, card, model.notice)
    yield Calibrated(folder, card, page, _notes(made, config, model, dataset))


def card_of_training(
    model: Detector,
    dataset: CropDataset,
    used: Mapping[str, NDArray[np.int64]],
    fingerprint: str,
    validation: tuple[NDArray, NDArray, list[str]] | None,
) -> Card:
    """Card of a model that was just trained on ``dataset``, not calibrated.

    used: crops of each split, trained on and validated on.  fingerprint: of these.  validation: labels and scores [n]
    of the validation crops, and their videos; None: unknown.
    """
    trained = model.config.trained_on
    counts = []
    for split, rows in used.items():
        own = [dataset.videos[number].label for number in np.unique(dataset.video[rows])]
        counts.append(SplitCounts(split, own.count(0), own.count(1), len(rows)))
    return Card(
        data=dataset.folder, fingerprint=fingerprint, synthetic=bool(dataset.synthetic), splits=tuple(counts),
        forgeries=trained.forgeries if trained else (), crop=str(crop_policy(model.config)),
        recipe=trained.recipe if trained else "", corruptions=trained.corruptions if trained else (),
        **_auc(*validation) if validation else {"val_auc": None, "val_auc_interval": None},
        version=__version__, commit=commit(),
    )  # fmt: skip


def _auc(labels: NDArray, scores: NDArray, videos: list[str]) -> dict[str, Any]:
    found = evaluate_scores(labels, scores, EvaluateConfig.threshold).auc
    interval = auc_interval(labels, scores, videos, EvaluateConfig.bootstrap_draws, EvaluateConfig.confidence)
    return {"val_auc": found, "val_auc_interval": interval}


def _card_of_old(model: Detector, scores: _Scores) -> Card:
    """Card of a model that an earlier version trained, from what its configuration records."""
    trained = model.config.trained_on
    return Card(
        data="unknown", fingerprint="unknown", synthetic=bool(model.notice), splits=(),
        forgeries=trained.forgeries if trained else (), crop=str(crop_policy(model.config)),
        recipe=trained.recipe if trained else "", corruptions=trained.corruptions if trained else (),
        **_auc(scores.labels, probability(scores.logits), scores.videos), version="earlier", commit="unknown",
    )  # fmt: skip


def _rows(dataset: CropDataset, split: str, model: Detector) -> NDArray[np.int64]:
    """Crops of a split: its reals, and its fakes by forgeries that the model was trained on, if it has such."""
    return dataset.select(split, forgeries_of(dataset, [model.config.trained_on])[0])


def _novelty(model: Detector, dataset: CropDataset, images: int) -> Novelty | None:
    """Statistics of the training crops; without such, or for a model without a layer for it, those it has."""
    rows = _rows(dataset, "train", model)
    rows = rows[evenly_spaced(len(rows), images)]
    folded = frozen(model)
    layer = folded.novelty_layer()
    if layer is None or len(rows) < 2:
        return model.novelty
    kept: list[torch.Tensor] = []
    look = lambda _module, _inputs, output: kept.append(pooled(output).cpu())
    with hooked(folded, [(layer, look)]), torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            crops = torch.from_numpy(dataset.get(rows[start : start + BATCH]))
            folded(normalise(crops, model.config, device_of(folded)))
    return Novelty.fit(torch.cat(kept).double().numpy())


def _scores(scorer: Scorer, dataset: CropDataset, rows: NDArray[np.int64]) -> _Scores:
    clips = None
    if scorer.clips is None:
        outputs = scorer.outputs_rows(dataset, rows)
    else:
        found = score_clips(scorer, dataset, rows)
        outputs, clips = found.frames, found.logits[found.of]
    classes = scorer.config.num_classes
    novelty = outputs[:, classes] if outputs.shape[1] > classes else None
    names = dataset.video[rows].astype(str).tolist()
    return _Scores(dataset.labels[rows], outputs[:, :classes], novelty, names, clips)


def _at_level(scores: _Scores, values: NDArray[np.float64], moving: bool) -> tuple[NDArray, NDArray]:
    """Labels and values of the frames, or by video their means."""
    return by_video(scores.videos, scores.labels, values) if moving else (scores.labels, values)


def _level(
    scores: _Scores, logits: NDArray[np.float64], temperature: float, moving: bool, rates: tuple[float, float, float]
) -> Level:
    """Calibration of frames or videos by ``logits`` [n] of the frames or of their clips."""
    labels, before = _at_level(scores, probability(logits), moving)
    _, after = _at_level(scores, probability(logits / temperature), moving)
    novelty = None if scores.novelty is None else _at_level(scores, scores.novelty, moving)[1]
    weights = np.ones(len(labels)) if moving else video_weights(scores.videos)
    frames = round(float(np.median(np.unique(scores.videos, return_counts=True)[1]))) if moving else 1
    return level_of(labels, before, after, weights, novelty, rates, EvaluateConfig.confidence, frames)


def _measured(scores: _Scores, made: Calibration, name: str) -> Measured:
    """Verdicts at the level ``name`` on a split that had no part in the calibration."""
    moving, clips = name != "frame", name == "clip"
    level = made.level(moving, clips)
    logits = scores.logits / made.temperature
    if clips:
        assert scores.clips is not None
        logits = scores.clips / made.clip_temperature
    labels, values = _at_level(scores, probability(logits), moving)
    weights = np.ones(len(labels)) if moving else video_weights(scores.videos)
    novel = np.zeros(len(labels), bool)
    if scores.novelty is not None and level.novel_from is not None:
        novel = _at_level(scores, scores.novelty, moving)[1] > level.novel_from
    fake, real = (values >= level.fake_from) & ~novel, (values <= level.real_up_to) & ~novel
    wrong = np.where(labels == 0, fake, real)

    def rate(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> tuple[float, float, float] | None:
        cases = float(weights[among].sum())
        if not cases:
            return None
        share = float(weights[among & of].sum()) / cases
        return share, *rate_interval(share, cases, EvaluateConfig.confidence)

    everyone = np.ones(len(labels), bool)
    return Measured(
        level=name, reals=round(float(weights[labels == 0].sum())),
        fakes=round(float(weights[labels == 1].sum())), false_alarms=rate(fake, labels == 0),
        misses=rate(real, labels == 1), uncertain=rate(~fake & ~real, everyone), covered=rate(~wrong, everyone),
        novel=None if scores.novelty is None else float(np.average(novel, weights=weights)),
    )  # fmt: skip


def _notes(made: Calibration, config: CalibrateConfig, model: Detector, dataset: CropDataset) -> list[str]:
    notes = []
    level = made.level(True, made.clip is not None)
    unit = "videos" if made.video else "pictures"
    for kind, count, wanted, bound, name in (
        ("real", level.reals, config.false_alarms, level.false_alarms, "false alarms"),
        ("fake", level.fakes, config.misses, level.misses, "misses"),
        ("real", level.reals, config.unlike, level.novel_rate or 0, "inputs found unlike the training data"),
    ):
        if bound > wanted * (1 + 1e-6):
            needed = int(np.ceil(1 / wanted)) - 1
            notes.append(f"{name}: {wanted:.2%} takes {needed} {kind} {unit}, there are {count}; the limit is set for "
                         f"{bound:.1%}")  # fmt: skip
    if level.ece > level.ece_before:
        rise = f"{level.ece_before:.3f} to {level.ece:.3f}"
        notes.append(f"the calibration error of {unit} rose from {rise}: the temperature is that of single "
                     f"{'clips' if made.clip else 'frames'}")  # fmt: skip
    if model.novelty is None:
        cause = "the data has no train split" if model.novelty_layer() is not None else "this network has no map for it"
        notes.append(f"inputs unlike the training data are not recognised: {cause}")
    if not made.measured:
        why = "it was calibrated on" if config.split == "test" else "the data has none"
        notes.append(f"the limits were not tried on a test split: {why}")
    if dataset.synthetic:
        notes.append("rendered faces: every rate here is one of the demo set, and says nothing about real deepfakes")
    return notes
