"""The paper's protocols over several models and datasets, as tables in its layout.

within-dataset and cross-dataset (Table 1): models by datasets, ACC and AUC.  cross-manipulation (Table 2): models each
trained on one forgery, by the forgery tested on, AUC.  At frame and at video level, each AUC with its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation import paper_numbers
from dtn_fast.evaluation.evaluate import Evaluation, evaluate
from dtn_fast.evaluation.paper_numbers import Pair
from dtn_fast.evaluation.tables import Cell, Cells, PaperRow, ResultTable, TableRow
from dtn_fast.runtime.scorer import Scorer

TRAINED_ON = "trained on"


class Entry(NamedTuple):
    """A model of a table."""

    name: str
    scorer: Scorer
    trained_on: str = ""
    """The one forgery that it was trained on, for cross-manipulation."""


class Measured(NamedTuple):
    cells: Cells
    column_notes: dict[str, str]
    """By column."""


def measure(
    scorer: Scorer, tests: Mapping[str, CropDataset], by_forgery: bool = False, split: str = "test"
) -> Iterator[str | Measured]:
    """One model on every test set: each one's name before it, then the figures; ``by_forgery``: on each forgery in it.

    Raises UsageError as ``evaluate``, and where there is no forgery to test on.
    """
    found = Measured({"frame": {}, "video": {}}, {})
    for name, dataset in tests.items():
        yield name
        groups = (
            {paper_numbers.FF_NAMES.get(m, m): (m,) for m in dataset.methods} if by_forgery else {name: dataset.methods}
        )
        if not groups:
            raise UsageError(f"{name}: holds no forgery to test on")
        _fill(found, evaluate(scorer, dataset, split, groups))
    yield found


def _fill(found: Measured, result: Evaluation) -> None:
    """A column a row of ``result``."""
    for row in result.rows:
        found.cells["frame"][row.fakes] = Cell(row.frame.acc, row.frame.auc, row.frame_interval)
        found.cells["video"][row.fakes] = Cell(row.video.acc, row.video.auc, row.video_interval)
        found.column_notes[row.fakes] = row.note


def within(name: str, dataset: str, result: Evaluation) -> ResultTable:
    """The overall row of an evaluation as Table 1 shows one model on one dataset."""
    found = Measured({"frame": {}, "video": {}}, {})
    _fill(found, result._replace(rows=[result.rows[0]._replace(fakes=dataset)]))
    return cross_dataset_table([TableRow(name, found.cells, notice=result.notice)], found.column_notes)


def cross_dataset(
    entries: Sequence[Entry], datasets: Mapping[str, CropDataset], split: str = "test"
) -> Iterator[str | ResultTable]:
    """Every model on every dataset (Table 1): what is being measured, then the table.

    Raises UsageError as ``evaluate``.
    """
    for step in _measure_all(entries, datasets, False, split):
        yield step if isinstance(step, str) else cross_dataset_table(*step)


def cross_dataset_table(rows: list[TableRow], column_notes: dict[str, str]) -> ResultTable:
    """Rows in Table 1's layout, the paper's below."""
    printed = [
        PaperRow(name, {c: row[c] for c in column_notes if c in row})
        for name, row in paper_numbers.TABLE1.items()
        if set(row) & set(column_notes)
    ]
    title = "Within-dataset and cross-dataset evaluation (Table 1)"
    return ResultTable("cross-dataset", title, tuple(column_notes), rows, paper=printed, column_notes=column_notes)


def cross_manipulation(
    entries: Sequence[Entry], dataset: CropDataset, split: str = "test"
) -> Iterator[str | ResultTable]:
    """Models each trained on one forgery, on each forgery of one dataset (Table 2).

    Raises UsageError as ``measure``.
    """
    for step in _measure_all(entries, {"the data": dataset}, True, split):
        yield step if isinstance(step, str) else cross_manipulation_table(*step)


def cross_manipulation_table(rows: list[TableRow], column_notes: dict[str, str]) -> ResultTable:
    """Rows in Table 2's layout, below them the paper's that were trained on the same forgeries."""
    trained = {row.before[TRAINED_ON] for row in rows}
    printed = [
        PaperRow(model, {c: Pair(None, v) for c, v in row.items() if c in column_notes}, {TRAINED_ON: on})
        for model, table in paper_numbers.TABLE2.items()
        for on, row in table.items()
        if on in trained
    ]
    title = "Generalisation to forgeries not trained on (Table 2)"
    return ResultTable(
        "cross-manipulation", title, tuple(column_notes), rows, acc=False, paper=printed, column_notes=column_notes
    )


def _measure_all(
    entries: Sequence[Entry], tests: Mapping[str, CropDataset], by_forgery: bool, split: str
) -> Iterator[str | tuple[list[TableRow], dict[str, str]]]:
    rows, column_notes = [], {}
    for entry in entries:
        for step in measure(entry.scorer, tests, by_forgery, split):
            if isinstance(step, str):
                yield f"{entry.name} on {step}"
                continue
            column_notes.update(step.column_notes)
            before = {TRAINED_ON: entry.trained_on} if by_forgery else {}
            rows.append(TableRow(entry.name, step.cells, before, notice=entry.scorer.notice))
    yield rows, column_notes


def names_of(paths: Sequence[Path], names: Sequence[str], what: str, once: bool = True) -> list[str]:
    """``names``, or the last parts of ``paths`` that tell them apart.

    Raises UsageError when there are more or fewer than paths or, with ``once``, a name comes twice.
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
