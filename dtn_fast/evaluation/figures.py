"""The paper's figures of trained models: Grad-CAM, attention and its collapse, features, t-SNE, soft labels.

Each figure is a file; figures.json beside them holds the plotted values.  Every figure shows its models' notices.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.open import open_data
from dtn_fast.device import Device, choose_device
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import HEAT_SCORES, FigureConfig
from dtn_fast.evaluation.heat_scores import HeatScore, heat_markdown, heat_scores, plot_heat_scores
from dtn_fast.evaluation.plotting import MARKERS, canvas, drawing, legible, save
from dtn_fast.evaluation.protocols import names_of
from dtn_fast.explain.heatmap import NO_EVIDENCE, SAME_EVERYWHERE, feature_map, grad_cam, overlay
from dtn_fast.explain.internals import (
    attention_maps,
    attentions,
    collapse,
    features,
    head_scales,
    regions,
    soft_labels,
)
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.detector import Depth, Detector, move_to, patch_side
from dtn_fast.model.dtn import DTN
from dtn_fast.packages import require
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_model, read_recipe

VALUES = "figures.json"
"""Name of the file with the figures' values."""


class Faces(NamedTuple):
    """Crops to draw: of each dataset one real and one of each forgery, and many crops for the scatter plots."""

    few: NDArray[np.uint8]
    titles: list[str]
    """Kind of each crop of ``few``: real, or the forgery's name, after the dataset's name where there are several."""
    fake: list[bool]
    """Whether each crop of ``few`` is a fake."""
    many: NDArray[np.uint8]
    kinds: list[str]
    """Kind of each crop of ``many``, one of ``titles``."""
    datasets: Mapping[str, CropDataset]
    """The datasets that all crops are from."""


def choose(datasets: Mapping[str, CropDataset], split: str, count: int) -> Faces:
    """Of each dataset a real, a fake of each forgery, and ``count`` crops spread over the split.

    Raises UsageError where the split is empty.
    """
    few, titles, fake, many, kinds = [], list[str](), list[bool](), [], list[str]()
    for name, dataset in datasets.items():
        rows = dataset.select(split)
        if not len(rows):
            raise UsageError(f"{name}: the {split} split holds no crops; choose another --split")
        own = np.array([video.method or "real" for video in dataset.videos])[dataset.video]
        found = sorted(set(own[rows].tolist()), key=lambda kind: (kind != "real", kind))
        first = [rows[np.flatnonzero(own[rows] == kind)[0]] for kind in found]
        spread = dataset.evenly_spaced(split, count)
        title = (lambda kind, name=name: f"{name}: {kind}") if len(datasets) > 1 else str
        few.append(dataset.get(np.array(first)))
        many.append(dataset.get(spread))
        titles += map(title, found)
        fake += dataset.labels[first].astype(bool).tolist()
        kinds += map(title, own[spread].tolist())
    return Faces(np.concatenate(few), titles, fake, np.concatenate(many), kinds, datasets)


def draw_models(
    paths: Sequence[Path],
    data: Sequence[Path],
    out: Path,
    temperature: float,
    config: FigureConfig = FigureConfig(),
    names: Sequence[str] = (),
    data_names: Sequence[str] = (),
    device: Device = Runtime.device,
) -> Iterator[str]:
    """Runs :func:`draw` for runs or checkpoint folders on the crops in the folders ``data``.

    temperature: temperature of soft labels if a model's run has no recipe.  Raises UsageError when the models take
    crops of different sizes.
    """
    if not paths:
        raise UsageError("--models: name at least one run or checkpoint folder")
    if not data:
        raise UsageError("name at least one dataset; see dtn-fast explain --help")
    where, titles = choose_device(device), names_of(paths, names, "model-names")
    models = {title: move_to(load_model(path), where) for title, path in zip(titles, paths, strict=True)}
    sizes = sorted({model.config.image_size for model in models.values()})
    if len(sizes) > 1:
        raise UsageError(f"--models: they take crops of {' and '.join(map(str, sizes))} pixels; draw them separately")
    datasets = {title: open_data(folder, sizes[0])
                for title, folder in zip(names_of(data, data_names, "data-names"), data, strict=True)}  # fmt: skip
    for title, model in models.items():
        for name, dataset in datasets.items():
            dataset.check_fits(model.config, f"{title} on {name}")
            dataset.tell_differences(model.config, f"{title} on {name}")
    temperatures = {title: float(read_recipe(path).get("temperature", temperature))
                    for title, path in zip(titles, paths, strict=True)}  # fmt: skip
    yield from draw(models, choose(datasets, config.split, config.count), out, config, temperatures)


def draw(
    models: Mapping[str, Detector], faces: Faces, out: Path, config: FigureConfig, temperatures: Mapping[str, float]
) -> Iterator[str]:
    """Writes ``out``/<kind>.png or .svg and figures.json; yields each figure's name before it is drawn.

    heat-scores also writes a table, heat-scores.md, and yields its progress.
    A model that a figure cannot show is left out and listed in figures.json.  Entries of figures.json for kinds that
    are not drawn now are kept.  temperatures: temperature of each model's soft labels.  Raises UsageError without
    matplotlib or scikit-learn, or when heat-scores is given crops without masks.
    """
    kinds = config.kinds
    if "t-sne" in kinds:
        _check_tsne(faces)
    only = lambda fits: {name: model for name, model in models.items() if fits(model)}
    attentive = only(attentions)
    patches = lambda model: "attention" in kinds and patch_side(attention_maps(model, faces.few[-1:]).shape[-1]) > 1
    warm = functools.partial(_grad_cam, depths=config.depths)
    softened = functools.partial(_soft_labels, temperatures=temperatures)
    makers: dict[str, tuple[Mapping[str, Any], Callable[[Any, Faces, dict[str, Any]], Any]]] = {
        "grad-cam": (only(lambda model: set(model.cam_layers()) & set(config.depths)), warm),
        "attention": ({name: model for name, model in attentive.items() if patches(model)}, _attention),
        "scales": (only(lambda model: (head_scales(model) < 1).any()), _scales),
        "collapse": (attentive, _collapse),
        "collapse-maps": (only(lambda model: model.cam_layers() or attentions(model)), _collapse_maps),
        "feature-maps": (only(lambda model: isinstance(model, DTN)), _feature_maps),
        "t-sne": (models, _tsne),
        "soft-labels": (models, softened),
        HEAT_SCORES: (only(lambda model: set(model.cam_layers()) & set(config.depths)), _heat_scores),
    }
    notice = "; ".join(sorted({f"trained on {m.notice}" for m in models.values() if m.notice}))
    figures = _read(out / VALUES)
    figures["notice"] = notice
    for kind in kinds:
        yield kind
        drawn, make = makers[kind]
        suffix = "svg" if kind in ("scales", "collapse", "t-sne", HEAT_SCORES) else "png"
        picture = out / f"{kind}.{suffix}"
        picture.unlink(missing_ok=True)  # it may show an earlier call's models
        figures.pop(kind, None)
        figures["left out"][kind] = [name for name in models if name not in drawn]
        if drawn and kind == HEAT_SCORES:
            found = yield from heat_scores(drawn, faces.datasets, config.split, config.count, config.depths)
            figures[kind] = [score._asdict() for score in found]
            write_whole(out / f"{kind}.md", heat_markdown(found, config.split, notice))
        if drawn:
            with drawing():
                figure = make(drawn, faces, figures)
                figure.supxlabel(notice, fontsize=7, color="0.4")
                # tight: otherwise long names outside the layout would be cut off
                write_whole(picture, lambda file: save(figure, file, suffix, dpi=110, bbox_inches="tight"))  # noqa: B023
    write_whole(out / VALUES, json_text(figures, indent=1))


def _read(path: Path) -> dict[str, Any]:
    """The values of an earlier call's figures; empty if there was none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("left out"), dict):
        return {"notice": "", "left out": {}}
    return found


def _grid(
    rows: list[str],
    columns: list[str],
    images: Sequence[Sequence[NDArray[Any] | str | None]],
    notes: list[list[str]] | None = None,
) -> Any:
    """Figure with ``images``, or texts in their place, in a grid; ``notes``: a line of text under each."""
    apart, below = 1.06, 1.18 if notes else 1.06  # from image to image, in sides of one
    figure, axes = canvas(1, 1, 1.7 * len(columns), 1.7 * below * len(rows))
    axis = axes[0, 0]  # one for all: as many axes as images take a second for every twenty
    write = lambda x, y, text, **how: axis.text(x, y, _plain(text), ha="center", **{"fontsize": 8, **how})
    for i, row in enumerate(images):
        top = -i * below
        write(-0.06, top - 0.5, rows[i], va="bottom", rotation=90, rotation_mode="anchor")
        for j, image in enumerate(row):
            left = j * apart
            if isinstance(image, str):
                write(left + 0.5, top - 0.5, image, va="center", fontsize=7, color="0.4")
            elif image is not None:
                axis.imshow(image, cmap="inferno", extent=(left, left + 1, top - 1, top))
                if notes:
                    write(left + 0.5, top - 1.03, notes[i][j], va="top", fontsize=7)
    for j, column in enumerate(columns):
        write(j * apart + 0.5, 0.05, column, va="bottom")
    axis.set_xlim(0, len(columns) * apart)
    axis.set_ylim(-len(rows) * below, 0)
    axis.axis("off")
    axis.set_anchor("S")  # next to the notice below; what is left over at the top is cut off
    return figure


def _plain(text: str, width: int = 22) -> str:
    """``text`` wrapped, also after underscores, into lines of ``width`` characters that fit above an image."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part.replace("_", "_ "), width)]
    return "\n".join(lines).replace("_ ", "_")


def _grad_cam(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any], depths: tuple[Depth, ...]) -> Any:
    """Figure 8 (b): Grad-CAM, faces by models ("each row displays a fake face", "the second to fifth columns display
    heatmaps for four models"), each face at every depth.  A blank map says so, and figures.json lists it."""
    heats = {(name, depth): grad_cam(model, faces.few, depth)
             for name, model in models.items() for depth in depths if depth in model.cam_layers()}  # fmt: skip
    some = [depth for depth in depths if any(place == depth for _, place in heats)]
    rows, images, blank = [], list[list[NDArray[Any] | str | None]](), []
    for face, (title, crop) in enumerate(zip(faces.titles, faces.few, strict=True)):
        for depth in some:
            rows.append(f"{title}\n{depth}")
            images.append([crop if depth == some[0] else None])
            for name in models:
                heat = heats.get((name, depth))
                images[-1].append(f"no {depth} map" if heat is None else overlay(crop, heat[face]))
                if heat is not None and not heat[face].any():
                    blank.append({"model": name, "depth": depth, "face": title, "reason": NO_EVIDENCE})
    figures["grad-cam"] = {"depths": some, "blank": blank}
    return _grid(rows, ["face", *models], images)


def _attention(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7: attention maps of the last forgery's face, heads by blocks, models stacked, the learned scale under
    each map."""
    rows, images, notes = [], [], []
    for name, model in models.items():
        maps = attention_maps(model, faces.few[-1:])[:, 0]  # [L, H, N, N]
        side, scales = patch_side(maps.shape[-1]), head_scales(model)
        maps = maps[:, :, -(side**2) :, -(side**2) :]  # without a class token
        for block, of_block in enumerate(maps):
            rows.append(f"{name}\nblock {block + 1}" if not block else f"block {block + 1}")
            images.append(list(of_block.mean(1).reshape(-1, side, side)))  # [H, h, w], mean over the query patches
            learned = scales[block] if (scales < 1).any() else []
            notes.append([f"scale {scale:.3f}" for scale in learned] or [""] * len(of_block))
    heads = max(len(row) for row in images)
    padded = [[*row, *[None] * (heads - len(row))] for row in images]
    return _grid(rows, [f"head {h + 1}" for h in range(heads)], padded, notes)


def _scales(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7's head scales: sigmoid(s_h) by block and head."""
    learned = {name: head_scales(model) for name, model in models.items()}
    figures["scales"] = {name: values.round(5).tolist() for name, values in learned.items()}
    figure, axes = canvas(1, len(learned), 3.4, 2.8)
    for axis, (name, values) in zip(axes[0], learned.items(), strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        axis.set_title(_plain(f"{name}: head scales"), fontsize=9)
        axis.set_xlabel("head")
        axis.set_ylabel("block")
        axis.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axis.set_yticks(range(values.shape[0]), range(1, values.shape[0] + 1))
        figure.colorbar(image, ax=axis)
    return figure


def _collapse(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Attention collapse (Figure 1) as curves over the blocks: how alike the heads are, how much they look at."""
    some = faces.many[np.linspace(0, len(faces.many) - 1, min(16, len(faces.many))).astype(int)]  # of every dataset
    curves = {}
    for name, model in models.items():
        maps = [attention_maps(model, crop[None]) for crop in some]  # one by one: a ViT's maps of 16 crops take 0.6 GB
        tokens = maps[0].shape[-1]
        curves[name] = {"tokens": tokens, "mean cosine between heads": np.mean([collapse(m) for m in maps], 0),
                        "share of tokens looked at": np.mean([regions(m) for m in maps], 0)}  # fmt: skip
    figures["collapse"] = {name: {what: value if isinstance(value, int) else value.round(5).tolist()
                                  for what, value in curve.items()} for name, curve in curves.items()}  # fmt: skip
    figure, axes = canvas(1, 2, 5.0, 3.0)
    for axis, what in zip(axes[0], ("mean cosine between heads", "share of tokens looked at"), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            label = legible(_plain(f"{name} ({curve['tokens']} tokens)", 60))
            axis.plot(range(1, len(curve[what]) + 1), curve[what], marker=MARKERS[number % 8], label=label)
        axis.set_xlabel("block")
        axis.set_ylabel(what)
        axis.set_xticks(range(1, max(len(curve[what]) for curve in curves.values()) + 1))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _collapse_maps(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 1: the last face's Grad-CAM at each model's deepest map, then every head's attention, token by token, in
    the first and in the last block, from 0 to the block's largest value; a model without attention, such as VGG, has
    the first part alone."""
    crop, colors = faces.few[-1:], require("matplotlib").colormaps["inferno"]
    rows, images = list[str](), list[list[NDArray[Any] | str | None]]()
    for name, model in models.items():
        depths = list(model.cam_layers())
        heat = overlay(crop[0], grad_cam(model, crop, depths[-1])[0]) if depths else "no map for Grad-CAM"
        maps = attention_maps(model, crop)  # [L, 1, H, N, N]
        if not len(maps):
            rows.append(name)
            images.append([heat, "no attention"])
            continue
        alike, looked = collapse(maps), regions(maps)
        for block in sorted({0, len(maps) - 1}):
            measured = f"cosine {alike[block]:.2f}\nlooked at {looked[block]:.2f}"
            rows.append(f"{name}, {maps.shape[-1]} tokens\nblock {block + 1}\n{measured}")
            # one scale for the block: stretched one by one, even heads that are all alike would look unlike
            bright = colors((maps[block, 0] / maps[block, 0].max()).clip(0))
            images.append([None if block else heat, *bright])
    columns = max(map(len, images))
    padded = [[*row, *[None] * (columns - len(row))] for row in images]
    return _grid(rows, [f"Grad-CAM\n{faces.titles[-1]}", *(f"head {h}" for h in range(1, columns))], padded)


def _feature_maps(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 9: the last feature map, models by faces ("the first row represents the RGB images", samples "of various
    databases" side by side); the paper puts its two models in two columns for each sample, here each has a row."""
    rows = [list(faces.few)]
    for dtn in dtns.values():
        maps = feature_map(dtn, faces.few)
        rows.append([overlay(crop, heat, SAME_EVERYWHERE) for crop, heat in zip(faces.few, maps, strict=True)])
    return _grid(["face", *dtns], faces.titles, rows)


def _check_tsne(faces: Faces) -> None:
    require("sklearn.manifold")
    if len(faces.many) < 4:
        raise UsageError(f"{len(faces.many)} crops are too few for t-SNE; give a larger split, or other --kinds")


def _tsne(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 10: t-SNE of the classifier's input features, by forgery."""
    from sklearn.manifold import TSNE

    names = [title for title in faces.titles if title in faces.kinds]
    across = min(len(models), 4)
    figure, axes = canvas(-(-len(models) // across), across, 3.4, 3.4)
    figures["t-sne"] = {}
    for axis in axes.ravel()[len(models) :]:
        axis.axis("off")
    for axis, (name, model) in zip(axes.ravel(), models.items(), strict=False):
        seen = features(model, faces.many)
        perplexity = min(30.0, (len(seen) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(seen)
        for number, kind in enumerate(names):
            mine = flat[[k == kind for k in faces.kinds]]
            axis.scatter(*mine.T, s=12, marker=MARKERS[number % 8], label=legible(_plain(kind)), alpha=0.8)
        axis.set_title(_plain(name, 40), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        figures["t-sne"][name] = {"kinds": faces.kinds, "points": flat.round(3).tolist()}
    axes[0, 0].legend(fontsize=7)
    return figure


def _soft_labels(
    models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any], temperatures: Mapping[str, float]
) -> Any:
    """Figure 8 (a): each face with its hard label and each model's soft label, as a teacher gives it."""
    soft = {name: soft_labels(model, faces.few, temperatures[name]) for name, model in models.items()}
    figures["soft-labels"] = {name: {"temperature": temperatures[name], "real, fake": values.round(4).tolist()}
                              for name, values in soft.items()}  # fmt: skip
    figure, axes = canvas(1, 1 + len(faces.few), 1.7, 2.1 + 0.12 * len(models))
    pictures = [np.full_like(faces.few[0], 255), *faces.few]  # a blank image above the models' names
    for j, (axis, picture) in enumerate(zip(axes[0], pictures, strict=True)):
        axis.imshow(picture)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        if j:
            hard = [0, 1] if faces.fake[j - 1] else [1, 0]
            axis.set_title(_plain(f"{faces.titles[j - 1]}\nhard {hard}"), fontsize=8)
        for line, (name, values) in enumerate(soft.items()):
            text = (
                f"[{values[j - 1][0]:.2f}, {values[j - 1][1]:.2f}]"
                if j
                else f"{_plain(name, 99)} (T={temperatures[name]:g})"
            )
            where = {"xytext": (0, -4 - 9 * line), "textcoords": "offset points", "va": "top", "fontsize": 7}
            axis.annotate(text, (0.5 if j else 1, 0), xycoords="axes fraction", ha="center" if j else "right", **where)
    return figure


def _heat_scores(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Scores of the models' Grad-CAM against the fakes' masks, which figures.json already holds."""
    return plot_heat_scores([HeatScore(**score) for score in figures[HEAT_SCORES]])
