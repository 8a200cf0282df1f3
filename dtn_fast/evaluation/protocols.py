"""The paper's protocols over several models and datasets, as tables in its layout.

within-dataset and cross-dataset (Table 1): ACC and AUC of models on datasets.  cross-manipulation (Table 2): AUC of
models trained on one forgery each, on every forgery.  At frame and at video level, each AUC with its interval.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dtn_fast.data.blend import METHOD, self_blended
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.open import open_data
from dtn_fast.errors import UsageError
from dtn_fast.evaluation import paper_numbers
from dtn_fast.evaluation.config import EvaluateConfig
from dtn_fast.evaluation.evaluate import Evaluation, evaluate, families_in, forgeries_of
from dtn_fast.evaluation.tables import Cell, Cells, PaperRow, ResultTable, TableRow
from dtn_fast.files import json_text, write_whole
from dtn_fast.model.config import TrainedOn
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.scorer import Scorer

TRAINED_ON = "trained on"
Protocol = Literal["auto", "within", "cross-dataset", "cross-manipulation"]


class Entry(NamedTuple):
    """A model in a table."""

    name: str
    scorer: Scorer
    trained_on: str = ""
    """The single forgery that the model was trained on, for cross-manipulation; else empty."""


class Measured(NamedTuple):
    cells: Cells
    column_notes: dict[str, str]
    """Protocol note of each column."""


def measure(
    scorer: Scorer,
    tests: Mapping[str, CropDataset],
    by_forgery: bool,
    config: EvaluateConfig,
    trained: Sequence[TrainedOn | None],
    by_family: bool = False,
) -> Iterator[str | Measured]:
    """Measures one model on every test set: yields each set's name before measuring it, then the metrics.

    by_forgery: measure each forgery of a set separately; otherwise those that the models of the table were trained on
    together, and the others together.  trained: facts of the training of every model in the table, so that all rows
    have the same columns.  by_family: measure each family of forgeries as well.  Raises UsageError like ``evaluate``,
    and when a set has no forgery to test on.
    """
    found = Measured({"frame": {}, "video": {}}, {})
    all_forgeries = {method for dataset in tests.values() for method in dataset.methods}
    for name, dataset in tests.items():
        yield name
        seen, others = forgeries_of(dataset, trained)
        groups = {name: seen, **({f"{name}, unseen": others} if others else {})}
        if by_forgery:
            groups = {paper_numbers.FF_NAMES.get(m, m): (m,) for m in dataset.methods}
        if by_family:
            where = "" if by_forgery else f"{name}, "
            families = families_in(dataset, config, all_forgeries)
            groups |= {f"{where}family {family}": own for family, own in families.items()}
        if not dataset.methods:
            raise UsageError(f"{name}: holds no forgery to test on")
        _fill(found, evaluate(scorer, dataset, config, groups))
    yield found


def _fill(found: Measured, result: Evaluation) -> None:
    """Adds a column to ``found`` for each row of ``result``."""
    for row in result.rows:
        found.cells["frame"][row.fakes] = Cell(row.frame.acc, row.frame.auc, row.frame_interval)
        found.cells["video"][row.fakes] = Cell(row.video.acc, row.video.auc, row.video_interval)
        found.column_notes[row.fakes] = row.note


def within(name: str, dataset: str, result: Evaluation) -> ResultTable:
    """The overall row of an evaluation in Table 1's layout, as one model on one dataset."""
    found = Measured({"frame": {}, "video": {}}, {})
    _fill(found, result._replace(rows=[result.rows[0]._replace(fakes=dataset)]))
    return cross_dataset_table([TableRow(name, found.cells, notice=result.notice)], found.column_notes)


def cross_dataset(
    entries: Sequence[Entry],
    datasets: Mapping[str, CropDataset],
    config: EvaluateConfig = EvaluateConfig(),
    by_family: bool = False,
) -> Iterator[str | ResultTable]:
    """Measures every model on every dataset (Table 1): yields a label before each measurement, then the table.

    by_family: add columns of each dataset's families of forgeries.  Raises UsageError like ``evaluate``.
    """
    for step in _measure_all(entries, datasets, False, config, by_family):
        yield step if isinstance(step, str) else cross_dataset_table(*step)


def cross_dataset_table(rows: list[TableRow], column_notes: dict[str, str]) -> ResultTable:
    """Rows in Table 1's layout, with the paper's rows below."""
    printed = in_columns((PaperRow(name, row) for name, row in paper_numbers.TABLE1.items()), column_notes)
    title = "Within-dataset and cross-dataset evaluation (Table 1)"
    return ResultTable("cross-dataset", title, tuple(column_notes), rows, paper=printed, column_notes=column_notes)


def cross_manipulation(
    entries: Sequence[Entry],
    dataset: CropDataset,
    config: EvaluateConfig = EvaluateConfig(),
    by_family: bool = False,
) -> Iterator[str | ResultTable]:
    """Measures models trained on one forgery each on every forgery of one dataset (Table 2).

    Yields a label before each measurement, then the table.  by_family: add columns of the families of forgeries.
    Raises UsageError like ``measure``.
    """
    for step in _measure_all(entries, {"the data": dataset}, True, config, by_family):
        yield step if isinstance(step, str) else cross_manipulation_table(*step)


def cross_manipulation_table(rows: list[TableRow], column_notes: dict[str, str]) -> ResultTable:
    """Rows in Table 2's layout, with the paper's rows of the same training forgeries below."""
    trained = {row.before[TRAINED_ON] for row in rows}
    printed = in_columns((row for row in table_2() if row.before[TRAINED_ON] in trained), column_notes)
    title = "Generalisation to forgeries not trained on (Table 2)"
    return ResultTable(
        "cross-manipulation", title, tuple(column_notes), rows, acc=False, paper=printed, column_notes=column_notes
    )


def table_2() -> list[PaperRow]:
    """The rows of the paper's Table 2, in its order."""
    return [PaperRow(model, row, {TRAINED_ON: on})
            for on, models in paper_numbers.TABLE2.items() for model, row in models.items()]  # fmt: skip


def in_columns(rows: Iterable[PaperRow], columns: Collection[str]) -> list[PaperRow]:
    """The paper's rows that print a value in one of ``columns``, without their other values."""
    cut = (row._replace(cells={c: row.cells[c] for c in columns if c in row.cells}) for row in rows)
    return [row for row in cut if row.cells]


def _measure_all(
    entries: Sequence[Entry],
    tests: Mapping[str, CropDataset],
    by_forgery: bool,
    config: EvaluateConfig,
    by_family: bool,
) -> Iterator[str | tuple[list[TableRow], dict[str, str]]]:
    rows, column_notes = [], {}
    trained = [entry.scorer.config.trained_on for entry in entries]
    recorded = any(facts and facts.recipe for facts in trained)
    for entry in entries:
        for step in measure(entry.scorer, tests, by_forgery, config, trained, by_family):
            if isinstance(step, str):
                yield f"{entry.name} on {step}"
                continue
            column_notes.update(step.column_notes)
            before = {TRAINED_ON: entry.trained_on} if by_forgery else {}
            facts = entry.scorer.config.trained_on
            after = {"recipe": (facts.recipe if facts and facts.recipe else "not recorded", "")} if recorded else {}
            rows.append(TableRow(entry.name, step.cells, before, after, notice=entry.scorer.notice))
    yield rows, column_notes


def names_of(paths: Sequence[Path], names: Sequence[str], what: str, once: bool = True) -> list[str]:
    """``names`` if given, else the last parts of ``paths``, or the whole paths if those are not unique.

    Raises UsageError when there are more or fewer names than paths or, with ``once``, a name occurs twice.
    """
    if names:
        if len(names) != len(paths):
            raise UsageError(f"--{what}: {len(names)} names for {len(paths)}; give one each")
        found = list(names)
    else:
        found = [path.name for path in paths]
        if len(set(found)) < len(found):
            found = [str(path) for path in paths]
    if once and len(set(found)) < len(found):
        raise UsageError(f"--{what}: {', '.join(found)}: each must be named once")
    return found


class Within(NamedTuple):
    """Result of one model on one dataset, forgery by forgery."""

    name: str
    dataset: str
    result: Evaluation

    def write(self, out: Path) -> list[Path]:
        """Writes ``out``.json, .md, .tex and, with groups of people, .svg, and returns them."""
        table, groups = within(self.name, self.dataset, self.result), self.result.groups
        texts = {".json": json_text(self.result.to_json(), indent=1), ".md": self.result.markdown(),
                 ".tex": "\n".join(map(table.latex, table.levels))}  # fmt: skip
        if groups:
            texts[".tex"] += f"\n{groups.latex()}"
            texts[".svg"] = groups.chart(self.result.notice)
        for suffix, text in texts.items():
            write_whole(out.with_name(out.name + suffix), text)
        return [out.with_name(out.name + suffix) for suffix in texts]


def evaluate_models(
    models: Sequence[Path],
    data: Sequence[Path],
    config: EvaluateConfig = EvaluateConfig(),
    protocol: Protocol = "auto",
    model_names: Sequence[str] = (),
    data_names: Sequence[str] = (),
    trained_on: Sequence[str] = (),
    self_blend: bool = False,
    runtime: Runtime = Runtime(),
    by_family: bool = False,
) -> Iterator[str | Within | ResultTable]:
    """Measures model files on folders of crops by a protocol of the paper: yields a label before each measurement, then
    the result.

    protocol: ``within`` gives Within, the others a ResultTable; ``auto`` is ``within`` for one model on one dataset,
    else ``cross-dataset``.  trained_on: for ``cross-manipulation`` the forgery that each model was trained on; default:
    as the model records it.  self_blend: measure against self-blended copies of the reals instead of the data's
    fakes.  by_family: add columns of the families of forgeries; ``within`` always has them.  Raises UsageError on
    options that do not fit each other, and like ``evaluate``.
    """
    chosen = _choose_protocol(protocol, models, data, trained_on)
    manipulation = chosen == "cross-manipulation"
    if config.groups is not None and chosen != "within":
        raise UsageError(f"--groups {config.groups}: takes one model, one dataset and --protocol within")
    if config.families and chosen != "within" and not by_family:
        raise UsageError(f"--families {config.families[0]}: in this table families are shown with --by-family alone")
    names = names_of(models, model_names, "model-names", once=not manipulation)
    scorers = [load_scorer(path, runtime) for path in models]
    forgeries = _forgeries(models, scorers, trained_on) if manipulation else [""] * len(models)
    if len(set(zip(names, forgeries, strict=True))) < len(models):
        raise UsageError("--model-names: two models have the same name and were trained on the same forgery")
    columns = names_of(data, data_names, "data-names")
    sets = [open_data(folder, scorers[0].config.image_size) for folder in data]
    for path, scorer in zip(models, scorers, strict=True):
        for folder, dataset in zip(data, sets, strict=True):
            dataset.check_fits(scorer.config, f"{path} on {folder}")
            dataset.tell_differences(scorer.config, f"{path} on {folder}")
    if self_blend:  # not the paper's test sets any more
        sets, columns = [self_blended(dataset, 0) for dataset in sets], [f"{name}, self-blended" for name in columns]
    if chosen == "within":
        yield f"{names[0]} on {columns[0]}"
        yield Within(names[0], columns[0], evaluate(scorers[0], sets[0], config, masks=True))
        return
    entries = [Entry(*entry) for entry in zip(names, scorers, forgeries, strict=True)]
    if manipulation:
        yield from cross_manipulation(entries, sets[0], config, by_family)
    else:
        yield from cross_dataset(entries, dict(zip(columns, sets, strict=True)), config, by_family)


def _choose_protocol(
    protocol: Protocol, models: Sequence[Path], data: Sequence[Path], trained_on: Sequence[str]
) -> Protocol:
    """``protocol``, with ``auto`` resolved.  Raises UsageError if it does not take this many models or datasets."""
    if not data or not models:
        raise UsageError("name at least one dataset and one model; see dtn-fast evaluate --help")
    several = len(data) > 1 or len(models) > 1
    if protocol == "auto":
        protocol = "cross-dataset" if several else "within"
    if several and protocol == "within":
        raise UsageError("--protocol within: takes one dataset and one model; use cross-dataset")
    if protocol == "cross-manipulation" and len(data) > 1:
        raise UsageError("--protocol cross-manipulation: takes one dataset")
    if trained_on and protocol != "cross-manipulation":
        raise UsageError("--trained-on: only for --protocol cross-manipulation")
    return protocol


def _forgeries(models: Sequence[Path], scorers: Sequence[Scorer], trained_on: Sequence[str]) -> list[str]:
    """Training forgery of each model in the paper's short form: from ``trained_on``, else as the model records it.

    Raises UsageError when it is in neither.
    """
    if trained_on and len(trained_on) != len(models):
        raise UsageError(f"--trained-on: {len(trained_on)} forgeries for {len(models)} models; give one each")
    found = []
    for place, (path, scorer) in enumerate(zip(models, scorers, strict=True)):
        facts = scorer.config.trained_on
        known: tuple[str, ...] = facts.forgeries if facts and facts.forgeries != (METHOD,) else ()
        if not trained_on and len(known) != 1:
            raise UsageError(
                f"{path}: its training forgery is not known; give one forgery for each model by --trained-on"
            )
        name = trained_on[place] if trained_on else known[0]
        found.append(paper_numbers.FF_NAMES.get(name, name))
    return found
