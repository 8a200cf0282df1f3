"""Report of a training run, finished or not, on one self-contained HTML page (no script, no network)."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dtn_fast.errors import UsageError
from dtn_fast.evaluation.before_after import Comparison
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.metrics import evaluate_scores, roc
from dtn_fast.evaluation.plotting import DASHES, drawing, svg_text
from dtn_fast.files import write_whole
from dtn_fast.html_page import data_uri, render
from dtn_fast.model.detector import WEIGHTS
from dtn_fast.train.config import Recipe
from dtn_fast.train.hard_samples import told
from dtn_fast.train.log_lines import read_lines
from dtn_fast.train.run_folder import (
    COMPARISON,
    METRICS,
    NONFINITE,
    STEPS,
    VALIDATION,
    generation_folder,
    judge,
    load_run,
    student_recipe,
)
from dtn_fast.version import __version__

PAGE = "report.html"
NO_WEIGHTS = f"The best generation's {WEIGHTS} cannot be read, so the notice about its training data is missing."
DOTTED = 100
"""Maximum number of points in a plot that are drawn as dots."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for colour-blind readers
QUIET = "#7b818c"  # legible on white and on black
STYLE = {
    "svg.fonttype": "path", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.2,
    "grid.color": QUIET, "text.color": QUIET, "axes.labelcolor": QUIET, "axes.edgecolor": QUIET, "xtick.color": QUIET,
    "ytick.color": QUIET,
}  # fmt: skip
Curves = dict[int, list[tuple[float, dict[str, float]]]]
"""Points of each generation: position on the x axis, and values by name."""


class Validation(NamedTuple):
    """Scores of the validation crops by the best epoch's weights."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    auc: float

    def confusion(self) -> NDArray[np.int64]:
        """Confusion matrix [2, 2]: counts of true class (real, fake) by verdict at the threshold."""
        return np.bincount(2 * self.labels + (self.scores >= EvaluateConfig.threshold), minlength=4).reshape(2, 2)


class Generation(NamedTuple):
    """Logs and validation scores of a generation."""

    number: int
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    skipped: int
    validation: Validation | None

    @property
    def name(self) -> str:
        return f"{self.number} ({'student' if self.number else 'teacher'})"

    @property
    def best(self) -> dict[str, Any]:
        """The epoch whose weights were kept: the first with the highest validation AUC."""
        return max(self.epochs, key=lambda epoch: epoch["val_auc"])

    @property
    def speed(self) -> float:
        return statistics.median(epoch["images_per_second"] for epoch in self.epochs)


class Plot(NamedTuple):
    title: str
    image: str
    """SVG as a data: URI."""
    alt: str


def write_run_report(run: Path) -> Path:
    """Writes ``run``/report.html and returns its path.  Every text from files is escaped.

    All values come from the generations' own files, because summary.json lacks the generation in training.  Raises
    UsageError when there is no run, or no matplotlib.
    """
    recipe, config = load_run(run)
    generations = list(read_generations(run))
    number, judged = judge(run)
    best = next((g for g in generations if g.number == number and g.epochs), None)
    page = render(
        Path(__file__).with_name("run_report.html"),
        run=run.resolve().name,
        notice=notice_of(generation_folder(run, best.number) / WEIGHTS) if best else "",
        generations=generations,
        best=best,
        gains={row["generation"]: (row["over"], row["gain"]) for row in judged if "gain" in row},
        tuned=_comparison(run),
        stressed={g.number: told(generation_folder(run, g.number), student_recipe(run, g.number)) for g in generations},
        rule=student_recipe(run, max((g.number for g in generations), default=0)).gain,
        planned={g.number: student_recipe(run, g.number).epochs for g in generations},
        plots=list(plots_of(generations)),
        threshold=EvaluateConfig.threshold,
        settings={
            "Recipe": list(_settings(recipe)),
            "Model": list(_settings(config)),
            **{f"Generation {g.number}": rows for g in generations if (rows := _changes(run, g.number, recipe))},
        },
        versions=f"dtn_fast {__version__}, torch {torch.__version__}",
    )
    write_whole(run / PAGE, page)
    return run / PAGE


def _comparison(run: Path) -> Comparison | None:
    """Comparison of a fine-tuned run with its teacher; None if there is none, or it is damaged."""
    try:
        return Comparison.from_json(json.loads((run / f"{COMPARISON}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_generations(run: Path) -> Iterator[Generation]:
    """The generations of a run, finished or not."""
    number = 0
    while (folder := generation_folder(run, number)).is_dir():
        epochs, steps, skipped = (read_lines(folder / name) for name in (METRICS, STEPS, NONFINITE))
        if not all(isinstance(row, dict) and "val_auc" in row for row in epochs):
            raise UsageError(f"{folder / METRICS}: damaged, a line without val_auc; delete that line")
        yield Generation(number, epochs, steps, len(skipped), _validation(folder / VALIDATION))
        number += 1


def _validation(path: Path) -> Validation | None:
    """Validation scores in ``path``; None if the file is absent, damaged or of one class."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels, scores = file["labels"], file["scores"]
        auc = evaluate_scores(labels, scores, EvaluateConfig.threshold).auc
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return None if auc is None else Validation(labels.astype(np.int64), scores, auc)


def notice_of(weights: Path) -> str:
    """Notice about the training data of ``weights``, which every report must show; empty if there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            notice = (file.metadata() or {}).get("notice", "")
    except (OSError, SafetensorError):
        return NO_WEIGHTS
    return f"This model was trained on {notice}." if notice else ""


def _settings(config: Any) -> Iterator[tuple[str, str, str | None]]:
    """Name and value of every field, and the default if it differs."""
    text = lambda value: (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        same = field.default in (dataclasses.MISSING, value)
        yield field.name, text(value), None if same else text(field.default)


def _changes(run: Path, generation: int, recipe: Recipe) -> list[tuple[str, str, str | None]]:
    """Name and value of every field of a student's recipe that is not the run's, and the run's value."""
    own = list(_settings(student_recipe(run, generation)))
    return [(name, value, before) for (name, value, _), (_, before, _) in zip(own, _settings(recipe), strict=True)
            if value != before]  # fmt: skip


def plots_of(generations: list[Generation]) -> Iterator[Plot]:
    """Plots of a run.  Raises UsageError without matplotlib."""
    done = [g for g in generations if g.epochs]
    epochs = lambda values: {g.number: [(e["epoch"] + 1, values(e)) for e in g.epochs] for g in done}
    if done:
        yield generations_plot(done)
    if any(g.validation for g in generations):
        yield roc_plot(generations)
    if done:
        yield curves_plot("Validation AUC by epoch", "epoch", epochs(lambda e: {"AUC": e["val_auc"]}))
        yield curves_plot("Training loss and its terms by epoch", "epoch", epochs(lambda e: e["losses"]), log=True)
    if any(g.steps for g in generations):
        length = max(s["step"] + 1 for g in generations for s in g.steps)
        after = lambda g: [(s["epoch"] * length + s["step"] + 1, {"loss": s["loss"]}) for s in g.steps]
        yield curves_plot("Training loss by update", "update", {g.number: after(g) for g in generations}, log=True)
    if done:
        yield curves_plot("Learning rate by epoch", "epoch", epochs(lambda e: {"lr": e["lr"]}), log=True)


def generations_plot(generations: list[Generation]) -> Plot:
    """Plot of the validation AUC of each generation's best epoch."""
    aucs = {g.number: g.best["val_auc"] for g in generations}

    def draw(axes: Any) -> None:
        axes.plot(list(aucs), list(aucs.values()), "o-", color=COLORS[0])
        axes.set_xticks(list(aucs), [f"{number}\n{auc:.4f}" for number, auc in aucs.items()])
        axes.set_xlabel("generation and its AUC")
        axes.margins(0.1)

    alt = "; ".join(f"generation {number}: AUC {auc:.4f}" for number, auc in aucs.items())
    return Plot("Validation AUC by generation", _svg(draw), alt)


def roc_plot(generations: list[Generation]) -> Plot:
    """Plot of the ROC curve of each generation's best epoch."""
    scored = {g.number: g.validation for g in generations if g.validation}
    names = {number: f"generation {number}: AUC {v.auc:.4f}" for number, v in scored.items()}

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
        for number, v in scored.items():
            axes.plot(*roc(v.labels, v.scores), label=names[number], **_look(number))
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right")

    return Plot("ROC of the best epochs", _svg(draw), "; ".join(names.values()))


def curves_plot(title: str, unit: str, curves: Curves, log: bool = False) -> Plot:
    """Plot of values over the epochs or updates, the generations side by side."""
    curves = {number: points for number, points in curves.items() if points}
    names = list(dict.fromkeys(name for points in curves.values() for _, values in points for name in values))
    marker = "." if sum(map(len, curves.values())) <= DOTTED else ""

    def draw(axes: Any) -> None:
        start = 0.0
        middles: list[float] = []
        for points in curves.values():
            x = [start + at for at, _ in points]
            for i, name in enumerate(names):
                y = [values.get(name, math.nan) for _, values in points]
                axes.plot(x, y, marker=marker, label=None if middles else name, **_look(i))
            middles.append((start + 1 + x[-1]) / 2)
            start = x[-1]
            axes.axvline(start + 0.5, color=QUIET, linewidth=0.8, alpha=0.5)
        axes.set(xlabel=f"{unit} (top: generation)", xlim=(0.5, start + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1, nbins=6)
        axes.secondary_xaxis("top").set_xticks(middles, [str(number) for number in curves])
        if log:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 3, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        if len(names) > 1:
            axes.figure.legend(loc="outside lower center", ncols=len(names))

    ends = {number: ", ".join(f"{k} {v:.4g}" for k, v in points[-1][1].items()) for number, points in curves.items()}
    return Plot(title, _svg(draw), "; ".join(f"end of generation {number}: {end}" for number, end in ends.items()))


def _look(number: int) -> dict[str, str]:
    """Colour and dashes of curve ``number``."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def _svg(draw: Callable[[Any], None]) -> str:
    """The data: URI of a plot that ``draw`` draws on its axes; the same values give the same bytes."""
    with drawing(STYLE) as Figure:
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        draw(figure.add_subplot())
        text = svg_text(figure, transparent=True)
    return data_uri("image/svg+xml", text.encode())
