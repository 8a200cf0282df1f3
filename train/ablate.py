"""The paper's ablations: trains the variants of a table one after another and tabulates their metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtn_fast.data.crop_dataset import CropDataset, full_fingerprint
from dtn_fast.data.open import open_data
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.cost import Cost, cost_of
from dtn_fast.evaluation.evaluate import forgeries_of
from dtn_fast.evaluation.mac_count import count
from dtn_fast.evaluation.paper_numbers import TABLE10, PaperValues
from dtn_fast.evaluation.protocols import TRAINED_ON, Measured, in_columns, measure, names_of
from dtn_fast.evaluation.tables import ResultTable, TableRow
from dtn_fast.model.build import load_detector, publishes_weights
from dtn_fast.model.config import DTNConfig, ModelConfig, TimmConfig
from dtn_fast.model.detector import WEIGHTS, move_to
from dtn_fast.model.pretrained import files_of, weights_of
from dtn_fast.provenance import made_by, record
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train import distributed
from dtn_fast.train.ablation_tables import (
    ABLATIONS,
    SIZE,
    Variant,
    configure,
    generation_name,
    printed_rows,
    variants_of,
)
from dtn_fast.train.config import STUDENTS, BaselineConfig, Recipe
from dtn_fast.train.distill import distill, train_initial
from dtn_fast.train.loop import Epoch, Step
from dtn_fast.train.run_folder import (
    best_auc,
    claim_crops,
    for_crops,
    generation_folder,
    load_run,
    start_run,
    trained_on,
)
from dtn_fast.train.run_lock import locked


class Working(NamedTuple):
    """Progress report: a step of a variant's training, or None while the variant is measured."""

    variant: str
    number: int
    total: int
    event: Step | Epoch | None


def folder_of(out: Path, variant: Variant) -> Path:
    """Run folder of a variant, named after its label."""
    return out / "".join(
        c if c.isalnum() or c in "=." else {"+": "_with_", "*": "_star"}.get(c, "_") for c in variant.label
    )


def ablate(
    name: str, data: CropDataset, tests: dict[str, CropDataset], out: Path, model: DTNConfig, recipe: Recipe,
    only: tuple[str, ...] = (), baselines: BaselineConfig = BaselineConfig(), **how: Any,
) -> Iterator[Working | ResultTable]:  # fmt: skip
    """Trains the variants of ABLATIONS[name] in ``out`` and measures each on the test split of ``tests``.

    Yields progress, then the table of all variants so far, which is also in ``out``/<name>.json, .md, .tex and .svg.
    Trained variants are not trained again, and variants measured on the same crops are not measured again; variants
    that differ in their students alone share the initial training.  ``only``: labels of the variants to train; default:
    all.  The others that are there stay in the table, whatever their recipe; a column says each row's.  ``how``:
    device, execution and stop of ``fit``.  In a process group every process makes the same call, and they share the
    scoring.  Raises UsageError on unknown names, a damaged table, runs to train of another recipe or on other crops in
    ``out``, and recipes or data that the table does not allow.
    """
    variants = variants_of(name, recipe.methods or data.methods)
    if recipe.self_blend and ABLATIONS[name].by_forgery:
        raise UsageError(f"--self-blend: {name} trains on the data's own forgeries, one by one; drop the option")
    if not variants:
        raise UsageError(f"{name}: the data holds no forgery to train on")
    unknown = set(only) - {v.label for v in variants}
    if unknown:
        raise UsageError(f"--only {' '.join(sorted(unknown))}: unknown; {name} has "
                         f"{', '.join(v.label for v in variants)}")  # fmt: skip
    if ABLATIONS[name].by_forgery and len(tests) > 1:
        raise UsageError(f"--tests: {name} tests on the forgeries of one dataset; give one folder, not {len(tests)}")
    _check_weights(name, variants, recipe)
    for title, dataset in tests.items():
        dataset.check_fits(model, f"{name}, tested on {title}")
        dataset.tell_differences(model, f"{name}, tested on {title}")
    found = _Rows(out, name)
    shown = [v for v in variants if not only or v.label in only or found.has(v)]
    recipes: dict[str, Recipe] = {}
    for variant in shown:
        with locked(run := folder_of(out / name, variant)):
            if not only or variant.label in only:
                config, changed = configure(variant, model, recipe, baselines)
                start_run(run, changed, config)
            recipes[variant.label] = load_run(run)[0]
            claim_crops(run, recipes[variant.label], data)
    found.on(tests, data, recipes)
    teachers: dict[str, Path] = {}
    for number, variant in enumerate(shown):
        run = folder_of(out / name, variant)
        working = lambda event, label=variant.label, number=number: Working(label, number, len(shown), event)
        if not only or variant.label in only:
            with locked(run):
                if distributed.ranks().main:
                    record(run)
                config, changed = configure(variant, model, recipe, baselines)
                initial = {k: v for k, v in dataclasses.asdict(changed).items() if k not in STUDENTS}
                teacher = teachers.setdefault(repr((config, initial)), run)
                if teacher != run:  # the same initial training, done already
                    _copy_whole(generation_folder(teacher, 0), generation_folder(run, 0))
                for event in train_initial(run, data, **how):
                    yield working(event)
                if variant.distil:
                    for event in distill(run, data, **how):
                        yield working(event)
        yield working(None)
        renewed = found.measure(variant, run, load_run(run)[1], how.get("device", "cpu"))
        if distributed.ranks().main and (renewed or number == len(shown) - 1):
            found.table(variants).write(out / name)
    yield found.table(variants)


def _check_weights(name: str, variants: Sequence[Variant], recipe: Recipe) -> None:
    """Raises UsageError when --pretrained or --pretrained-from concerns no variant of the table."""
    models = [v.model["timm"] for v in variants if "timm" in v.model] if recipe.pretrained else []
    used = {weights_of(model) for model in models if publishes_weights(model)}
    if recipe.pretrained and not used:
        raise UsageError(f"--pretrained: no model of {name} has published weights; drop the option")
    if unused := set(files_of(recipe.pretrained_from)) - used:
        raise UsageError(f"--pretrained-from {' '.join(sorted(unused))}: no model of {name} begins with such weights; "
                         f"there are {', '.join(sorted(used))}")  # fmt: skip


def _copy_whole(source: Path, target: Path) -> None:
    """Copies a folder unless ``target`` is there; it appears whole or not at all."""
    if distributed.ranks().main and not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(target)
    distributed.barrier()


def ablate_folders(
    name: str,
    data: Path,
    out: Path,
    model: ModelConfig,
    recipe: Recipe,
    tests: Sequence[Path] = (),
    test_names: Sequence[str] = (),
    only: tuple[str, ...] = (),
    baselines: BaselineConfig = BaselineConfig(),
    **how: Any,
) -> Iterator[Working | ResultTable]:
    """Runs :func:`ablate` on folders of crops: trains on ``data``, measures on the test split of each of ``tests``.

    tests: default: ``data`` alone.  test_names: names of the tests in the table; default: their folders' names.  Raises
    UsageError when ``model`` is not a DTN, whose fields the variants change.
    """
    if not isinstance(model, DTNConfig):
        raise UsageError(f"{name}: changes fields of a DTN; give a --preset or --config of one")
    dataset = open_data(data, model.image_size)
    folders = tests or (data,)
    names = names_of(folders, test_names, "test-names")
    sets = {title: dataset if folder == data else open_data(folder, model.image_size)
            for title, folder in zip(names, folders, strict=True)}  # fmt: skip
    fitted = for_crops(model, dataset)
    assert isinstance(fitted, DTNConfig)
    yield from ablate(name, dataset, sets, out, fitted, recipe, only, baselines, **how)


FACTS = ("variant", "generation", "tests", "digest", "weights", "column_notes")
"""Keys of a row's facts: which weights were measured, and on which crops."""


class _Rows:
    """Rows of a table so far, including those of earlier calls."""

    def __init__(self, out: Path, name: str) -> None:
        self._name, self._by_forgery, self._rows = name, ABLATIONS[name].by_forgery, list[TableRow]()
        path = out / f"{name}.json"
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                rows = [TableRow.from_json(row) for row in stored["rows"]]
                for row in rows:
                    if "policies" in row.facts:  # the former name
                        row.facts["column_notes"] = row.facts.pop("policies")
                    for key in FACTS:
                        row.facts[key]
                    row.facts["tests"] = {column: str(crops) for column, crops in row.facts["tests"].items()}
                    for column in row.facts["column_notes"]:
                        row.cells["frame"][column], row.cells["video"][column]
                self._rows = [row for row in rows if (out / row.facts["weights"]).is_file()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{path}: damaged ({error!r}); delete it, the runs beside it are kept") from error

    def on(self, tests: dict[str, CropDataset], data: CropDataset, recipes: dict[str, Recipe]) -> None:
        """Chooses the crops of the table, and its columns by the training of all its rows, whose recipes by variant are
        ``recipes``, on ``data``."""
        self._tests, self._recipes, self._crops = tests, recipes, dict[str, str]()
        trained = self._trained = [trained_on(recipe, data) for recipe in recipes.values()]
        for column, dataset in tests.items():
            rows = dataset.select("test")
            _, others = forgeries_of(dataset, trained)
            apart = f"apart from {', '.join(others)}: " if others and not self._by_forgery else ""
            self._crops[column] = f"{apart}{len(rows)} of {dataset.size}, {dataset.fingerprint(rows)}"
        for row in self._rows:
            known = row.facts["tests"]
            row.facts["tests"] = {c: full_fingerprint(known[c], self._crops.get(c, "")) for c in known}

    def has(self, variant: Variant) -> bool:
        return any(row.facts["variant"] == variant.label for row in self._rows)

    def measure(self, variant: Variant, run: Path, config: DTNConfig | TimmConfig, device: str) -> bool:
        """Measures the rows of a trained variant that are missing or out of date; returns whether any row changed."""
        before = [row for row in self._rows if row.facts["variant"] == variant.label]
        known = {row.name: row for row in before}
        self._rows = [row for row in self._rows if row.facts["variant"] != variant.label]
        after = {} if variant.size is None else _sizes(config, variant.size)
        for title, generation, printed in _generations(variant, run):
            weights = generation_folder(run, generation) / WEIGHTS
            with weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            facts = {"variant": variant.label, "generation": generation, "tests": self._crops, "digest": digest,
                     "weights": str(weights.relative_to(run.parent.parent))}  # fmt: skip
            row = known.get(title)
            costs = ABLATIONS[self._name].cost
            if row is None or {k: row.facts.get(k) for k in facts} != facts or costs > ("cost" in row.facts):
                row = self._measured(title, weights.parent, facts, device)
            shown = {"validation AUC": (f"{100 * best_auc(run, generation):.2f}", ""), **after}
            if ABLATIONS[self._name].cost:
                shown |= {title: (text, "") for title, text in Cost(**row.facts["cost"]).columns().items()}
            shown["recipe"] = self._recipe(variant.label, generation), ""
            if not variant.every_generation:
                shown["generation"] = str(generation), ""
            lead = {TRAINED_ON: variant.trained_on} if variant.trained_on else {}
            self._rows.append(dataclasses.replace(row, before=lead, after=shown, paper=printed))
        return [row for row in self._rows if row.facts["variant"] == variant.label] != before

    def _measured(self, title: str, folder: Path, facts: dict[str, Any], device: str) -> TableRow:
        scorer = _Shared(move_to(load_detector(folder), device))
        if ABLATIONS[self._name].cost:
            facts = {**facts, "cost": dataclasses.asdict(cost_of(scorer.model))}
        for step in measure(scorer, self._tests, self._by_forgery, EvaluateConfig(), self._trained):
            if isinstance(step, Measured):
                facts = {**facts, "column_notes": step.column_notes}
                return TableRow(title, step.cells, notice=scorer.notice, facts=facts)
        raise AssertionError("measure ends with the metrics")

    def _recipe(self, label: str, generation: int) -> str:
        """The recipe of a row in words, with every other setting in which the rows of the table differ."""
        mine, told = self._recipes[label], TOLD | {"methods"} if self._by_forgery else TOLD
        names = [field.name for field in dataclasses.fields(Recipe) if field.name not in told]
        varied = [n for n in names if len({getattr(recipe, n) for recipe in self._recipes.values()}) > 1]
        text = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return "; ".join(
            [mine.described(mine if generation else None), *(f"{n} {text(getattr(mine, n))}" for n in varied)]
        )

    def table(self, variants: tuple[Variant, ...]) -> ResultTable:
        """Table of the rows measured on these tests, in the order of ``variants``."""
        ablation, order = ABLATIONS[self._name], [v.label for v in variants]
        rows = [row for row in self._rows if row.facts["tests"] == self._crops and row.facts["variant"] in order]
        rows.sort(key=lambda row: (order.index(row.facts["variant"]), row.facts["generation"]))
        column_notes = rows[0].facts["column_notes"] if rows else {}
        notes = [GENERATION] if any("generation" in row.after for row in rows) else []
        notes += [MIXED] if len({row.after.get("recipe") for row in rows}) > 1 else []
        if ablation.cost:
            notes += [COST, *sorted({f"images/s: {row.facts['cost']['where']}" for row in rows})]
        else:
            notes += [SIZES] if any("GMAC" in row.after for row in rows) else []
        columns, acc = tuple(column_notes), not ablation.by_forgery
        notes = [*notes, made_by()]
        measured = [(row.name, row.before) for row in rows]
        printed = [row for row in printed_rows(self._name) if (row.name, row.before) not in measured]
        return ResultTable(
            self._name, ablation.title, columns, rows, acc, in_columns(printed, columns), column_notes, tuple(notes),
            "GMAC" if ablation.cost else "",
        )  # fmt: skip


class _Shared(TorchScorer):
    """Scorer that divides the crops among the processes of a group; each process gets all logits."""

    def logits(self, crops: NDArray[np.uint8]) -> NDArray[np.float64]:
        here = distributed.ranks()
        return distributed.interleave(distributed.gather(super().logits(crops[here.rank :: here.world])))


GENERATION = "generation: 0 is the initial training, from 1 on students; a distilled model shows its best on validation"
MIXED = "the rows were trained by different recipes: see the column recipe"
TOLD = {"weights", "initial_weights", "center_on", "augment", "self_blend", "pretrained", "pretrained_from",
        "real_repeat", "generations", "min_generations", "generation_patience"}  # fmt: skip
"""Fields of Recipe that its words say, or that the table itself varies."""
SIZES = (
    "M params and GMAC are counted as in the paper: a DTN at the image size used here, other transformers at 224 "
    "pixels; the paper's DTN takes 256 pixels"
)


COST = (
    "GMAC per image, attention's products included; images/s: scoring of batches of 16 crops, what is trained merged "
    "into the weights; M trained: parameters that training changes"
)


def _sizes(config: DTNConfig | TimmConfig, printed: tuple[float, float]) -> dict[str, tuple[str, str]]:
    """Cells of a row with millions of parameters and GMACs, ours and the paper's."""
    if isinstance(config, DTNConfig):
        whole = count(config)
        found = whole.layer_parameters / 1e6, whole.macs / 1e9
    else:
        from dtn_fast.evaluation.mac_count import table8

        found = table8(config.timm)[1:3]
    return {title: (f"{mine:.3f}", f"{theirs:.3f}")
            for title, mine, theirs in zip(SIZE, found, printed, strict=True)}  # fmt: skip


def _generations(variant: Variant, run: Path) -> list[tuple[str, int, PaperValues]]:
    """Title, generation number and the paper's values of each row of a trained variant."""
    count = 1
    while (generation_folder(run, count) / WEIGHTS).is_file():
        count += 1
    if not variant.every_generation:
        best = max(range(1 if variant.distil and count > 1 else 0, count), key=lambda g: best_auc(run, g))
        return [(variant.name, best, variant.paper)]
    printed = TABLE10.get(variant.name, ())
    return [
        (
            f"{variant.name}-Round {g}" if variant.untaught and g else generation_name(variant.name, g),
            g,
            printed[g] if g < len(printed) else {},
        )
        for g in range(count)
    ]
