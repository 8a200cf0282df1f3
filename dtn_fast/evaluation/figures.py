"""The paper's figures of trained models: Grad-CAM, attention, head scales, features, t-SNE, soft labels.

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
from dtn_fast.evaluation.config import FigureConfig
from dtn_fast.evaluation.plotting import MARKERS, drawing, legible, save
from dtn_fast.evaluation.protocols import names_of
from dtn_fast.explain.heatmap import feature_map, grad_cam, overlay
from dtn_fast.explain.internals import (
    attention_maps,
    attentions,
    collapse,
    features,
    head_scales,
    soft_labels,
)
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.detector import Detector, move_to
from dtn_fast.model.dtn import DTN
from dtn_fast.packages import require
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_model, read_recipe

VALUES = "figures.json"
"""Name of the file with the figures' values."""


class Faces(NamedTuple):
    """Crops to draw: one real and one of each forgery, and many crops for the scatter plots."""

    few: NDArray[np.uint8]
    titles: list[str]
    many: NDArray[np.uint8]
    kinds: list[str]
    """Kind of each crop of ``many``: real, or the forgery's name."""


def choose(dataset: CropDataset, split: str, count: int) -> Faces:
    """A real, a fake of each forgery, and ``count`` crops spread over the split.  Raises UsageError if it is empty."""
    rows = dataset.select(split)
    if not len(rows):
        raise UsageError(f"the {split} split holds no crops")
    kinds = np.array([video.method or "real" for video in dataset.videos])[dataset.video[rows]]
    names = sorted(set(kinds.tolist()), key=lambda name: (name != "real", name))
    few = np.array([rows[np.flatnonzero(kinds == name)[0]] for name in names])
    many = dataset.evenly_spaced(split, count)
    of = np.array([video.method or "real" for video in dataset.videos])[dataset.video[many]]
    return Faces(dataset.get(few), names, dataset.get(many), of.tolist())


def draw_models(
    paths: Sequence[Path],
    data: Path,
    out: Path,
    temperature: float,
    config: FigureConfig = FigureConfig(),
    names: Sequence[str] = (),
    device: Device = Runtime.device,
) -> Iterator[str]:
    """Runs :func:`draw` for runs or checkpoint folders on the crops in ``data``.

    temperature: temperature of soft labels if a model's run has no recipe.  Raises UsageError when the models take
    crops of different sizes.
    """
    if not paths:
        raise UsageError("--models: name at least one run or checkpoint folder")
    where, titles = choose_device(device), names_of(paths, names, "model-names")
    models = {title: move_to(load_model(path), where) for title, path in zip(titles, paths, strict=True)}
    sizes = sorted({model.config.image_size for model in models.values()})
    if len(sizes) > 1:
        raise UsageError(f"--models: they take crops of {' and '.join(map(str, sizes))} pixels; draw them separately")
    dataset = open_data(data, sizes[0])
    for title, model in models.items():
        dataset.check_fits(model.config, title)
        dataset.tell_differences(model.config, title)
    temperatures = {title: float(read_recipe(path).get("temperature", temperature))
                    for title, path in zip(titles, paths, strict=True)}  # fmt: skip
    yield from draw(models, choose(dataset, config.split, config.count), out, config.kinds, temperatures)


def draw(
    models: Mapping[str, Detector], faces: Faces, out: Path, kinds: tuple[str, ...], temperatures: Mapping[str, float]
) -> Iterator[str]:
    """Writes ``out``/<kind>.png or .svg and figures.json; yields each figure's name before it is drawn.

    A model that a figure cannot show is left out and listed in figures.json.  Entries of figures.json for kinds that
    are not drawn now are kept.  temperatures: temperature of each model's soft labels.  Raises UsageError without
    matplotlib or scikit-learn.
    """
    if "t-sne" in kinds:
        _check_tsne(faces)
    only = lambda fits: {name: model for name, model in models.items() if fits(model)}
    attentive = only(attentions)
    patches = lambda model: "attention" in kinds and _side(attention_maps(model, faces.few[-1:]).shape[-1]) > 1
    softened = functools.partial(_soft_labels, temperatures=temperatures)
    makers: dict[str, tuple[Mapping[str, Any], Callable[[Any, Faces, dict[str, Any]], Any]]] = {
        "grad-cam": (only(lambda model: model.cam_layer() is not None), _grad_cam),
        "attention": ({name: model for name, model in attentive.items() if patches(model)}, _attention),
        "scales": (only(lambda model: (head_scales(model) < 1).any()), _scales),
        "collapse": (attentive, _collapse),
        "feature-maps": (only(lambda model: isinstance(model, DTN)), _feature_maps),
        "t-sne": (models, _tsne),
        "soft-labels": (models, softened),
    }
    notice = "; ".join(sorted({f"trained on {m.notice}" for m in models.values() if m.notice}))
    figures = _read(out / VALUES)
    figures["notice"] = notice
    for kind in kinds:
        yield kind
        drawn, make = makers[kind]
        suffix = "png" if kind in ("grad-cam", "attention", "feature-maps", "soft-labels") else "svg"
        picture = out / f"{kind}.{suffix}"
        picture.unlink(missing_ok=True)  # it may show an earlier call's models
        figures.pop(kind, None)
        figures["left out"][kind] = [name for name in models if name not in drawn]
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


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    Figure = require("matplotlib.figure", "matplotlib").Figure
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _grid(
    rows: list[str], columns: list[str], images: list[list[NDArray[Any] | None]], notes: list[list[str]] | None = None
) -> Any:
    """Figure with ``images`` in a grid; ``notes``: a line of text under each."""
    figure, axes = _canvas(len(rows), len(columns), 1.7, 1.9 if notes else 1.7)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if image is not None:
                axis.imshow(image, cmap="inferno")
                if notes:
                    axis.set_xlabel(notes[i][j], fontsize=7)
            if not i:
                axis.set_title(_plain(columns[j]), fontsize=8)
            if not j:
                axis.set_ylabel(_plain(rows[i]), fontsize=8)
    return figure


def _plain(text: str, width: int = 22) -> str:
    """``text`` wrapped, also after underscores, into lines of ``width`` characters that fit above an image."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part.replace("_", "_ "), width)]
    return "\n".join(lines).replace("_ ", "_")


def _grad_cam(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 8 (b): Grad-CAM, faces by models."""
    return _overlaid(models, faces, grad_cam)


def _overlaid(models: Mapping[str, Any], faces: Faces, heat: Callable[..., NDArray[np.float32]]) -> Any:
    """Grid with a row per face: the face, then the face overlaid with each model's ``heat`` map."""
    columns: list[list[NDArray[Any] | None]] = [list(faces.few)]
    columns += [[overlay(crop, heat_map) for crop, heat_map in zip(faces.few, heat(model, faces.few), strict=True)]
                for model in models.values()]  # fmt: skip
    return _grid(faces.titles, ["face", *models], [list(row) for row in zip(*columns, strict=True)])


def _attention(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7: attention maps of the last forgery's face, heads by blocks, models stacked, the learned scale under
    each map."""
    rows, images, notes = [], [], []
    for name, model in models.items():
        maps = attention_maps(model, faces.few[-1:])[:, 0]  # [L, H, N, N]
        side, scales = _side(maps.shape[-1]), head_scales(model)
        maps = maps[:, :, -(side**2) :, -(side**2) :]  # without the class token
        for block, of_block in enumerate(maps):
            rows.append(f"{name}\nblock {block + 1}" if not block else f"block {block + 1}")
            images.append(list(of_block.mean(1).reshape(-1, side, side)))  # [H, h, w], mean over the query patches
            learned = scales[block] if (scales < 1).any() else []
            notes.append([f"scale {scale:.3f}" for scale in learned] or [""] * len(of_block))
    heads = max(len(row) for row in images)
    padded = [[*row, *[None] * (heads - len(row))] for row in images]
    return _grid(rows, [f"head {h + 1}" for h in range(heads)], padded, notes)


def _side(tokens: int) -> int:
    """Side of the square that the patches form, with or without a class token in ``tokens``; 0: no square."""
    sides = [round(patches**0.5) for patches in (tokens, tokens - 1) if round(patches**0.5) ** 2 == patches]
    return sides[0] if tokens and sides else 0


def _scales(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7's head scales: sigmoid(s_h) by block and head."""
    learned = {name: head_scales(model) for name, model in models.items()}
    figures["scales"] = {name: values.round(5).tolist() for name, values in learned.items()}
    figure, axes = _canvas(1, len(learned), 3.4, 2.8)
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
    """Attention collapse as a curve: mean cosine between heads, block by block."""
    curves = {name: collapse(attention_maps(model, faces.many[:16])) for name, model in models.items()}
    figures["collapse"] = {name: values.round(5).tolist() for name, values in curves.items()}
    figure, axes = _canvas(1, 1, 5.0, 3.0)
    axis = axes[0, 0]
    for number, (name, values) in enumerate(curves.items()):
        axis.plot(range(1, len(values) + 1), values, marker=MARKERS[number % 8], label=legible(_plain(name, 60)))
    axis.set_xlabel("block")
    axis.set_ylabel("mean cosine between heads")
    axis.set_xticks(range(1, max(map(len, curves.values())) + 1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _feature_maps(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 9: the last feature map, faces by models."""
    return _overlaid(dtns, faces, feature_map)


def _check_tsne(faces: Faces) -> None:
    require("sklearn.manifold", "scikit-learn")
    if len(faces.many) < 4:
        raise UsageError(f"{len(faces.many)} crops are too few for t-SNE; give a larger split, or other --kinds")


def _tsne(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 10: t-SNE of the classifier's input features, by forgery."""
    from sklearn.manifold import TSNE

    names = sorted(set(faces.kinds), key=lambda name: (name != "real", name))
    across = min(len(models), 4)
    figure, axes = _canvas(-(-len(models) // across), across, 3.4, 3.4)
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
    figure, axes = _canvas(1, 1 + len(faces.few), 1.7, 2.1 + 0.12 * len(models))
    pictures = [np.full_like(faces.few[0], 255), *faces.few]  # a blank image above the models' names
    for j, (axis, picture) in enumerate(zip(axes[0], pictures, strict=True)):
        axis.imshow(picture)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        if j:
            hard = [1, 0] if faces.titles[j - 1] == "real" else [0, 1]
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
