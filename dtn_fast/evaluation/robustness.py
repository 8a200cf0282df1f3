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
from dtn_fast.evaluation.config import EvaluateConfig, RobustnessConfig
from dtn_fast.evaluation.evaluate import are_stills, protocol_note
from dtn_fast.evaluation.metrics import by_video, evaluate_scores
from dtn_fast.evaluation.plotting import DASHES, MARKERS, drawing, legible, svg_text
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.config import DTNConfig, ModelConfig
from dtn_fast.runtime.scorer import Scorer

CHUNK = 256
RULE = "corruptions are applied to the face crops; frame AUC over all forgeries"
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
    if config.trained_on is not None and kind in config.trained_on.corruptions:
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
    scorers: Mapping[str, Scorer], dataset: CropDataset, out: Path, config: RobustnessConfig = RobustnessConfig()
) -> Iterator[RobustnessProgress]:
    """Writes ``out``/robustness.json, .md and .svg and yields progress; a repeated call measures only missing cells.

    The paper measures "various unseen corruptions" (Figure 5): each row says whether its model was trained on the
    corruption, and of a model that was, a warning too.  Level 0, the untouched crops, is measured once.  Noise and
    blocks depend only on the seed, the crop, the corruption and its level.  Raises UsageError when the split has one
    class, a model has another size or margin than the crops, or the folder holds results of other data.
    """
    kinds, levels, split, seed = config.kinds, config.levels, config.split, config.seed
    rows = dataset.select(split)
    labels = dataset.labels[rows]
    if set(labels.tolist()) != {0, 1}:
        raise UsageError(f"the {split} split needs reals and fakes; it has {len(rows)} crops")
    for name, scorer in scorers.items():
        dataset.check_fits(scorer.config, name)
        dataset.tell_differences(scorer.config, name)
    cells = [(kind, level) for kind in kinds for level in levels if level]
    cells = [("", 0), *cells] if 0 in levels else cells
    trained = {name: {kind: seen(scorer.config, kind) for kind in kinds} for name, scorer in scorers.items()}
    for name, known in trained.items():
        if both := [kind for kind in kinds if known[kind] in ("yes", "in the gate")]:
            tell(f"{name}: was trained on {', '.join(both)}: no unseen corruptions, as Figure 5's are; train --preset "
                 "robustness holds none of them")  # fmt: skip
    found = _Results(out / "robustness.json", _identity(dataset, rows, split, seed), trained)
    few = dataset.get(dataset.evenly_spaced(split, 16))
    for name, scorer in scorers.items():
        found.recognise(name, scorer.logits(few))
    with ThreadPoolExecutor(config.workers) as pool:
        for number, (kind, level) in enumerate(cells):
            yield RobustnessProgress(number, len(cells), _key(kind, level))
            missing = {name: s for name, s in scorers.items() if not found.has(name, kind, level)}
            if not missing:
                continue
            scores: dict[str, list[NDArray[np.float64]]] = {name: [] for name in missing}
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                crops = _corrupted(dataset.get(part), part, kind, level, seed, pool)
                for name, scorer in missing.items():
                    scores[name].append(scorer.score(crops))
            for name, parts in scores.items():
                found.add(name, kind, level, _auc(dataset, rows, labels, np.concatenate(parts)))
    yield RobustnessProgress(len(cells), len(cells), "")
    notice = " ".join(sorted({s.notice for s in scorers.values()} - {""}))
    note = f"{RULE}; {protocol_note(dataset, split, dataset.methods)}"
    write_whole(out / "robustness.md", markdown(found.cells, trained, levels, note, notice))
    write_whole(out / "robustness.svg", plot(found.cells, trained, levels, notice))


LevelAuc = dict[str, float]
LevelAucs = dict[str, dict[str, LevelAuc]]
"""Frame and video AUC (no video AUC of single pictures) by model, then by "kind level"."""
Trained = dict[str, dict[str, Seen]]
"""Whether a model was trained on a corruption: by model, then by kind; all models have the same kinds."""


def _key(kind: str, level: int) -> str:
    return f"{kind} {level}" if level else "untouched"


class _Results:
    """The AUCs so far, written to disk after each."""

    def __init__(self, path: Path, identity: dict[str, Any], trained: Trained) -> None:
        self._path, self._identity, self._trained = path, identity, trained
        self.cells: LevelAucs = {}
        self._probes: dict[str, list[list[float]]] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                stored["data"]["videos"] = full_fingerprint(stored["data"]["videos"], identity["videos"])
                same, self._probes = stored["data"] == identity, dict(stored["probes"])
                read = lambda cell: {level: float(auc) for level, auc in {"frame": cell["frame"], **cell}.items()}
                self._trained = {**stored.get("trained on", {}), **trained}
                self.cells = {
                    model: {key: read(cell) for key, cell in of.items()} for model, of in stored["auc"].items()
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

    def has(self, name: str, kind: str, level: int) -> bool:
        return _key(kind, level) in self.cells.get(name, {})

    def add(self, name: str, kind: str, level: int, cell: LevelAuc) -> None:
        self.cells.setdefault(name, {})[_key(kind, level)] = cell
        found = {"data": self._identity, "rule": RULE, "trained on": self._trained, "probes": self._probes}
        write_whole(self._path, json_text({**found, "auc": self.cells}, indent=1))


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
            panel.set_title(_titled(title, trained), fontsize=10)
            panel.grid(alpha=0.3)
        for panel in panels[len(kinds) + 1 :]:
            panel.axis("off")
        legend = "hollow marker: trained on this corruption; half filled: not recorded"
        figure.supxlabel("\n".join(filter(None, ("level", legend, notice))), fontsize=10)
        figure.supylabel("frame AUC")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(trained), 4))
        return svg_text(figure)


def _titled(kind: str, trained: Trained) -> str:
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
