"""Heat maps scored against the masks of fakes, beside the scores of maps that know nothing of the model.

A mask shows a forged face in the middle of its crop, so that a map which finds faces, and no forgery, scores well too:
a centred Gaussian does.  The halves tell the two apart: half of a face is forged, the other half is the real's, and a
map that finds faces alone scores 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.even_spacing import evenly_spaced
from dtn_fast.data.masks import FORGED, NO_MASKS
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import mean_interval, roc
from dtn_fast.evaluation.plotting import canvas
from dtn_fast.evaluation.tables import markdown_table
from dtn_fast.explain.heatmap import grad_cams
from dtn_fast.model.detector import Depth, Detector
from dtn_fast.runtime.scorer import BATCH
from dtn_fast.runtime.torch_scorer import TorchScorer

BESIDE = 0.03
"""Distance from the mask at which a map's maximum still hits, in sides of the crop: the pointing game's 15 pixels
(Zhang et al., 2016) in pictures of about 500."""
FIXED = 0.5
"""Share of its maximum at which a map is cut for the IoU at a fixed threshold."""
CUTS = np.linspace(0.05, 0.95, 19)
"""Shares of the maximum among which the val split chooses, by its mean IoU."""
SPREAD = 0.25
"""Standard deviation of the centred Gaussian in sides of the crop; of its scores, energy and the IoU at FIXED alone
depend on it."""
ALIGNED = 3.0
"""Largest mean difference in grey levels, outside the mask, between a fake's crop and its real's from which halves are
made; the codec's is under 3, that of boxes two pixels apart is over."""
RAMP = 0.05
"""Width of the seam between a forged and an unforged half, in sides of the crop."""
METRICS = {
    "pointing": "pointing game",
    "energy": "energy in mask",
    "iou_fixed": f"IoU at {FIXED:g}",
    "iou_val": "IoU, val's cut",
    "auc": "pixel AUC",
    "half_pointing": "half: pointing",
    "half_auc": "half: AUC",
}
"""Title of each metric."""
UNIFORM, GAUSSIAN = "chance: uniform", "chance: Gaussian"
"""Names of the maps that know nothing of the model: the same everywhere, and a centred Gaussian."""
HEAD = "mask head"
"""Name of the map that a model's mask head gives."""
CALLED, ALL = "called fake", "all fakes"

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------ one map, one mask


def pointing(heat: Map, mask: Mask) -> float:
    """Share of the maxima of a map [S, S] at most BESIDE away from a mask [S, S]: 0 or 1 unless several are equal.

    The pointing game of Zhang et al. (2016), whose accuracy is the mean over maps.
    """
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((away <= BESIDE * len(mask))[heat == heat.max()].mean())


def energy(heat: Map, mask: Mask) -> float:
    """Share of a map's sum inside a mask (the energy-based pointing game of Wang et al., 2020)."""
    return float(heat[mask].sum(dtype=np.float64) / heat.sum(dtype=np.float64))


def ious(heat: Map, mask: Mask, cuts: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of a mask with the pixels of a map that reach each of ``cuts``, ascending shares of its maximum: [cuts]."""
    reached = np.searchsorted(cuts, heat.ravel() / heat.max(), side="right")  # number of cuts that a pixel reaches
    count = lambda pixels: np.bincount(pixels, minlength=len(cuts) + 1)[::-1].cumsum()[::-1][1:]
    inside = count(reached[mask.ravel()])
    return inside / (count(reached) + mask.sum() - inside)


def pixel_auc(heat: Map, forged: Mask, rest: Mask) -> float:
    """AUC of a map's values [S, S] as scores of the ``forged`` pixels against the ``rest``; NaN without either."""
    if not forged.any() or not rest.any():
        return float("nan")
    values = np.concatenate([heat[forged], heat[rest]])
    false, true = roc((np.arange(len(values)) < forged.sum()).astype(np.int64), values)
    return float(np.trapezoid(true, false))


def mask_scores(heat: Map, mask: Mask, rest: Mask) -> dict[str, Any]:
    """The metrics of a map of at least 0 against its mask, ``rest`` being all other pixels.

    A blank map hits nothing: it has 0, and AUC 0.5.
    """
    if not heat.any():
        return {"pointing": 0.0, "energy": 0.0, "iou_fixed": 0.0, "ious": np.zeros(len(CUTS)), "auc": 0.5, "blank": 1.0}
    return {
        "pointing": pointing(heat, mask),
        "energy": energy(heat, mask),
        "iou_fixed": float(ious(heat, mask, np.array([FIXED]))[0]),
        "ious": ious(heat, mask, CUTS),
        "auc": pixel_auc(heat, mask, rest),
        "blank": 0.0,
    }


def half_scores(heat: Map, forged: Mask, real: Mask) -> dict[str, Any]:
    """The metrics of a map within a face of which one half is ``forged`` and the other ``real``, [S, S] each.

    half_pointing: whether its maximum lies in the forged half.  half_auc: its AUC over the pixels of both.
    """
    values, where = heat[forged | real], forged[forged | real]
    if not values.any():
        return {"half_pointing": 0.0, "half_auc": 0.5}
    return {"half_pointing": float(where[values == values.max()].mean()), "half_auc": pixel_auc(heat, forged, real)}


def chance_maps(side: int) -> dict[str, Map]:
    """The maps [S, S] that know nothing of the model, by name."""
    line = np.exp(-(((np.arange(side) - (side - 1) / 2) / (SPREAD * side)) ** 2) / 2)
    return {UNIFORM: np.ones((side, side), np.float32), GAUSSIAN: np.outer(line, line).astype(np.float32)}


# ------------------------------------------------------------------------------------------------ many crops


class Crops(NamedTuple):
    """Crops with known forged pixels."""

    rows: NDArray[np.int64]
    """[n] the fake that each is, or is made of."""
    crops: NDArray[np.uint8]
    """[n, S, S, 3]"""
    forged: Mask
    """[n, S, S] the forged pixels, at least one."""
    rest: Mask
    """[n, S, S] the pixels to tell them from: all others, or those of the face's other half."""


def masked_fakes(dataset: CropDataset, split: str, count: int, name: str) -> Crops:
    """At most ``count`` evenly spaced fakes of a split, those whose masks are known and not empty.

    Raises UsageError when the crops, named ``name``, have no masks.
    """
    if dataset.masks is None:
        raise UsageError(f"{name}: {NO_MASKS}")
    rows = dataset.select(split)
    rows = rows[dataset.labels[rows] == 1]
    if dataset.mask_known is not None:
        rows = rows[dataset.mask_known[rows]]
    rows = rows[evenly_spaced(len(rows), count)]
    masks = dataset.get_masks(rows) >= FORGED
    kept = masks.any((1, 2))
    return Crops(rows[kept], dataset.get(rows[kept]), masks[kept], ~masks[kept])


def half_forged(dataset: CropDataset, fakes: Crops) -> Crops:
    """Two crops of each fake, forged on the left and on the right of its mask's middle column.

    The other half is that of the same frame's crop of the real.  Fakes are left out whose real crop does not show the
    same section of the frame, as it does after ``prepare --reuse-boxes``.
    """
    places = enumerate(zip(dataset.video.tolist(), dataset.frame.tolist(), strict=True))
    place = {(dataset.videos[video].path, frame): row for row, (video, frame) in places}
    made = []
    for row, crop, mask, rest in zip(*fakes, strict=True):
        real = place.get((dataset.videos[dataset.video[row]].target, int(dataset.frame[row])))
        if real is None:
            continue
        unforged = dataset.get(np.array([real]))[0].astype(np.float32)
        change = crop - unforged
        if not rest.any() or np.abs(change[rest]).mean() > ALIGNED:
            continue
        middle = np.flatnonzero(mask.any(0)).mean()
        left = np.clip(0.5 - (np.arange(dataset.size) - middle) / (RAMP * dataset.size), 0, 1)
        for share in (left, 1 - left):
            half = np.rint(unforged + change * share[:, None]).astype(np.uint8)
            made.append((row, half, mask & (share > 0.5), mask & (share <= 0.5)))
    numbers, crops, forged, others = zip(*made, strict=True) if made else ((), (), (), ())
    side = (-1, dataset.size, dataset.size)
    return Crops(np.array(numbers, np.int64), np.array(crops, np.uint8).reshape(*side, 3),
                 np.array(forged, np.bool_).reshape(side), np.array(others, np.bool_).reshape(side))  # fmt: skip


class HeatScore(NamedTuple):
    """Scores of one map of a model, or of a map that knows nothing of it on the same crops."""

    data: str
    model: str
    map: str
    """Depth of Grad-CAM, HEAD, or UNIFORM or GAUSSIAN."""
    crops: str
    """CALLED: the fakes that the model calls fake; ALL: all of them."""
    fakes: int
    """Number of fakes."""
    videos: int
    halves: int
    """Number of half-forged crops, of CALLED those called fake."""
    blank: float
    """Share of the fakes whose map is 0 everywhere."""
    cut: float | None
    """Share of the maximum chosen on the val split; None: it has no fakes with masks, or is the measured one."""
    values: dict[str, list[float] | None]
    """Metric -> mean, and bounds of its bootstrap interval over videos; None: not measured."""


def heat_scores(
    models: Mapping[str, Detector],
    datasets: Mapping[str, CropDataset],
    split: str,
    count: int,
    depths: Sequence[Depth],
    config: EvaluateConfig = EvaluateConfig(),
) -> Generator[str, None, list[HeatScore]]:
    """Scores Grad-CAM of each model at ``depths`` on up to ``count`` fakes of each dataset; yields progress as text.

    config: threshold of "called fake", bootstrap draws and confidence.  Raises UsageError when a dataset has no masks,
    or no fake with a known mask in the split.
    """
    table = []
    for data, dataset in datasets.items():
        fakes = masked_fakes(dataset, split, count, data)
        if not len(fakes.rows):
            raise UsageError(f"{data}: no fake of the {split} split has a known mask; choose another --split")
        val = masked_fakes(dataset, "val" if split != "val" else "", count, data)
        halves = half_forged(dataset, fakes)
        for name, model in models.items():
            where, places = f"{name} on {data}", [depth for depth in depths if depth in model.cam_layers()]
            whole = yield from _measured(model, places, fakes, where, mask_scores)
            tuned = yield from _measured(model, places, val, f"{where}, val", mask_scores)
            parts = yield from _measured(model, places, halves, f"{where}, halves", half_scores)
            for crops, least in ((CALLED, config.threshold), (ALL, 0.0)):
                called, for_cut, called_halves = (some.scores >= least for some in (whole, tuned, parts))
                videos, half_videos = dataset.video[fakes.rows[called]], dataset.video[halves.rows[called_halves]]
                for place, values in whole.values.items():
                    measured, cut = {metric: of_all[called] for metric, of_all in values.items()}, None
                    if for_cut.any():
                        best = int(tuned.values[place]["ious"][for_cut].mean(0).argmax())
                        cut, measured["iou_val"] = float(CUTS[best]), measured["ious"][:, best]
                    cells = {metric: cell(measured.get(metric), videos, config) for metric in METRICS}
                    for metric, of_all in parts.values.get(place, {}).items():
                        cells[metric] = cell(of_all[called_halves], half_videos, config)
                    blank = float(measured["blank"].mean()) if called.any() else 0.0
                    counts = int(called.sum()), len(np.unique(videos)), int(called_halves.sum())
                    table.append(HeatScore(data, name, place, crops, *counts, blank, cut, cells))
    return table


class _Measured(NamedTuple):
    scores: NDArray[np.float64]
    """P(fake) of each crop, [n]."""
    values: dict[str, dict[str, NDArray[np.float64]]]
    """Map -> metric -> its value for each crop, [n]; ious: [n, CUTS].  Empty without crops."""


def _measured(
    model: Detector,
    depths: Sequence[Depth],
    crops: Crops,
    note: str,
    score: Callable[[Map, Mask, Mask], dict[str, Any]],
) -> Generator[str, None, _Measured]:
    """Metrics of Grad-CAM, of the mask head and of the chance maps; ``score``: a function (map, forged, rest) ->
    metrics."""
    scorer, scores, found = TorchScorer(model), [np.empty(0)], dict[str, list[dict[str, Any]]]()
    for start in range(0, len(crops.rows), BATCH):
        yield f"{note}: {start} of {len(crops.rows)} crops"
        part = slice(start, start + BATCH)
        batch = crops.crops[part]
        judged = scorer.judge(batch)
        scores.append(judged.score)
        chance = {name: np.broadcast_to(heat, batch.shape[:3]) for name, heat in chance_maps(batch.shape[1]).items()}
        maps: dict[Any, Any] = {**(grad_cams(model, batch, depths) if depths else {}), **chance}
        if judged.mask is not None:
            maps[HEAD] = [cv2.resize(mask, batch.shape[1:3], interpolation=cv2.INTER_LINEAR) for mask in judged.mask]
        for name, heats in maps.items():
            found.setdefault(name, []).extend(map(score, heats, crops.forged[part], crops.rest[part]))
    values = {name: {metric: np.array([row[metric] for row in rows], np.float64) for metric in rows[0]}
              for name, rows in found.items()}  # fmt: skip
    return _Measured(np.concatenate(scores), values)


def cell(values: NDArray[np.float64] | None, videos: NDArray[np.int64], config: EvaluateConfig) -> list[float] | None:
    """Mean of ``values`` [n] without NaN, and its interval over ``videos`` [n]; None without any."""
    if values is None or not (known := ~np.isnan(values)).any():
        return None
    interval = mean_interval(values[known], videos[known], config.bootstrap_draws, config.confidence)
    return [float(values[known].mean()), *interval]


# ------------------------------------------------------------------------------------------------ table, picture


def heat_tables(scores: Sequence[HeatScore]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of a table for each model, dataset and CALLED or ALL crops: means with their intervals."""
    groups: dict[tuple[str, str, str], list[HeatScore]] = {}
    for score in scores:
        groups.setdefault((score.crops, score.data, score.model), []).append(score)
    for (crops, data, model), own in sorted(groups.items(), key=lambda item: item[0][0] == ALL):
        rows = []
        for score in own:
            blank = "" if score.map in (UNIFORM, GAUSSIAN) else f"{100 * score.blank:.0f}"
            rows.append([score.map, blank, *(percent(score.values[metric]) for metric in METRICS)])
        title = f"Grad-CAM of {model} against the masks of {data}, {crops}, percent"
        yield title, ["map", "blank", *METRICS.values()], rows


def percent(value: list[float] | None) -> str:
    return "-" if value is None else "{:.0f} ({:.0f}-{:.0f})".format(*(100 * part for part in value))


def heat_notes(scores: Sequence[HeatScore], split: str, config: EvaluateConfig = EvaluateConfig()) -> list[str]:
    """Lines on the crops and metrics of a table."""
    notes = []
    for data, name in dict.fromkeys((score.data, score.model) for score in scores):
        called, everything = (next(s for s in scores if (s.data, s.model, s.crops) == (data, name, group))
                              for group in (CALLED, ALL))  # fmt: skip
        cuts = [f"{s.map} {s.cut:g}" for s in scores if (s.data, s.model, s.crops) == (data, name, CALLED) and s.cut]
        notes.append(f"{name} on {data}, {split} split: {called.fakes} of {everything.fakes} fakes called fake "
                     f"(P(fake) at least {config.threshold:g}), {called.halves} of {everything.halves} half-forged "
                     "crops"
                     + (f"; cuts: {', '.join(cuts)}" if cuts else ""))  # fmt: skip
        if not everything.halves:
            notes.append(f"{data}: no fake lies over its real, so there are no halves; prepare again with --masks "
                         "--reuse-boxes")  # fmt: skip
    return [
        *notes,
        "half: one half of the face is forged, the other is the real's; a map that finds faces, and no forgery, has 50",
        f"pointing game: the maximum lies at most {BESIDE:g} of the crop's side away from the mask; a blank map has "
        f"0 and AUC 50; {100 * config.confidence:g} % intervals by {config.bootstrap_draws:,} draws of videos",
    ]


def heat_markdown(scores: Sequence[HeatScore], split: str, notice: str) -> str:
    """The tables and their notes as Markdown."""
    lines = []
    for title, header, rows in heat_tables(scores):
        lines += [title, "", *markdown_table(header, rows), ""]
    notes = [*heat_notes(scores, split), *([f"**{notice}**"] if notice else [])]
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def plot_heat_scores(scores: Sequence[HeatScore]) -> Any:
    """Bars of each metric by depth, on the fakes called fake, with intervals; lines at the chance levels."""
    own = [score for score in scores if score.crops == CALLED]
    pairs = list(dict.fromkeys((score.data, score.model) for score in own))
    shown = [metric for metric in METRICS if any(score.values[metric] for score in own)]
    figure, axes = canvas(len(pairs), max(len(shown), 1), 1.7, 2.4)
    for line, (data, model) in zip(axes, pairs, strict=True):
        block = [score for score in own if (score.data, score.model) == (data, model)]
        for axis, metric in zip(line, shown, strict=False):
            for score in block:
                value, low, high = score.values[metric] or (np.nan,) * 3
                if score.map in (UNIFORM, GAUSSIAN):
                    axis.axhline(value, color="0.4", ls="--" if score.map == UNIFORM else ":", label=score.map, lw=1)
                else:
                    label = score.map + (f"\n{score.blank:.0%} blank" if score.blank else "")
                    axis.bar(label, value, yerr=[[value - low], [high - value]], capsize=2, width=0.7)
            axis.set_ylim(0, 1.05)
            axis.set_title(METRICS[metric], fontsize=8)
            axis.tick_params(axis="x", labelsize=6, rotation=60)
            axis.tick_params(axis="y", labelsize=7)
        line[0].set_ylabel(f"{model}, {data}", fontsize=7)
    if pairs and shown:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", fontsize=7, ncols=2)
    return figure
