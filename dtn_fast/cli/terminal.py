"""Terminal output: tables and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dtn_fast.evaluation.tables import ResultTable

LONG = 30
"""Length in characters above which the text of a table's cell is folded; an AUC with its interval is shorter."""
LEAST = 14
"""Width that a folded column keeps in a narrow terminal, if its text needs it."""


def print_result_table(table: ResultTable) -> None:
    """Prints a table at its levels, then its protocol notes, notes and notices."""
    for level in table.levels:
        print_table(f"{table.title}, {level} level, percent", *table.text(level))
    print("\n".join([*(f"{c}: {p}" for c, p in table.column_notes.items()), *table.notes, *table.notices]))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console() -> Console:
    """Console on stdout; 140 columns wide without a terminal, so that tables stay whole."""
    return _Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def progress() -> Progress:
    """Progress bar on stderr with count, percentage and time left; silent if stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, disable=not terminal.is_terminal)


def steps(bar: Progress) -> Callable[[str, int, int], None]:
    """Function (step, done, total) that shows the current step of a long task in ``bar``, or without a terminal prints
    the name of each step to stderr once."""
    task = bar.add_task("", total=None, note="")
    shown = ""

    def show(step: str, done: int, total: int) -> None:
        nonlocal shown
        if bar.disable and step != shown:
            print(f"{step} ...", file=sys.stderr)
        shown = step
        bar.update(task, description=step, completed=done, total=total or None)

    return show


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table()
    for place, name in enumerate(header):  # narrow terminals fold names and sentences, not verdicts
        sentence = max((len(row[place]) for row in rows), default=0) > LONG
        widest = max(len(name), *(len(row[place]) for row in rows), 0)
        table.add_column(name, overflow="fold", no_wrap=place > 0 and not sentence, min_width=min(widest, LEAST))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # brackets in a file's name are no markup
    console().print(title, style="italic", markup=False, soft_wrap=True)
    console().print(table)
