"""AUC of a model before and after a change, forgery by forgery, on the same test crops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.evaluate import are_stills, protocol_note
from dtn_fast.evaluation.metrics import auc_gain_interval, auc_interval, by_video, evaluate_scores
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.runtime.scorer import Scorer

ALL = "all"
HEADER = ["data", "fakes", "frame AUC before", "after", "change", "video before", "after"]
Interval = tuple[float, float] | None


class Change(NamedTuple):
    """An AUC before and after, and the intervals of both and of their difference, by bootstrap over videos."""

    before: float
    after: float
    before_interval: Interval
    after_interval: Interval
    change_interval: Interval


class ChangeRow(NamedTuple):
    data: str
    """Name of the test set."""
    fakes: str
    """The forgery measured against all reals of the set; "all": every one."""
    frame: Change
    video: Change | None
    """None where each crop is a picture of its own."""
    note: str
    """Protocol note."""


class Comparison(NamedTuple):
    rows: list[ChangeRow]
    notes: list[str]
    """What is not measured, and the interval's level."""
    notice: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""
        text = lambda value, interval: f"{value:.4f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")
        body = []
        for row in self.rows:
            of = row.frame
            change = f"{of.after - of.before:+.4f}"
            if of.change_interval is not None:
                change += " ({:+.3f} to {:+.3f})".format(*of.change_interval)
            frame = [text(of.before, of.before_interval), text(of.after, of.after_interval), change]
            video = ["", ""] if row.video is None else [f"{row.video.before:.4f}", f"{row.video.after:.4f}"]
            body.append([row.data, row.fakes, *frame, *video])
        return HEADER, body

    def lines(self) -> list[str]:
        """The protocol notes of the sets, the notes and the notice."""
        protocols = [f"{row.data}: {row.note}" for row in self.rows if row.fakes == ALL]
        return [*protocols, *self.notes, *filter(None, [self.notice])]

    def to_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "frame": row.frame._asdict(), "video": row.video and row.video._asdict()}
                for row in self.rows]  # fmt: skip
        return {**self._asdict(), "rows": rows}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Comparison:
        """Restores the result of :meth:`to_json`.  Raises KeyError, TypeError, ValueError, AttributeError on other
        data."""
        change = lambda of: Change(float(of["before"]), float(of["after"]), *(
            of[name] and tuple(map(float, of[name])) for name in Change._fields[2:]
        ))  # fmt: skip
        made = lambda row: ChangeRow(str(row["data"]), str(row["fakes"]), change(row["frame"]),
                                     change(row["video"]) if row["video"] else None, str(row["note"]))  # fmt: skip
        rows = [made(row) for row in stored["rows"]]
        return cls(rows, list(map(str, stored["notes"])), str(stored["notice"]))

    def markdown(self) -> str:
        return "\n".join(markdown_table(*self.table())) + "\n\n" + "\n\n".join(self.lines()) + "\n"


def compare(
    before: Scorer, after: Scorer, sets: Mapping[str, CropDataset], config: EvaluateConfig = EvaluateConfig()
) -> Iterator[str | Comparison]:
    """Measures both models on the reals and fakes of ``config.split`` of each set, all forgeries together and each by
    itself: yields each set's name before measuring it, then the result.

    A set whose split lacks a class is left out, and a note says so.  Raises UsageError when crops do not fit a model.
    """
    rows, notes = [], []
    for name, dataset in sets.items():
        yield name
        at = dataset.select(config.split)
        labels = dataset.labels[at]
        if set(labels.tolist()) != {0, 1}:
            notes.append(f"{name}: not measured, its {config.split} split lacks reals or fakes")
            continue
        dataset.check_fits(after.config, after.name)
        scores = [scorer.score_rows(dataset, at) for scorer in (before, after)]
        kinds = np.array([dataset.videos[v].method for v in dataset.video[at]])
        methods = sorted(set(kinds[labels == 1].tolist()))
        for title, group in {ALL: tuple(methods), **({m: (m,) for m in methods} if len(methods) > 1 else {})}.items():
            keep = (labels == 0) | np.isin(kinds, group)
            y, videos = labels[keep], dataset.video[at][keep].astype(str).tolist()
            old, new = (s[keep] for s in scores)
            frame, video = _change(y, old, new, videos, config), None
            if not are_stills(dataset, at):
                y, old = by_video(videos, y, old)
                _, new = by_video(videos, labels[keep], new)
                video = _change(y, old, new, [str(number) for number in range(len(y))], config)
            rows.append(ChangeRow(name, title, frame, video, protocol_note(dataset, config.split, group)))
    if rows:
        notes.append(f"intervals: {100 * config.confidence:g} %, by {config.bootstrap_draws:,} bootstrap draws of "
                     "videos; a change's draws serve both models")  # fmt: skip
    yield Comparison(rows, notes, after.notice)


def _change(labels: NDArray, old: NDArray, new: NDArray, videos: list[str], config: EvaluateConfig) -> Change:
    how = config.bootstrap_draws, config.confidence
    before, after = (evaluate_scores(labels, scores, config.threshold).auc for scores in (old, new))
    assert before is not None, "both classes are there, checked by the caller"
    assert after is not None
    first, second = (auc_interval(labels, scores, videos, *how) for scores in (old, new))
    return Change(before, after, first, second, auc_gain_interval(labels, old, new, videos, *how))
