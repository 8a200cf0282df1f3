"""A training run on one self-contained HTML page (no script, no network), finished or in the middle."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import dtn_fast
from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole
from dtn_fast.metrics import evaluate_scores, roc
from dtn_fast.pretrained import WEIGHTS
from dtn_fast.train.checkpoint import read_lines
from dtn_fast.train.distill import generation_folder, load_run
from dtn_fast.train.engine import METRICS, NONFINITE, STEPS, VALIDATION, Epoch

REPORT = "report.html"
THRESHOLD = 0.5
NO_WEIGHTS = f"{WEIGHTS} of the best generation cannot be read: what this report must say of it is not known."
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for colour-blind eyes
DASHES = ("-", "--", "-.", ":")
QUIET = "#7b818c"  # read on white as on black
STYLE = {
    "svg.hashsalt": "dtn_fast", "svg.fonttype": "path", "text.parse_math": False, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), QUIET),
}  # fmt: skip

Points = list[tuple[float, dict[str, float]]]
"""Values by name along an axis."""


class Validation(NamedTuple):
    """How the best epoch's weights scored the validation crops."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    auc: float

    def confusion(self) -> NDArray[np.int64]:
        """[2, 2] counts: rows are what crops are (real, fake), columns what they were taken for at THRESHOLD."""
        return np.bincount(2 * self.labels + (self.scores >= THRESHOLD), minlength=4).reshape(2, 2)


class Generation(NamedTuple):
    number: int
    epochs: list[Epoch]
    """Finished ones."""
    steps: list[dict[str, Any]]
    skipped: int
    validation: Validation | None

    @property
    def name(self) -> str:
        return f"{self.number} ({'student' if self.number else 'teacher'})"

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept."""
        return max(self.epochs, key=lambda epoch: epoch.val_auc, default=None)

    @property
    def auc(self) -> float:
        return self.best.val_auc if self.best else math.nan

    @property
    def speed(self) -> float:
        return float(np.median([epoch.images_per_second for epoch in self.epochs])) if self.epochs else math.nan


class Plot(NamedTuple):
    title: str
    image: str
    """An SVG as data: URI."""
    alt: str


class Setting(NamedTuple):
    name: str
    value: str
    default: str | None
    """None where the value is the default, or there is none."""


def write_run_report(run: Path) -> Path:
    """Writes ``run``/report.html and returns its path.  Every text from files is escaped.

    Everything comes from the generations' own files: summary.json knows nothing of the one that is training.  Raises
    UsageError where there is no run, or no matplotlib.
    """
    import jinja2

    recipe, config = load_run(run)
    generations = list(_generations(run))
    best = max((g for g in generations if g.best), key=lambda g: g.auc, default=None)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(Path(__file__).with_name(REPORT).read_text(encoding="utf-8")).render(
        run=run.resolve().name,
        notice=_notice(generation_folder(run, best.number) / WEIGHTS) if best else "",
        generations=generations,
        best=best,
        planned=recipe.epochs,
        plots=list(_plots(generations)),
        threshold=THRESHOLD,
        settings={"Recipe": _settings(recipe), "Model": _settings(config)},
        versions=f"dtn_fast {dtn_fast.__version__}, torch {torch.__version__}",
    )
    write_whole(run / REPORT, page)
    return run / REPORT


def _generations(run: Path) -> Iterator[Generation]:
    number = 0
    while (folder := generation_folder(run, number)).is_dir():
        rows = [row for row in read_lines(folder / METRICS) if row.keys() >= set(Epoch._fields)]
        epochs = [Epoch(**{name: row[name] for name in Epoch._fields}) for row in rows]
        skipped = len(read_lines(folder / NONFINITE))
        yield Generation(number, epochs, read_lines(folder / STEPS), skipped, _validation(folder / VALIDATION))
        number += 1


def _validation(path: Path) -> Validation | None:
    """None where the file is absent, damaged or of one class."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels, scores = file["labels"], file["scores"]
        auc = evaluate_scores(labels, scores).auc
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return None if auc is None else Validation(labels.astype(np.int64), scores, auc)


def _notice(weights: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            return (file.metadata() or {}).get("notice", "")
    except (OSError, SafetensorError):
        return NO_WEIGHTS


def _settings(config: Any) -> list[Setting]:
    """Every field of a configuration, with its default where that is another."""
    settings = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        same = field.default is dataclasses.MISSING or value == field.default
        settings.append(Setting(field.name, _text(value), None if same else _text(field.default)))
    return settings


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _plots(generations: list[Generation]) -> Iterator[Plot]:
    done = [g for g in generations if g.epochs]
    epochs = lambda values: [[(e.epoch + 1, values(e)) for e in g.epochs] for g in done]
    if done:
        yield generations_plot(done)
    if any(g.validation for g in generations):
        yield roc_plot(generations)
    if done:
        yield curves_plot("Losses", epochs(lambda e: e.losses), "epoch", log=True)
        yield curves_plot("Validation AUC", epochs(lambda e: {"AUC": e.val_auc}), "epoch")
        yield curves_plot("Learning rate", epochs(lambda e: {"learning rate": e.lr}), "epoch", log=True)
    if steps := _updates(generations):
        yield curves_plot("Loss by update", steps, "update", log=True)


def _updates(generations: list[Generation]) -> list[Points]:
    """The loss after so many updates of each generation that has done any."""
    found = [[s for s in g.steps if s.keys() >= {"epoch", "step", "loss"}] for g in generations]
    length = max((s["step"] + 1 for steps in found for s in steps), default=0)  # an epoch's last step is always there
    return [[(s["epoch"] * length + s["step"] + 1, {"loss": s["loss"]}) for s in steps] for steps in found if steps]


def generations_plot(generations: list[Generation]) -> Plot:
    """The validation AUC of each generation's best epoch."""

    def draw(axes: Any) -> None:
        numbers, aucs = [g.number for g in generations], [g.auc for g in generations]
        axes.plot(numbers, aucs, "o-", color=COLORS[0])
        for number, auc in zip(numbers, aucs, strict=True):
            axes.annotate(f"{auc:.4f}", (number, auc), (0, 6), textcoords="offset points", ha="center")
        axes.margins(0.12, 0.2)
        axes.set(xlabel="generation", ylabel="validation AUC", xticks=numbers)

    alt = "; ".join(f"generation {g.name}: AUC {g.auc:.4f}" for g in generations)
    return Plot("AUC by generation", _svg(draw), alt)


def roc_plot(generations: list[Generation]) -> Plot:
    """The ROC curve of each generation's best epoch."""
    scored = [(g.number, g.validation) for g in generations if g.validation]

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=":")
        for number, v in scored:
            axes.plot(*roc(v.labels, v.scores), label=f"generation {number}: AUC {v.auc:.4f}", **_look(number))
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right")

    alt = "; ".join(f"generation {number}: AUC {v.auc:.4f}" for number, v in scored)
    return Plot("ROC of the best epochs", _svg(draw), alt)


def curves_plot(title: str, generations: list[Points], unit: str, log: bool = False) -> Plot:
    """Named values along the epochs or updates of all generations, side by side."""
    names = list(dict.fromkeys(name for points in generations for _, values in points for name in values))

    def draw(axes: Any) -> None:
        start, middles = 0.0, []
        for points in generations:
            x = [start + at for at, _ in points]
            for i, name in enumerate(names):
                y = [values.get(name, math.nan) for _, values in points]
                axes.plot(x, y, marker="." if unit == "epoch" else "", **_look(i))
            ...
