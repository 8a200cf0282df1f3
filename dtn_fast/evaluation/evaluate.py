"""A scorer and prepared crops to metrics: overall and per forgery, frame and video level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.metrics import Metrics, auc_interval, by_video, evaluate_scores
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.runtime.scorer import Scorer


class EvaluationRow(NamedTuple):
    fakes: str
    """The forgery measured against all reals of the split, or "all"."""
    frame: Metrics
    video: Metrics
    frame_interval: tuple[float, float] | None
    """95 % of the frame AUC, by bootstrap over videos; None where there is no AUC."""
    video_interval: tuple[float, float] | None
    note: str
    """How the figures came about, one sentence."""


class Evaluation(NamedTuple):
    split: str
    rows: list[EvaluationRow]
    videos: int
    no_face: int
    """Videos of the split in which no face was found; they are counted here and scored nowhere."""
    unreadable: int
    frames_per_video: float
    notice: str

    def note(self) -> str:
        """That of the first row, over all."""
        return self.rows[0].note

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""
        header = ["fakes", "frame ACC", "frame AUC", "95 %", "frame EER", "frame AP", "video ACC", "video AUC", "95 %",
                  "videos"]  # fmt: skip
        body = []
        for row in self.rows:
            cells = [row.frame.text("acc"), row.frame.text("auc"), _text(row.frame_interval)]
            cells += [row.frame.text("eer"), row.frame.text("ap"), row.video.text("acc"), row.video.text("auc")]
            cells += [_text(row.video_interval), f"{row.video.reals} + {row.video.fakes}"]
            body.append([row.fakes, *cells])
        return header, body

    def to_json(self) -> dict[str, Any]:
        rows = [{**r._asdict(), "frame": r.frame._asdict(), "video": r.video._asdict()} for r in self.rows]
        return {**self._asdict(), "rows": rows, "note": self.note()}

    def markdown(self) -> str:
        header, body = self.table()
        text = "\n".join(markdown_table(header, body))
        return f"{text}\n\n{self.note()}.{' **' + self.notice + '**' if self.notice else ''}\n"


def _text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def evaluate(
    scorer: Scorer,
    dataset: CropDataset,
    split: str = "test",
    groups: Mapping[str, tuple[str, ...]] | None = None,
    chunk: int = 256,
) -> Evaluation:
    """Scores every crop of ``split`` once and measures each group of forgeries against all reals.

    groups: row title -> forgeries; default all of them together, then one by one.  Raises UsageError when the split
    is empty or the crops are of another size than the model's.
    """
    rows = dataset.select(split)
    if not len(rows):
        raise UsageError(f"the {split} split holds no crops")
    if dataset.size != scorer.config.image_size:
        raise UsageError(
            f"the crops are {dataset.size} pixels, the model takes {scorer.config.image_size}; prepare again"
        )
    parts = [scorer.score(dataset.get(rows[i : i + chunk])) for i in range(0, len(rows), chunk)]
    scores: NDArray[np.float64] = np.concatenate(parts)
    labels, names = dataset.labels[rows], dataset.video[rows].astype(str)
    kinds = np.array([v.method for v in dataset.videos])[dataset.video[rows]]
    table = []
    for title, group in (groups or {"all": dataset.methods, **{m: (m,) for m in dataset.methods}}).items():
        keep = (labels == 0) | np.isin(kinds, group)
        frame = evaluate_scores(labels[keep], scores[keep])
        frames = (labels[keep], scores[keep], names[keep].tolist())
        y, s = by_video(frames[2], *frames[:2])
        whole = [str(number) for number in range(len(y))]
        intervals = auc_interval(*frames), auc_interval(y, s, whole)
        note = protocol_note(dataset, split, group)
        table.append(EvaluationRow(title, frame, evaluate_scores(y, s), *intervals, note))
    states = [state for video, state in zip(dataset.videos, dataset.status, strict=True) if video.split == split]
    return Evaluation(
        split=split,
        rows=table,
        videos=len(states),
        no_face=sum(not state["faces"] and not state["error"] for state in states),
        unreadable=sum(bool(state["error"]) for state in states),
        frames_per_video=len(rows) / max(len(set(names.tolist())), 1),
        notice=scorer.notice,
    )


def protocol_note(dataset: CropDataset, split: str, forgeries: tuple[str, ...], intervals: bool = True) -> str:
    """How figures on ``split``, its reals and the fakes of ``forgeries``, come about: one sentence."""
    chosen = [(video, state) for video, state in zip(dataset.videos, dataset.status, strict=True)
              if video.split == split and (not video.label or video.method in forgeries)]  # fmt: skip
    fakes = sum(video.label for video, _ in chosen)
    faceless = sum(not state["faces"] and not state["error"] for _, state in chosen)
    unreadable = sum(bool(state["error"]) for _, state in chosen)
    frames = len(dataset.select(split, forgeries)) / max(len(chosen) - faceless - unreadable, 1)
    drawn = "; intervals by 1,000 bootstrap draws of videos" if intervals else ""
    return (
        f"{split} split, {len(chosen)} videos ({len(chosen) - fakes} real, {fakes} fake), {frames:.1f} frames each on "
        f"average, {dataset.faces}; video score = mean of its frames; {faceless} videos without a face and "
        f"{unreadable} unreadable ones not scored{drawn}"
    )
