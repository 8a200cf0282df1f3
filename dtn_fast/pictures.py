"""The paper's pictures of trained models on given crops: Grad-CAM, attention, scales, features, t-SNE, soft labels.

Each picture is a file beside a JSON of the figures in it.  Synthetic or not, a picture carries the models' notices.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.shards import Shards
from dtn_fast.dtn import DTN
from dtn_fast.errors import UsageError
from dtn_fast.explain import (
    attention_maps,
    collapse,
    feature_map,
    features,
    grad_cam,
    head_scales,
    overlay,
    soft_labels,
)
from dtn_fast.files import write_whole
from dtn_fast.pretrained import Detector

KINDS = ("grad-cam", "attention", "scales", "collapse", "feature-maps", "t-sne", "soft-labels")
MARKERS = "osD^vP*X"


class Faces(NamedTuple):
    """Crops to draw on: one real and one of each forgery, and the many of the scatter plots."""

    few: NDArray[np.uint8]
    titles: list[str]
    many: NDArray[np.uint8]
    kinds: list[str]
    """Of ``many``: real, or the forgery's name."""


def choose(shards: Shards, split: str, count: int) -> Faces:
    """A real and a fake of each forgery, and ``count`` crops spread over the split.  Raises UsageError on none."""
    rows = shards.select(split)
    if not len(rows):
        raise UsageError(f"the {split} split holds no crops")
    kinds = np.array([video.method or "real" for video in shards.videos])[shards.video[rows]]
    names = sorted(set(kinds.tolist()), key=lambda name: (name != "real", name))
    few = np.array([rows[np.flatnonzero(kinds == name)[0]] for name in names])
    many = shards.spread(split, count)
    of = np.array([video.method or "real" for video in shards.videos])[shards.video[many]]
    return Faces(shards.get(few), names, shards.get(many), of.tolist())


def draw(models: Mapping[str, Detector], faces: Faces, out: Path, kinds: tuple[str, ...] = KINDS) -> Iterator[str]:
    """Writes ``out``/<kind>.png or .svg and figures.json; yields each picture's name before it is drawn.

    Pictures of attention need a DTN; other models are left out of them, as figures.json says.
    Raises UsageError on an unknown kind, or without matplotlib or scikit-learn.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"unknown picture {kind!r}; there are {', '.join(KINDS)}")
    if "t-sne" in kinds:
        _check_tsne(faces)
    dtns = {name: model for name, model in models.items() if isinstance(model, DTN)}
    blocks = {name: model for name, model in dtns.items() if model.config.depth}
    scaled = {name: model for name, model in blocks.items() if model.config.mas}
    mapped = {name: model for name, model in models.items() if model.cam_layer() is not None}
    makers: dict[str, tuple[Mapping[str, Any], Callable[[Any, Faces, dict[str, Any]], Any]]] = {
        "grad-cam": (mapped, _grad_cam),
        "attention": (blocks, _attention),
        "scales": (scaled, _scales),
        "collapse": (blocks, _collapse),
        "feature-maps": (dtns, _feature_maps),
        "t-sne": (models, _tsne),
        "soft-labels": (models, _soft_labels),
    }
    notice = "; ".join(sorted({f"trained on {m.notice}" for m in models.values() if m.notice}))
    figures: dict[str, Any] = {"notice": notice, "left out": {}}
    for kind in kinds:
        yield kind
        drawn, make = makers[kind]
        if len(drawn) < len(models):
            figures["left out"][kind] = [name for name in models if name not in drawn]
        if drawn:
            figure = make(drawn, faces, figures)
            figure.supxlabel(notice, fontsize=7, color="0.4")
            suffix = "png" if kind in ("grad-cam", "attention", "feature-maps", "soft-labels") else "svg"
            write_whole(out / f"{kind}.{suffix}", functools.partial(_save, figure, suffix))
    write_whole(out / "figures.json", json.dumps(figures, indent=1))


def _save(figure: Any, suffix: str, file: Any) -> None:
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "dtn_fast"}):
        # tight: long names stick out of what the layout keeps free
        figure.savefig(
            file, format=suffix, dpi=110, bbox_inches="tight", metadata={"Date": None} if suffix == "svg" else None
        )


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("matplotlib is not installed; run: pip install matplotlib") from error
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _grid(
    rows: list[str], columns: list[str], images: list[list[NDArray[Any] | None]], notes: list[list[str]] | None = None
) -> Any:
    """Pictures in a table; ``notes``: a line under each."""
    figure, axes = _canvas(len(rows), len(columns), 1.7, 1.9 if notes else 1.7)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if image is None:
                axis.text(0.5, 0.5, "no head", ha="center", va="center", color="0.5", transform=axis.transAxes)
            else:
                axis.imshow(image, cmap="inferno")
                if notes:
                    axis.set_xlabel(notes[i][j], fontsize=7)
            if not i:
                axis.set_title(_plain(columns[j]), fontsize=8)
            if not j:
                axis.set_ylabel(_plain(rows[i]), fontsize=8)
    return figure


def _plain(text: str, width: int = 22) -> str:
    """A name as it is, not as mathematics, in lines that fit above a picture."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part.replace("_", "_ "), width)]
    return "\n".join(lines).replace("_ ", "_").replace("$", r"\$")


def _grad_cam(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 8 (b): faces by models."""
    return _overlaid(models, faces, grad_cam)


def _overlaid(models: Mapping[str, Any], faces: Faces, heat: Callable[..., NDArray[np.float32]]) -> Any:
    """Each face, then it with each model's ``heat`` laid over."""
    columns: list[list[NDArray[Any] | None]] = [list(faces.few)]
    columns += [[overlay(crop, warm) for crop, warm in zip(faces.few, heat(model, faces.few), strict=True)]
                for model in models.values()]  # fmt: skip
    return _grid(faces.titles, ["face", *models], [list(row) for row in zip(*columns, strict=True)])


def _attention(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7: for the last forgery's face, what its patches attend to: heads by blocks, a model under the other, the
    learned scale under each map."""
    face = faces.few[-1:]
    rows, images, notes = [], [], []
    for name, model in dtns.items():
        maps = attention_maps(model, face)[:, 0]  # [L, H, N, N]
        side = round(maps.shape[-1] ** 0.5)
        scales = head_scales(model)
        for block, of_block in enumerate(maps):
            rows.append(f"{name}\nblock {block + 1}" if not block else f"block {block + 1}")
            means = of_block.mean(1).reshape(-1, side, side)  # [H, h, w], over the patches that look
            images.append(list(means / scales[block][:, None, None].clip(1e-9)))
            notes.append([f"scale {scale:.3f}" if model.config.mas else "" for scale in scales[block]])
    heads = max(len(row) for row in images)
    padded = [[*row, *[None] * (heads - len(row))] for row in images]
    return _grid(rows, [f"head {h + 1}" for h in range(heads)], padded, notes)


def _scales(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 7's numbers: sigmoid(s_h) by block and head."""
    learned = {name: head_scales(model) for name, model in dtns.items()}
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


def _collapse(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Attention collapse as a curve: mean cosine between heads, block by block."""
    curves = {name: collapse(attention_maps(model, faces.many[:16])) for name, model in dtns.items()}
    figures["collapse"] = {name: values.round(5).tolist() for name, values in curves.items()}
    figure, axes = _canvas(1, 1, 5.0, 3.0)
    axis = axes[0, 0]
    for number, (name, values) in enumerate(curves.items()):
        axis.plot(range(1, len(values) + 1), values, marker=MARKERS[number % 8], label=_plain(name, 60))
    axis.set_xlabel("block")
    axis.set_ylabel("mean cosine between heads")
    axis.set_xticks(range(1, max(map(len, curves.values())) + 1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _feature_maps(dtns: Mapping[str, DTN], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 9: the last map, faces by models."""
    return _overlaid(dtns, faces, feature_map)


def _check_tsne(faces: Faces) -> None:
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise UsageError("scikit-learn is not installed; run: pip install scikit-learn") from error
    if len(faces.many) < 4:
        raise UsageError(f"{len(faces.many)} crops are too few for t-SNE; give a larger split, or other --kinds")


def _tsne(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 10: what the classifier sees of each forgery, in two dimensions."""
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
            axis.scatter(*mine.T, s=12, marker=MARKERS[number % 8], label=_plain(kind), alpha=0.8)
        axis.set_title(_plain(name, 40), fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        figures["t-sne"][name] = {"kinds": faces.kinds, "points": flat.round(3).tolist()}
    axes[0, 0].legend(fontsize=7)
    return figure


def _soft_labels(models: Mapping[str, Detector], faces: Faces, figures: dict[str, Any]) -> Any:
    """Figure 8 (a): each face with its hard label and what each model, as a teacher, says of it."""
    said = {name: soft_labels(model, faces.few) for name, model in models.items()}
    figures["soft labels"] = {name: values.round(4).tolist() for name, values in said.items()}
    figure, axes = _canvas(1, 1 + len(faces.few), 1.7, 2.1 + 0.12 * len(models))
    pictures = [np.full_like(faces.few[0], 255), *faces.few]  # above the models' names nothing
    for j, (axis, picture) in enumerate(zip(axes[0], pictures, strict=True)):
        axis.imshow(picture)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
        if j:
            hard = [1, 0] if faces.titles[j - 1] == "real" else [0, 1]
            axis.set_title(_plain(f"{faces.titles[j - 1]}\nhard {hard}"), fontsize=8)
        for line, (name, values) in enumerate(said.items()):
            text = f"[{values[j - 1][0]:.2f}, {values[j - 1][1]:.2f}]" if j else _plain(name, 99)
            where = {"xytext": (0, -4 - 9 * line), "textcoords": "offset points", "va": "top", "fontsize": 7}
            axis.annotate(text, (0.5 if j else 1, 0), xycoords="axes fraction", ha="center" if j else "right", **where)
    return figure
