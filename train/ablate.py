"""The paper's tables of trained models by name: what each variant changes, trained one after another, tabulated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.open import open_data
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.mac_count import count
from dtn_fast.evaluation.paper_numbers import TABLE10, PaperValues
from dtn_fast.evaluation.protocols import TRAINED_ON, Measured, measure, names_of
from dtn_fast.evaluation.tables import ResultTable, TableRow
from dtn_fast.model.build import load_detector
from dtn_fast.model.config import DTNConfig, ModelConfig, TimmConfig
from dtn_fast.model.detector import WEIGHTS, move_to
from dtn_fast.provenance import made_by, record
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.ablation_tables import ABLATIONS, Variant, configure, variants_of
from dtn_fast.train.config import Recipe
from dtn_fast.train.distill import distill, train_initial
from dtn_fast.train.loop import Epoch, Step
from dtn_fast.train.run_folder import best_auc, for_crops, generation_folder, start_run


class Working(NamedTuple):
    """A step of a variant's training, or None while it is measured, to show."""

    variant: str
    number: int
    total: int
    event: Step | Epoch | None


def folder_of(out: Path, variant: Variant) -> Path:
    """A variant's run: its label as a folder's name."""
    return out / "".join(
        c if c.isalnum() or c in "=." else {"+": "_with_", "*": "_star"}.get(c, "_") for c in variant.label
    )


def ablate(
    name: str, data: CropDataset, tests: dict[str, CropDataset], out: Path, model: DTNConfig, recipe: Recipe,
    only: tuple[str, ...] = (), **how: Any,
) -> Iterator[Working | ResultTable]:  # fmt: skip
    """Trains the variants of ABLATIONS[name] in ``out`` and measures each on the test split of ``tests``.

    Yields progress, then the table of every variant so far, also in ``out``/<name>.json, .md, .tex and .svg.  What is
    trained is not trained again, what is measured on the same crops not measured again.  ``only``: train no other
    variants, by label.  ``how``: device, execution and stop, as ``fit`` takes them.  In a process group every process
    calls this alike, and they share the measuring.  Raises UsageError on unknown names, a damaged table, runs of
    another recipe in ``out``, and what no such table can be made with.
    """
    variants = variants_of(name, recipe.methods or data.methods)
    if recipe.pretrained:
        raise UsageError("--pretrained: a table's models start alike, and not all have published weights; leave it out")
    if recipe.self_blend and ABLATIONS[name].by_forgery:
        raise UsageError(f"--self-blend: {name} trains on the data's own forgeries, one by one")
    if not variants:
        raise UsageError(f"{name}: the data holds no forgery to train on")
    unknown = set(only) - {v.label for v in variants}
    if unknown:
        raise UsageError(f"--only {' '.join(sorted(unknown))}: {name} has {', '.join(v.label for v in variants)}")
    if ABLATIONS[name].by_forgery and len(tests) > 1:
        raise UsageError(f"{name}: tests on the forgeries of one dataset; --tests names {len(tests)}")
    found = _Rows(out, name, tests)
    shown = [v for v in variants if not only or v.label in only or found.has(v)]
    for variant in shown:
        config, changed = configure(variant, model, recipe)
        start_run(folder_of(out / name, variant), changed, config)
    for number, variant in enumerate(shown):
        run = folder_of(out / name, variant)
        working = lambda event, label=variant.label, number=number: Working(label, number, len(shown), event)
        if not only or variant.label in only:
            if distributed.ranks().main:
                record(run)
            for event in train_initial(run, data, **how):
                yield working(event)
            if variant.distil:
                for event in distill(run, data, **how):
                    yield working(event)
        yield working(None)
        found.measure(variant, run, configure(variant, model, recipe)[0], how.get("device", "cpu"))
        if distributed.ranks().main:
            found.table(variants).write(out / name)
    yield found.table(variants)


def ablate_folders(
    name: str,
    data: Path,
    out: Path,
    model: ModelConfig,
    recipe: Recipe,
    tests: Sequence[Path] = (),
    test_names: Sequence[str] = (),
    only: tuple[str, ...] = (),
    **how: Any,
) -> Iterator[Working | ResultTable]:
    """:func:`ablate` on folders of crops: trained on ``data``, measured on the test split of each of ``tests``.

    tests: default: ``data`` alone.  test_names: names of the tests in the table; default: of their folders.  Raises
    UsageError when ``model`` is no DTN, whose fields the variants change.
    """
    if not isinstance(model, DTNConfig):
        raise UsageError(f"{name}: its variants are changes to a DTN; --config describes another detector")
    dataset = open_data(data, model.image_size)
    folders = tests or (data,)
    names = names_of(folders, test_names, "test-names")
    sets = {title: dataset if folder == data else open_data(folder, model.image_size)
            for title, folder in zip(names, folders, strict=True)}  # fmt: skip
    fitted = for_crops(model, dataset)
    assert isinstance(fitted, DTNConfig)
    yield from ablate(name, dataset, sets, out, fitted, recipe, only, **how)


FACTS = ("variant", "generation", "tests", "digest", "weights", "column_notes")
"""Of a row, besides its figures: whose weights, measured on what."""


class _Rows:
    """The rows of a table so far, those of an earlier call too."""

    def __init__(self, out: Path, name: str, tests: dict[str, CropDataset]) -> None:
        self._name, self._tests, self._rows = name, tests, list[TableRow]()
        split = {column: dataset.select("test") for column, dataset in tests.items()}
        self._crops = {c: f"{len(split[c])} of {s.size}, {s.fingerprint(split[c])}" for c, s in tests.items()}
        path = out / f"{name}.json"
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                rows = [TableRow.from_json(row) for row in stored["rows"]]
                for row in rows:
                    for key in FACTS:
                        row.facts[key]
                    for column in row.facts["column_notes"]:
                        row.cells["frame"][column], row.cells["video"][column]
                self._rows = [row for row in rows if (out / row.facts["weights"]).is_file()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{path}: damaged ({error!r}); delete it, the runs beside it are kept") from error

    def has(self, variant: Variant) -> bool:
        return any(row.facts["variant"] == variant.label for row in self._rows)

    def measure(self, variant: Variant, run: Path, config: DTNConfig | TimmConfig, device: str) -> None:
        """Brings a trained variant's rows up to date."""
        known = {row.name: row for row in self._rows if row.facts["variant"] == variant.label}
        self._rows = [row for row in self._rows if row.facts["variant"] != variant.label]
        after = {} if variant.size is None else _sizes(config, variant.size)
        for title, generation, printed in _generations(variant, run):
            weights = generation_folder(run, generation) / WEIGHTS
            with weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            facts = {"variant": variant.label, "generation": generation, "tests": self._crops, "digest": digest,
                     "weights": str(weights.relative_to(run.parent.parent))}  # fmt: skip
            row = known.get(title)
            if row is None or {k: row.facts.get(k) for k in facts} != facts:
                row = self._measured(title, weights.parent, facts, device)
            shown = {"validation AUC": (f"{100 * best_auc(run, generation):.2f}", ""), **after}
            if not variant.every_generation:
                shown["generation"] = str(generation), ""
            before = {TRAINED_ON: variant.trained_on} if variant.trained_on else {}
            self._rows.append(dataclasses.replace(row, before=before, after=shown, paper=printed))

    def _measured(self, title: str, folder: Path, facts: dict[str, Any], device: str) -> TableRow:
        scorer = _Shared(move_to(load_detector(folder), device))
        for step in measure(scorer, self._tests, ABLATIONS[self._name].by_forgery, EvaluateConfig()):
            if isinstance(step, Measured):
                facts = {**facts, "column_notes": step.column_notes}
                return TableRow(title, step.cells, notice=scorer.notice, facts=facts)
        raise AssertionError("measure ends with its figures")

    def table(self, variants: tuple[Variant, ...]) -> ResultTable:
        """Rows measured on these tests, in the order of ``variants``."""
        ablation, order = ABLATIONS[self._name], [v.label for v in variants]
        rows = [row for row in self._rows if row.facts["tests"] == self._crops and row.facts["variant"] in order]
        rows.sort(key=lambda row: (order.index(row.facts["variant"]), row.facts["generation"]))
        column_notes = rows[0].facts["column_notes"] if rows else {}
        notes = [GENERATION] if any("generation" in row.after for row in rows) else []
        notes += [SIZES] if any("GMAC" in row.after for row in rows) else []
        columns, acc = tuple(column_notes), not ablation.by_forgery
        notes = [*notes, made_by()]
        return ResultTable(
            self._name, ablation.title, columns, rows, acc, column_notes=column_notes, notes=tuple(notes)
        )


class _Shared(TorchScorer):
    """A scorer whose crops the processes of a group divide among them; each gets all logits."""

    def logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        here = distributed.ranks()
        return distributed.interleave(distributed.gather(super().logits(crops[here.rank :: here.world])))


GENERATION = "generation: 0 as first trained, from 1 on distilled; of a distilled model its best student on validation"
SIZES = (
    "M params and GMAC are counted the paper's way: a DTN as it was trained here, other transformers at 224 pixels; "
    "the paper's DTN takes 256"
)


def _sizes(config: DTNConfig | TimmConfig, printed: tuple[float, float]) -> dict[str, tuple[str, str]]:
    """Millions of parameters and GMACs as a row shows them, ours and the paper's."""
    if isinstance(config, DTNConfig):
        whole = count(config)
        found = whole.layer_parameters / 1e6, whole.macs / 1e9
    else:
        from dtn_fast.evaluation.mac_count import table8

        found = table8(config.timm)[1:3]
    return {title: (f"{mine:.3f}", f"{theirs:.3f}")
            for title, mine, theirs in zip(("M params", "GMAC"), found, printed, strict=True)}  # fmt: skip


def _generations(variant: Variant, run: Path) -> list[tuple[str, int, PaperValues]]:
    """Titles, generations and the paper's rows of what is measured of a trained variant."""
    count = 1
    while (generation_folder(run, count) / WEIGHTS).is_file():
        count += 1
    if not variant.every_generation:
        best = max(range(1 if variant.distil and count > 1 else 0, count), key=lambda g: best_auc(run, g))
        return [(variant.name, best, variant.paper)]
    printed = TABLE10.get(variant.name, ())
    return [
        (
            f"{variant.name}-{'Teacher' if not g else f'Student {g}'}",
            g,
            printed[g] if g < len(printed) else {},
        )
        for g in range(count)
    ]
