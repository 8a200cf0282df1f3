"""AUC of models under every corruption and level (the paper's Figure 5), as a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.corrupt import LEVELS, corrupt
from dtn_fast.data.crop_dataset import CropDataset, full_fingerprint
from dtn_fast.errors import UsageError, tell
from dtn_fast.evaluation.config import FIGURE5, EvaluateConfig, RobustnessConfig
from dtn_fast.evaluation.evaluate import are_stills, protocol_note
from dtn_fast.evaluation.metrics import by_video, evaluate_scores
from dtn_fast.evaluation.plotting import DASHES, MARKERS, drawing, legible, svg_text
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.config import DTNConfig, ModelConfig
from dtn_fast.runtime.scorer import Scorer

CHUNK = 256
RULE = ("corruptions are applied to the face crops, video and what says so to whole videos before faces are found; "
        "h264_still codes each crop by itself; frame AUC over all forgeries")  # fmt: skip
OLD_RULE = "corruptions are applied to the face crops; frame AUC over all forgeries"
"""Rule of an earlier version, which called h264_still video."""
SEEN = ("trained on it: yes: the training augmentation or data held the corruption; in the gate: the expert gate is "
        "trained with such noise on its input; not recorded: the file does not say")  # fmt: skip
GATE_NOISE = {"gaussian": "gaussian_noise", "blur": "blur", "contrast": "contrast"}
"""Corruption of the same name as a disturbance of the gate's input.  "As Gaussian noise has been used in the MoE module
of our DTN, we substitute the Gaussian noise with the Uniform noise to address the data leakage problem" (Figure 5)."""
Seen = Literal["no", "yes", "in the gate", "not recorded"]
FILLS: dict[Seen, str] = {"no": "full", "yes": "none", "in the gate": "none", "not recorded": "left"}
"""Fill of a marker in the plot."""


def seen(config: ModelConfig, kind: str) -> Seen:
    """Whether a model was trained on a kind of corruption, by the facts in its configuration."""
    alike = {kind, "video"} if kind == "h264_still" else {kind}
    if config.trained_on is not None and alike & {*config.trained_on.corruptions}:
        return "yes"
    if isinstance(config, DTNConfig) and config.num_experts and GATE_NOISE.get(config.noise) == kind:
        return "in the gate"
    return "not recorded" if config.trained_on is None else "no"


class RobustnessProgress(NamedTuple):
    done: int
    total: int
    """Number of cells; a cell is one corruption at one level, for all models."""
    name: str


def robustness(
    scorers: Mapping[str, Scorer],
    dataset: CropDataset,
    out: Path,
    config: RobustnessConfig = RobustnessConfig(),
    videos: CropDataset | None = None,
) -> Iterator[RobustnessProgress]:
    """Writes ``out``/robustness.json, .md and .svg and yields progress; a repeated call measures only missing cells.

    The paper measures "various unseen corruptions" (Figure 5): each row says whether its model was trained on the
    corruption, and of a model that was, a warning too.  Level 0, the untouched crops, is measured once.  Noise and
    blocks depend only on the seed, the crop, the corruption and its level.  videos: crops of the same videos, corrupted
    before their faces were found, on which the corruptions that they hold are measured.  Raises UsageError when the
    split has one class, a model has another size or margin than the crops, ``videos`` are of other videos or lack a
    level, or the folder holds results of other data.
    """
    levels, split, seed = config.levels, config.split, config.seed
    rows = dataset.select(split)
    labels = dataset.labels[rows]
    if set(labels.tolist()) != {0, 1}:
        raise UsageError(f"the {split} split needs reals and fakes; it has {len(rows)} crops")
    for name, scorer in scorers.items():
        dataset.check_fits(scorer.config, name)
        dataset.tell_differences(scorer.config, name)
    whole = _whole_videos(dataset, videos, split)
    kinds = _titled(config, whole)
    trained = {name: {title: seen(scorer.config, kind) for title, kind in kinds.items()}
               for name, scorer in scorers.items()}  # fmt: skip
    for name, known in trained.items():
        if held := [title for title, state in known.items() if state == "yes"]:
            tell(f"{name}: was trained on {', '.join(held)}: no unseen corruptions, as Figure 5's are; train --preset "
                 "robustness holds none of them")  # fmt: skip
    cells = [(title, level) for title in kinds for level in levels if level]
    cells = [("", 0), *cells] if 0 in levels else cells
    identity = _identity(dataset, rows, split, seed)
    whole_identity = None if videos is None else videos.fingerprint(videos.select(split))
    found = _Results(out / "robustness.json", identity, trained, whole_identity)
    few = dataset.get(dataset.evenly_spaced(split, 16))
    for name, scorer in scorers.items():
        found.recognise(name, scorer.logits(few))
    with ThreadPoolExecutor(config.workers) as pool:
        for number, (title, level) in enumerate(cells):
            yield RobustnessProgress(number, len(cells), _key(title, level))
            missing = {name: s for name, s in scorers.items() if not found.has(name, title, level)}
            if not missing:
                continue
            kind = kinds.get(title, "")
            source, taken = (videos, whole[kind, level]) if (kind, level) in whole else (dataset, rows)
            assert source is not None
            scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in missing}
            for start in range(0, len(taken), CHUNK):
                part = taken[start : start + CHUNK]
                crops = source.get(part)
                if source is dataset:
                    crops = _corrupted(crops, part, kind, level, seed, pool)
                for name, scorer in missing.items():
                    scores[name].append(scorer.score(crops))
            for name, parts in scores.items():
                auc = _auc(source, taken, source.labels[taken], np.concatenate(parts))
                found.add(name, title, level, auc)
    found.write()
    yield RobustnessProgress(len(cells), len(cells), "")
    notice = " ".join(sorted({s.notice for s in scorers.values()} - {""}))
    note = "; ".join([RULE, *_faceless(videos, split, whole), protocol_note(dataset, split, dataset.methods)])
    write_whole(out / "robustness.md", markdown(found.cells, trained, levels, note, notice))
    write_whole(out / "robustness.svg", plot(found.cells, trained, levels, notice))


WholeVideos = dict[tuple[str, int], NDArray[np.int64]]
"""Rows of the crops of corrupted videos by (kind, level)."""


def _whole_videos(dataset: CropDataset, videos: CropDataset | None, split: str) -> WholeVideos:
    """The crops of each corruption of whole videos.  Raises UsageError when they are of other videos, cut in another
    way, or lack a class."""
    if videos is None:
        return {}
    where = f"--videos {videos.folder}"
    if (videos.size, videos.crop) != (dataset.size, dataset.crop):
        raise UsageError(f"{where}: cut in another way ({videos.size} pixels, {videos.crop}) than the crops "
                         f"({dataset.size}, {dataset.crop}); prepare them with the same options")  # fmt: skip
    frames, wanted = ({state["asked"] for state in d.status} for d in (videos, dataset))
    if frames != wanted:
        raise UsageError(f"{where}: of {max(frames)} frames a video, the crops are of {max(wanted)}; prepare them with "
                         f"--frames {max(wanted)}")  # fmt: skip
    expected = sorted((v.path, v.label, v.method) for v in dataset.videos if v.split == split)
    numbers: dict[tuple[str, int], list[int]] = {}
    for number, video in enumerate(videos.videos):
        if video.split == split:
            if len(video.corruptions) != 1:
                raise UsageError(f"{where}: not crops of corrupted videos; make them by dtn-fast prepare --corrupt")
            numbers.setdefault(video.corruptions[0], []).append(number)
    found = {}
    for (kind, level), of in numbers.items():
        if sorted(videos.videos[number][:3] for number in of) != expected:
            raise UsageError(f"{where}: {kind} {level} is of other videos than the {split} split of {dataset.folder}; "
                             "prepare both from the same dataset with the same options")  # fmt: skip
        found[kind, level] = np.flatnonzero(np.isin(videos.video, of))
        if set(videos.labels[found[kind, level]].tolist()) != {0, 1}:
            raise UsageError(f"{where}: no face of reals or of fakes was found with {kind} {level}; leave it out")
    return found


def _titled(config: RobustnessConfig, whole: WholeVideos) -> dict[str, str]:
    """The corruptions to measure: title -> kind; one of whole videos says so.  Raises UsageError when a level of it is
    missing."""
    held = {kind for kind, _ in whole}
    kinds = config.kinds or tuple("h264_still" if k == "video" and k not in held else k for k in FIGURE5)
    if "video" in kinds and "video" not in held:
        raise UsageError("--kinds video: needs crops of videos that were coded anew: dtn-fast prepare ROOT --out h264 "
                         "--splits test --corrupt video, then --videos h264; the quick form is h264_still")  # fmt: skip
    for kind in kinds:
        if lacking := [level for level in config.levels if level and kind in held and (kind, level) not in whole]:
            raise UsageError(f"--videos: holds no {kind} at level {' '.join(map(str, lacking))}; prepare it with these "
                             "--corrupt-levels, or leave them out of --levels")  # fmt: skip
    return {kind if kind == "video" or kind not in held else f"{kind} of videos": kind for kind in kinds}


def _faceless(videos: CropDataset | None, split: str, whole: WholeVideos) -> list[str]:
    """A note with the number of corrupted videos in which no face was found, by kind and level."""
    if videos is None:
        return []
    lost = dict.fromkeys(whole, 0)
    for video, state in zip(videos.videos, videos.status, strict=True):
        if video.split == split:
            lost[video.corruptions[0]] += not state["faces"]
    counts = ", ".join(f"{kind} {level}: {count}" for (kind, level), count in sorted(lost.items()))
    return [f"whole videos without a face, not scored: {counts}"]


LevelAuc = dict[str, float]
LevelAucs = dict[str, dict[str, LevelAuc]]
"""Frame and video AUC (no video AUC of single pictures) by model, then by "title level"."""
Trained = dict[str, dict[str, Seen]]
"""Whether a model was trained on a corruption: by model, then by title; all models have the same titles."""


def _key(title: str, level: int) -> str:
    return f"{title} {level}" if level else "untouched"


class _Results:
    """The AUCs so far, written to disk after each."""

    def __init__(self, path: Path, identity: dict[str, Any], trained: Trained, videos: str | None) -> None:
        self._path, self._identity, self._trained, self._videos = path, identity, trained, videos
        self.cells: LevelAucs = {}
        self._probes: dict[str, list[list[float]]] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                stored["data"]["videos"] = full_fingerprint(stored["data"]["videos"], identity["videos"])
                same, self._probes = stored["data"] == identity, dict(stored["probes"])
                read = lambda cell: {level: float(auc) for level, auc in {"frame": cell["frame"], **cell}.items()}
                self._trained = {**stored.get("trained on", {}), **trained}
                before = stored.get("whole videos")
                same = same and (None in (before, videos) or before == videos)
                self._videos = videos or before
                old = stored.get("rule") == OLD_RULE
                named = lambda key: key.replace("video ", "h264_still ") if old else key
                self.cells = {
                    model: {named(key): read(cell) for key, cell in of.items()} for model, of in stored["auc"].items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{path}: damaged ({error}); delete it to start over") from error
            if not same:
                raise UsageError(f"{path}: holds results of other data, split or seed; choose another --out")

    def recognise(self, name: str, logits: NDArray[np.float64]) -> None:
        """Discards the results of a model that has changed under its name: its logits of the same crops differ by more
        than another precision or device would explain."""
        before = np.array(self._probes.get(name, []))
        if before.shape != logits.shape or not np.allclose(before, logits, rtol=1e-2, atol=2e-3):
            self.cells.pop(name, None)
            self._probes[name] = logits.round(5).tolist()

    def has(self, name: str, title: str, level: int) -> bool:
        return _key(title, level) in self.cells.get(name, {})

    def add(self, name: str, title: str, level: int, cell: LevelAuc) -> None:
        self.cells.setdefault(name, {})[_key(title, level)] = cell
        self.write()

    def write(self) -> None:
        found = {"data": self._identity, "rule": RULE, "whole videos": self._videos, "trained on": self._trained}
        write_whole(self._path, json_text({**found, "probes": self._probes, "auc": self.cells}, indent=1))


def _identity(dataset: CropDataset, rows: NDArray[np.int64], split: str, seed: int) -> dict[str, Any]:
    """Properties of the data that must be equal for all results in one folder."""
    return {
        "split": split,
        "seed": seed,
        "crops": len(rows),
        "size": dataset.size,
        "videos": dataset.fingerprint(rows),
    }


def _corrupted(
    crops: NDArray[np.uint8], rows: NDArray[np.int64], kind: str, level: int, seed: int, pool: ThreadPoolExecutor
) -> NDArray[np.uint8]:
    if not level:
        return crops
    place = (list(LEVELS).index(kind), level)
    one = lambda crop, row: corrupt(crop, kind, level, (seed, row, *place))
    return np.stack(list(pool.map(one, crops, rows.tolist())))


def _auc(
    dataset: CropDataset, rows: NDArray[np.int64], labels: NDArray[np.int64], scores: NDArray[np.float64]
) -> LevelAuc:
    levels = {"frame": (labels, scores)}
    if not are_stills(dataset, rows):
        levels["video"] = by_video(dataset.video[rows].astype(str).tolist(), labels, scores)
    found = {level: evaluate_scores(*both, EvaluateConfig.threshold).auc for level, both in levels.items()}
    return {level: auc for level, auc in found.items() if auc is not None}


def markdown(cells: LevelAucs, trained: Trained, levels: Sequence[int], said: str, notice: str) -> str:
    """Markdown with a table per model: corruptions by levels, the mean over corruptions, and the mean over the unseen
    ones if they are not all."""
    lines = []
    for model, known in trained.items():
        values = {kind: [cells[model][_key(kind, level)]["frame"] for level in levels] for kind in known}
        mean = lambda kinds, of=values: np.mean([of[kind] for kind in kinds], 0).tolist()
        unseen = [kind for kind, state in known.items() if state == "no"]
        named = [*((kind, known[kind], values[kind]) for kind in known), ("mean", "", mean(known))]
        named += [("mean of the unseen", "no", mean(unseen))] if 0 < len(unseen) < len(known) else []
        rows = [[name, state, *(f"{value:.4f}" for value in row)] for name, state, row in named]
        header = ["corruption", "trained on it", *(f"level {level}" for level in levels)]
        lines += [f"**{model}**, frame AUC", "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, f"{said}; {SEEN}.{f' **{notice}**' if notice else ''}", ""])


def plot(cells: LevelAucs, trained: Trained, levels: Sequence[int], notice: str) -> str:
    """SVG plot with a panel per corruption and one for their mean, and a line per model; the title of a panel says how
    many models were trained on its corruption, and their markers are hollow.

    Raises UsageError without matplotlib.
    """
    kinds = list(next(iter(trained.values())))
    across = 3
    down = -(-(len(kinds) + 1) // across)
    with drawing() as Figure:
        figure = Figure(figsize=(3 * across, 2.6 * down), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for panel, title in zip(panels, [*kinds, "mean"], strict=False):
            for number, (model, known) in enumerate(trained.items()):
                curves = [[cells[model][_key(k, v)]["frame"] for v in levels] for k in kinds if title in (k, "mean")]
                style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)],
                         "fillstyle": FILLS[known.get(title, "no")]}  # fmt: skip
                panel.plot(levels, np.mean(curves, 0), label=legible(model), markersize=4, **style)
            panel.set_title(_panel_title(title, trained), fontsize=10)
            panel.grid(alpha=0.3)
        for panel in panels[len(kinds) + 1 :]:
            panel.axis("off")
        legend = "hollow marker: trained on this corruption; half filled: not recorded"
        figure.supxlabel("\n".join(filter(None, ("level", legend, notice))), fontsize=10)
        figure.supylabel("frame AUC")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(trained), 4))
        return svg_text(figure)


def _panel_title(kind: str, trained: Trained) -> str:
    """Title of a panel: the corruption, and which models were trained on it."""
    states = [known[kind] for known in trained.values() if kind in known]
    if not states:
        return kind
    count, unknown = len(states), states.count("not recorded")
    held = count - unknown - states.count("no")
    if unknown == count:
        return f"{kind} (not recorded)"
    told = "unseen" if not held else "trained on" if held == count else f"trained on: {held} of {count}"
    return f"{kind} ({told}{f', not recorded: {unknown}' if unknown else ''})"
