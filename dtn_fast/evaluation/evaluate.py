"""Metrics of a scorer on prepared crops: overall and per forgery, at frame and video level."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.attributes import attributes_of
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.forgery_families import by_family, named_families
from dtn_fast.data.video_table import noun
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.groups import GroupTable, measure_groups
from dtn_fast.evaluation.localisation import MaskScore, localisation, mask_table
from dtn_fast.evaluation.metrics import Metrics, auc_gain_interval, auc_interval, by_video, evaluate_scores
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.model.card import temperature_of
from dtn_fast.model.config import TrainedOn
from dtn_fast.runtime.clips import clip_probability, score_clips
from dtn_fast.runtime.scorer import Scorer, probability

BY_CLIPS = "Videos scored by the temporal head"
MANY = 8
"""Maximum number of forgeries that a protocol note names."""


class ClipRow(NamedTuple):
    """Videos scored by a temporal head, beside the mean over their frames."""

    video: Metrics
    interval: tuple[float, float] | None
    """Confidence interval of the AUC, by bootstrap over videos; None if there is no AUC."""
    gain: float | None
    """AUC less that of the mean over frames."""
    gain_interval: tuple[float, float] | None
    """Its confidence interval, each draw of videos serving both."""

    def gain_text(self) -> str:
        if self.gain is None or self.gain_interval is None:
            return ""
        low, high = self.gain_interval
        return f"{self.gain:+.4f} ({low:+.3f} to {high:+.3f})"


class EvaluationRow(NamedTuple):
    fakes: str
    """The forgery measured against all reals of the split; "all": those that the model was trained on, or without a
    record of them every one; "unseen": the others; "family ...": those of a family."""
    frame: Metrics
    video: Metrics
    """Without metrics where each crop is a picture of its own: they would be those of the frames."""
    frame_interval: tuple[float, float] | None
    """Confidence interval of the frame AUC, by bootstrap over videos; None if there is no AUC."""
    video_interval: tuple[float, float] | None
    note: str
    """Protocol note: split, number of videos and frames, how video scores are averaged."""
    clip: ClipRow | None = None
    """The videos scored by the model's temporal head; None: it has none here."""


class Evaluation(NamedTuple):
    split: str
    rows: list[EvaluationRow]
    videos: int
    no_face: int
    """Number of videos of the split in which no face was found; they are not scored."""
    unreadable: int
    frames_per_video: float
    notice: str
    groups: GroupTable | None = None
    """Metrics by groups of people; None: no attributes are known."""
    masks: list[MaskScore] = []  # noqa: RUF012 (never changed)
    """Scores of the model's masks against the data's; empty: one of them has none."""

    def note(self) -> str:
        """The first row's protocol note."""
        return self.rows[0].note

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text."""
        video = any(row.video.acc is not None for row in self.rows)
        header = ["fakes", "frame ACC", "frame AUC", "interval", "frame EER", "frame AP"]
        header += ["video ACC", "video AUC", "interval", "videos"] if video else ["pictures"]
        body = []
        for row in self.rows:
            cells = [row.frame.text("acc"), row.frame.text("auc"), _text(row.frame_interval)]
            cells += [row.frame.text("eer"), row.frame.text("ap")]
            cells += [row.video.text("acc"), row.video.text("auc"), _text(row.video_interval)] if video else []
            body.append([row.fakes, *cells, f"{row.video.reals} + {row.video.fakes}"])
        return header, body

    def clip_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text, of the videos scored by the temporal head; no rows without one."""
        header = ["fakes", "video ACC", "video AUC", "interval", "AUC less the mean's over frames", "videos"]
        body = []
        for row in self.rows:
            if (clip := row.clip) is not None:
                cells = [clip.video.text("acc"), clip.video.text("auc"), _text(clip.interval), clip.gain_text()]
                body.append([row.fakes, *cells, f"{clip.video.reals} + {clip.video.fakes}"])
        return header, body

    def to_json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            found = {**row._asdict(), "frame": row.frame._asdict(), "video": row.video._asdict()}
            clip = found.pop("clip")
            rows.append(found if clip is None else {**found, "clip": {**clip._asdict(), "video": clip.video._asdict()}})
        masks, groups = [score._asdict() for score in self.masks], self.groups and self.groups.to_json()
        return {**self._asdict(), "rows": rows, "masks": masks, "groups": groups, "note": self.note()}

    def markdown(self) -> str:
        header, body = self.table()
        text = "\n".join(markdown_table(header, body))
        if self.masks:
            text += "\n\nMasks, percent:\n\n" + "\n".join(markdown_table(*mask_table(self.masks)))
        if (clips := self.clip_table())[1]:
            text += f"\n\n{BY_CLIPS}:\n\n" + "\n".join(markdown_table(*clips))
        groups = f"\n{self.groups.markdown()}" if self.groups else ""
        return f"{text}\n\n{self.note()}.{' **' + self.notice + '**' if self.notice else ''}\n{groups}"


def _text(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def evaluate(
    scorer: Scorer,
    dataset: CropDataset,
    config: EvaluateConfig = EvaluateConfig(),
    groups: Mapping[str, tuple[str, ...]] | None = None,
    masks: bool = False,
) -> Evaluation:
    """Scores every crop of a split once and measures each group of forgeries against all reals of the split.

    groups: row title -> forgeries; default: those that the model was trained on together, if the set has such, and the
    others together; then by family and one by one; and by groups of people, where attributes are known.  masks: also
    score the masks of a mask head, if the data has masks.  Raises
    UsageError when the split is empty or the crops do not have the model's size and margin.
    """
    split, rows = config.split, dataset.select(config.split)
    if not len(rows):
        raise UsageError(f"the {split} split holds no crops")
    dataset.check_fits(scorer.config, scorer.name)
    stills = are_stills(dataset, rows)
    if scorer.clips is None or stills:
        scores, clips = scorer.score_rows(dataset, rows), None
    else:
        found = score_clips(scorer, dataset, rows)
        scores = probability(found.frames[:, : scorer.config.num_classes] / temperature_of(scorer.config.card))
        clips = clip_probability(scorer, found.logits)[found.of]
    labels, names = dataset.labels[rows], dataset.video[rows].astype(str)
    kinds = np.array([v.method for v in dataset.videos])[dataset.video[rows]]
    unit = noun([video for video in dataset.videos if video.split == split])
    drawn = f"{100 * config.confidence:g} % intervals by {config.bootstrap_draws:,} bootstrap draws of {unit}"
    table, people = [], None
    if groups is None:
        seen, others = forgeries_of(dataset, [scorer.config.trained_on])
        families = {f"family {name}": own for name, own in families_in(dataset, config).items()}
        groups = {
            "all": seen,
            **({"unseen": others} if others else {}),
            **families,
            **{m: (m,) for m in dataset.methods},
        }
        people = _by_group(scorer, dataset, rows, scores, stills, config)
    for title, group in groups.items():
        keep = (labels == 0) | np.isin(kinds, group)
        note = f"{protocol_note(dataset, split, group)}; {drawn}"
        if clips is not None:
            note += f"; by the temporal head: mean over clips of {scorer.config.clip} frames"
        own = None if clips is None else clips[keep]
        table.append(_row(title, labels[keep], scores[keep], names[keep].tolist(), stills, config, note, own))
    states = [state for video, state in zip(dataset.videos, dataset.status, strict=True) if video.split == split]
    return Evaluation(
        split=split,
        rows=table,
        videos=len(states),
        no_face=sum(not state["faces"] and not state["error"] for state in states),
        unreadable=sum(bool(state["error"]) for state in states),
        frames_per_video=len(rows) / max(len(set(names.tolist())), 1),
        notice=scorer.notice,
        groups=people,
        masks=localisation(scorer, dataset, groups, config) if masks else [],
    )


def families_in(
    dataset: CropDataset, config: EvaluateConfig, elsewhere: Collection[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Family -> its forgeries of ``dataset``; empty when all are in the same families.  Raises UsageError when
    ``config`` names a family of a forgery that is neither there nor ``elsewhere``, in another set of a table."""
    named = named_families(config.families).items()
    here = {forgery: own for forgery, own in named if forgery in dataset.methods or forgery not in elsewhere}
    return by_family(dataset.methods, here)


def _by_group(
    scorer: Scorer,
    dataset: CropDataset,
    rows: NDArray[np.int64],
    scores: NDArray[np.float64],
    stills: bool,
    config: EvaluateConfig,
) -> GroupTable | None:
    """Metrics of the videos (or pictures) of the crops ``rows`` by their people's attributes; None: none are known."""
    numbers = list(dict.fromkeys(dataset.video[rows].tolist()))
    videos = [dataset.videos[number] for number in numbers]
    known, notes = attributes_of(dataset.videos, config.split, config.groups)
    attributes = {name: own for name, values in known.items() if any(own := [values[number] for number in numbers])}
    if not attributes and config.groups is not None:
        raise UsageError("; ".join([f"{config.groups}: no attribute of the {noun(videos)} of the {config.split} split",
                                    *notes]))  # fmt: skip
    if not attributes:
        return None
    labels, means = by_video([str(number) for number in dataset.video[rows]], dataset.labels[rows], scores)
    calibration = scorer.config.card.calibration if scorer.config.card is not None else None
    threshold, origin = config.group_threshold, "--group-threshold"
    if threshold is None and calibration is not None:
        threshold, origin = calibration.level(not stills).fake_from, "the limit of the model's calibration"
    elif threshold is None:
        threshold, origin = config.threshold, "--threshold, as the model is not calibrated"
    people = [video.identities[0] if video.identities else video.path for video in videos]
    table = measure_groups(labels, means, people, attributes, threshold, config)
    return table._replace(notes=[f"the threshold is {origin}", *table.notes, *notes])


def forgeries_of(dataset: CropDataset, trained: Iterable[TrainedOn | None]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The forgeries of ``dataset`` that the models were trained on, and the others.

    All are the former when the set has none that they were trained on (it is another dataset), or when for a model that
    is unknown or another choice than for the first.
    """
    known = [tuple(m for m in dataset.methods if m in facts.forgeries) if facts else () for facts in trained]
    seen = known[0] if known and len(set(known)) == 1 else ()
    return (seen, tuple(m for m in dataset.methods if m not in seen)) if seen else (dataset.methods, ())


def _row(
    title: str,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    videos: list[str],
    stills: bool,
    config: EvaluateConfig,
    note: str,
    clips: NDArray[np.float64] | None,
) -> EvaluationRow:
    """Metrics of frames [n] at frame level and, by the names of their ``videos``, at video level unless ``stills``.

    clips: P(fake) of each frame's clip; None: no temporal head."""
    interval = lambda y, s, of: auc_interval(y, s, of, config.bootstrap_draws, config.confidence)
    frame, between = evaluate_scores(labels, scores, config.threshold), interval(labels, scores, videos)
    if stills:
        nothing = Metrics(None, None, None, None, frame.reals, frame.fakes)
        return EvaluationRow(title, frame, nothing, between, None, note)
    y, s = by_video(videos, labels, scores)
    numbers = [str(number) for number in range(len(y))]
    video, own = evaluate_scores(y, s, config.threshold), None
    if clips is not None:
        _, c = by_video(videos, labels, clips)
        made = evaluate_scores(y, c, config.threshold)
        gain = None if made.auc is None or video.auc is None else made.auc - video.auc
        between_both = auc_gain_interval(y, s, c, numbers, config.bootstrap_draws, config.confidence)
        own = ClipRow(made, interval(y, c, numbers), gain, between_both)
    return EvaluationRow(title, frame, video, between, interval(y, s, numbers), note, own)


def are_stills(dataset: CropDataset, rows: NDArray[np.int64]) -> bool:
    """Whether each crop of ``rows`` is a picture of its own, so that there is no video level."""
    videos = np.unique(dataset.video[rows])
    return len(videos) == len(rows) and noun([dataset.videos[number] for number in videos]) == "pictures"


def protocol_note(dataset: CropDataset, split: str, forgeries: tuple[str, ...]) -> str:
    """Protocol note, one sentence, of metrics on the reals of ``split`` and its fakes of ``forgeries``."""
    chosen = [(video, state) for video, state in zip(dataset.videos, dataset.status, strict=True)
              if video.split == split and (not video.label or video.method in forgeries)]  # fmt: skip
    fakes = sum(video.label for video, _ in chosen)
    faceless = sum(not state["faces"] and not state["error"] for _, state in chosen)
    unreadable = sum(bool(state["error"]) for _, state in chosen)
    rows, unit = dataset.select(split, forgeries), noun([video for video, _ in chosen])
    frames = len(rows) / max(len(chosen) - faceless - unreadable, 1)
    how = f"{frames:.1f} frames each on average, {dataset.faces}; video score = mean of its frames"
    if are_stills(dataset, rows):
        how = f"{dataset.faces}; no video level, as each is a picture of its own"
    named = ", ".join(forgeries) if len(forgeries) <= MANY else f"{len(forgeries)} forgeries"
    named = f"; fakes by {named}" if named else ""
    return (
        f"{split} split, {len(chosen)} {unit} ({len(chosen) - fakes} real, {fakes} fake), {how}; {faceless} {unit} "
        f"without a face and {unreadable} unreadable ones not scored{named}"
    )
