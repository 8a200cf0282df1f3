"""Scoring of clips by a model's temporal head: outputs of a person's frames, in temporal order -> P(fake)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dtn_fast.data.clips import clips_of, stretched, tracks_of
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.model.temporal import TemporalHead
from dtn_fast.onnx_session import session_of
from dtn_fast.runtime.scorer import ClipScorer, Scorer, probability

CHUNK = 256
"""Least number of crops whose features are held at once, while there are more."""

FAR = 3.0
"""Ratio of two distances between frames beyond which a person is told of it."""


class TorchClips(ClipScorer):
    """A temporal head in torch, in float32, in eval mode."""

    def __init__(self, head: TemporalHead) -> None:
        super().__init__(head.frames, head.features, float(head.step))
        self._head = head.float().eval().requires_grad_(False)

    def logits(self, features: NDArray[np.float64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        inputs = (torch.from_numpy(x).float().to(self._head.mean.device) for x in (features, logits))
        with torch.inference_mode():
            return self._head(*inputs).double().cpu().numpy()


class OnnxClips(ClipScorer):
    """The temporal head of an ONNX file, in the file beside it, which must be of the same weights.

    Raises UsageError when that file is missing, cannot be run, or is of another export.
    """

    def __init__(self, path: Path, weights: str, threads: int) -> None:
        beside = clip_file(path)
        if not beside.is_file():
            raise UsageError(f"{beside}: missing; it holds the temporal head of {path.name} and must travel with it")
        self._session = session_of(str(beside), str(beside), threads=threads)
        meta = self._session.get_modelmeta().custom_metadata_map
        if not weights or meta.get("weights") != weights:
            raise UsageError(f"{beside}: not the temporal head of {path.name}; copy both, or export again")
        _, frames, features = self._session.get_inputs()[0].shape
        super().__init__(int(frames), int(features), float(meta.get("step", 0)))

    def logits(self, features: NDArray[np.float64], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        inputs = {"features": features.astype(np.float32), "logits": logits.astype(np.float32)}
        return self._session.run(["clip_logits"], inputs)[0].astype(np.float64)


def clip_file(path: Path) -> Path:
    """The file of the temporal head beside an ONNX file: dtn.clip.onnx beside dtn.onnx."""
    return path.with_name(f"{path.stem}.clip.onnx")


class TrackClips:
    """Score of a person's track whose frames arrive one by one, in constant memory: the last T frames are kept."""

    def __init__(self, scorer: Scorer) -> None:
        assert scorer.clips is not None
        self._scorer, self._head = scorer, scorer.clips
        self._last: deque[tuple[NDArray[np.float64], NDArray[np.float64]]] = deque(maxlen=self._head.frames)
        self._new, self._seen, self._sum = 0, 0, 0.0

    def add(self, features: NDArray[np.float64], logits: NDArray[np.float64]) -> None:
        """Takes the features [C] and logits [classes] of the next frame."""
        self._last.append((features, logits))
        self._new += 1
        self._seen += 1
        if self._new == self._head.frames:
            self._judge()

    def score(self) -> float:
        """Mean P(fake) over the track's frames, each by the first clip that holds it; there must be a frame."""
        if self._new:
            self._judge()
        return self._sum / self._seen

    def _judge(self) -> None:
        kept, clip = list(self._last), self._head.frames
        frames = kept if len(kept) == clip else [kept[place] for place in stretched(len(kept), clip)]
        features, logits = (np.stack(part)[None] for part in zip(*frames, strict=True))
        self._sum += self._new * float(clip_probability(self._scorer, self._head.logits(features, logits))[0])
        self._new = 0


def pace_note(head: ClipScorer, numbers: Sequence[int]) -> str:
    """A sentence when the analysed frames with these numbers are much nearer or farther apart than in training."""
    own = float(np.median(np.diff(numbers))) if len(numbers) > 1 else 0.0
    if not own or not head.step or max(own / head.step, head.step / own) <= FAR:
        return ""
    return (f"the analysed frames are {own:g} apart, those of the temporal head's clips {head.step:g} in training; "
            "analyse as many as were prepared (--frames, --rate)")  # fmt: skip


class Clips(NamedTuple):
    """Outputs on crops, of the frames and of the clips that they form."""

    frames: NDArray[np.float64]
    """[n, columns] outputs of the crops, without the features."""
    logits: NDArray[np.float64]
    """[m, classes] logits of the clips."""
    of: NDArray[np.int64]
    """[n] number of the clip that counts for each crop."""


def score_clips(scorer: Scorer, dataset: CropDataset, rows: NDArray[np.int64]) -> Clips:
    """Scores the crops ``rows`` [n] and the clips of each person of each video, as they are divided in evaluation.

    The video's score is the mean over its crops of their clips' P(fake), as :class:`TrackClips` gives it too.
    """
    head = scorer.clips
    assert head is not None
    place = {int(row): number for number, row in enumerate(rows)}
    frames: list[NDArray[np.float64]] = []
    logits: list[NDArray[np.float64]] = []
    order, of, made = list[int](), np.zeros(len(rows), np.int64), 0
    waiting: list[NDArray[np.int64]] = []
    tracks = tracks_of(dataset, rows)
    for number, track in enumerate(tracks, 1):
        waiting.append(track)
        if sum(map(len, waiting)) < CHUNK and number < len(tracks):
            continue
        outputs = scorer.outputs_rows(dataset, np.concatenate(waiting))
        base, features = outputs[:, : -head.features], outputs[:, -head.features :]
        frames.append(base)
        begin = 0
        for own in waiting:
            clips = clips_of(len(own), head.frames)
            at = begin + clips.frames
            logits.append(head.logits(features[at], base[at, : scorer.config.num_classes]))
            numbers = [place[int(row)] for row in own]
            of[numbers] = made + clips.of
            order += numbers
            made, begin = made + len(clips.frames), begin + len(own)
        waiting = []
    found = np.concatenate(frames)
    return Clips(found[np.argsort(order)], np.concatenate(logits), of)


def clip_probability(scorer: Scorer, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(fake) [B] of clips, by the temperature of the model's clips if it is calibrated."""
    card = scorer.config.card
    calibration = card.calibration if card is not None else None
    return probability(logits / (1.0 if calibration is None else calibration.clip_temperature))
