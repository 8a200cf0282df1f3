"""Tables in the paper's layout: models by test sets, the paper's own figures beside; Markdown, LaTeX, JSON, a chart.

tabulate escapes neither | nor < in Markdown and knows no multicolumn; pandas' Styler makes the LaTeX header but not the
second rule, stars and comments, for 84 MB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtn_fast.evaluation.paper_numbers import Pair
from dtn_fast.evaluation.plotting import MARKERS, drawing, svg_text
from dtn_fast.files import json_text, write_whole

Level = Literal["frame", "video"]
LEVELS: tuple[Level, ...] = ("frame", "video")


class Cell(NamedTuple):
    """Metrics of one model on one test set, as fractions; None if the set holds a single class or, at video level, only
    single pictures."""

    acc: float | None
    auc: float | None
    interval: tuple[float, float] | None
    """Confidence interval of the AUC."""


Cells = dict[Level, dict[str, Cell]]
"""Cells by level, then by column."""


@dataclass(frozen=True)
class TableRow:
    """Measured metrics of one model."""

    name: str
    cells: Cells
    before: dict[str, str] = field(default_factory=dict)
    """Extra columns left of the metrics, such as the training forgery: title -> text."""
    after: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Extra columns right of the metrics, such as sizes: title -> ours, and the paper's or an empty text."""
    paper: dict[str, Pair] = field(default_factory=dict)
    """The paper's values of this row by column, in percent."""
    notice: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further data for the JSON file only."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TableRow:
        """Restores a row of :meth:`ResultTable.to_json`.  Raises KeyError, TypeError, AttributeError on other data."""
        cells = {level: {c: Cell(v["acc"], v["auc"], v["interval"] and tuple(v["interval"]))
                         for c, v in stored["cells"][level].items()} for level in LEVELS}  # fmt: skip
        paper = {c: Pair(**pair) for c, pair in stored["paper"].items()}
        after = {name: (ours, printed) for name, (ours, printed) in stored["after"].items()}
        return cls(stored["name"], cells, dict(stored["before"]), after, paper, stored["notice"], dict(stored["facts"]))


class PaperRow(NamedTuple):
    """A row with only the paper's values."""

    name: str
    cells: dict[str, Pair]
    before: dict[str, str] = {}  # noqa: RUF012 (never changed)
    after: dict[str, str] = {}  # noqa: RUF012


@dataclass(frozen=True)
class ResultTable:
    """A table in the paper's layout with our metrics."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[TableRow]
    acc: bool = True
    """Whether the table has ACC beside AUC."""
    paper: list[PaperRow] = field(default_factory=list)
    """The paper's rows without a measured counterpart."""
    column_notes: dict[str, str] = field(default_factory=dict)
    """Protocol note of each column."""
    notes: tuple[str, ...] = ()
    cost: str = ""
    """Title of a column of numbers in ``TableRow.after`` that a second chart shows the AUC against; empty: none."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels that were measured: only the frames where every test set is of single pictures."""
        cells = [cell for row in self.rows for cell in row.cells["video"].values()]
        return LEVELS if not cells or any(cell.acc is not None for cell in cells) else ("frame",)

    @property
    def notices(self) -> list[str]:
        """The models' notices, each once."""
        return sorted({row.notice for row in self.rows} - {""})

    def text(self, level: Level) -> tuple[list[str], list[list[str]]]:
        """Header and rows in percent: ours with the AUC's interval in parentheses, the paper's in brackets or
        below."""
        before, after = self._around()
        metrics = ("ACC", "AUC") if self.acc else ("AUC",)
        header = ["model", *before, *(f"{c} {m}" for c in self.columns for m in metrics), *after]
        rows = []
        for row in self.rows:
            cells = [row.name, *(row.before.get(k, "") for k in before)]
            for column in self.columns:
                mine, printed = row.cells[level][column], row.paper.get(column, Pair(None, None))
                between = f" ({100 * mine.interval[0]:.1f}-{100 * mine.interval[1]:.1f})" if mine.interval else ""
                pair = [_beside(_percent(mine.acc), printed.acc), _beside(_percent(mine.auc) + between, printed.auc)]
                cells += pair if self.acc else pair[1:]
            for ours, theirs in (row.after.get(k, ("", "")) for k in after):
                cells.append(f"{ours} [{theirs}]" if theirs else ours)
            rows.append(cells)
        for other in self.paper:
            figures = [_printed(v) for c in self.columns for v in self._pair(other.cells.get(c))]
            lead = [f"{other.name} (the paper's values)", *(other.before.get(k, "") for k in before)]
            rows.append([*lead, *figures, *(other.after.get(k, "") for k in after)])
        return header, rows

    def _around(self) -> tuple[list[str], list[str]]:
        """Titles of the extra columns left and right of the metrics, in order of appearance."""
        rows: Sequence[TableRow | PaperRow] = [*self.rows, *self.paper]
        return list(dict.fromkeys(k for r in rows for k in r.before)), list(
            dict.fromkeys(k for r in self.rows for k in r.after)
        )

    def _compared(self) -> list[TableRow]:
        """Our rows that have values of the paper beside them."""
        sized = lambda row: any(theirs for _, theirs in row.after.values())
        return [row for row in self.rows if set(row.paper) & set(self.columns) or sized(row)]

    def _pair(self, pair: Pair | None) -> tuple[float | None, ...]:
        pair = pair or Pair(None, None)
        return tuple(pair) if self.acc else (pair.auc,)

    def markdown(self) -> str:
        """The table at its levels, protocol notes and notices as Markdown."""
        lines = [f"# {self.title}", ""]
        if self._compared():
            lines += ["The paper's values are in brackets.", ""]
        for level in self.levels:
            lines += [f"**{level.capitalize()} level, percent**", "", *markdown_table(*self.text(level)), ""]
        lines += [*(f"- {column}: {note}" for column, note in self.column_notes.items()),
                  *(f"- {note}" for note in self.notes)]  # fmt: skip
        lines += ["", *(f"**{notice}**" for notice in self.notices)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self, level: Level) -> str:
        """LaTeX tabular in the paper's layout (booktabs), in percent; the paper's rows are starred and follow a rule.

        Protocol notes and notices are comments.
        """
        before, after = self._around()
        each = 2 if self.acc else 1
        shape = "l" * (1 + len(before)) + "c" * (each * len(self.columns) + len(after))
        protocol = [f"{column}: {note}" for column, note in self.column_notes.items()]
        comments = [f"{self.title}, {level} level", *protocol, *self.notes, *self.notices]
        lines = [*(f"% {comment}" for comment in comments), rf"\begin{{tabular}}{{{shape}}}", r"\toprule"]
        first = ["Method", *before]
        if self.acc:
            groups = [rf"\multicolumn{{2}}{{c}}{{{_tex(c)}}}" for c in self.columns]
            lines.append(_line([*map(_tex, first), *groups, *map(_tex, after)]))
            lines.append(_line([*("" for _ in first), *(["ACC", "AUC"] * len(self.columns)), *("" for _ in after)]))
        else:
            lines.append(_line(map(_tex, [*first, *self.columns, *after])))
        lines.append(r"\midrule")
        for row in self.rows:
            figures = [_percent(v) for c in self.columns for v in self._pair(Pair(*row.cells[level][c][:2]))]
            words = [row.name, *(row.before.get(k, "") for k in before)]
            lines.append(_line([*map(_tex, words), *figures, *(_tex(row.after.get(k, ("", ""))[0]) for k in after)]))
        sizes = lambda row: {title: theirs for title, (_, theirs) in row.after.items()}
        printed = [*(PaperRow(r.name, r.paper, r.before, sizes(r)) for r in self._compared()), *self.paper]
        if printed:
            lines.append(r"\midrule")
        for other in printed:
            figures = [_printed(v) for c in self.columns for v in self._pair(other.cells.get(c))]
            words = [_tex(other.name) + r"$^{\ast}$", *(_tex(other.before.get(k, "")) for k in before)]
            lines.append(_line([*words, *figures, *(_tex(other.after.get(k, "")) for k in after)]))
        note = [r"% * the paper's values"] if printed else []
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *note, ""])

    def chart(self, level: Level = "frame") -> str:
        """SVG chart with a panel per test set: the AUC of each row with its interval, the paper's as a ring.

        Raises UsageError without matplotlib.
        """
        titles = [" ".join([row.name, *(f"({v})" for v in row.before.values())]) for row in self.rows]
        with drawing() as Figure:
            size = (1.6 + 2.3 * len(self.columns), 1.3 + 0.3 * len(self.rows))
            figure = Figure(figsize=size, layout="constrained")
            for panel, column in zip(
                figure.subplots(1, len(self.columns), sharey=True, squeeze=False)[0], self.columns, strict=True
            ):
                for place, row in enumerate(self.rows):
                    mine, printed = row.cells[level][column], row.paper.get(column)
                    if mine.interval:
                        panel.plot([100 * v for v in mine.interval], [place] * 2, color="#0072b2", linewidth=1.5)
                    if mine.auc is not None:
                        panel.plot(100 * mine.auc, place, "o", color="#0072b2", markersize=5)
                    if printed and printed.auc is not None:
                        panel.plot(printed.auc, place, "o", color="#d55e00", markersize=7, fillstyle="none")
                panel.set_title(column, fontsize=10)
                panel.grid(alpha=0.3)
                panel.set_yticks(range(len(titles)), titles, fontsize=8)
                panel.set_ylim(len(titles) - 0.5, -0.5)
            ring = "; ring: the paper" if any(set(row.paper) & set(self.columns) for row in self.rows) else ""
            words = [
                f"{level} AUC, percent; bar: confidence interval, its level in {self.name}.md{ring}",
                *self.notices,
            ]
            figure.supxlabel("\n".join(words), fontsize=9)
            return svg_text(figure)

    def cost_chart(self, level: Level = "frame") -> str:
        """SVG chart with a panel per test set: the AUC of each row with its interval against its cost, logarithmic."""
        with drawing() as Figure:
            figure = Figure(figsize=(1.0 + 4.2 * len(self.columns), 4.2), layout="constrained")
            for panel, column in zip(
                figure.subplots(1, len(self.columns), squeeze=False)[0], self.columns, strict=True
            ):
                for place, row in enumerate(self.rows):
                    cell, at = row.cells[level][column], float(row.after[self.cost][0])
                    if cell.auc is None:
                        continue
                    ends = cell.interval or (cell.auc, cell.auc)
                    error = [[100 * max(cell.auc - ends[0], 0)], [100 * max(ends[1] - cell.auc, 0)]]
                    panel.errorbar(at, 100 * cell.auc, error, fmt=MARKERS[place % len(MARKERS)], label=row.name)
                panel.set_xscale("log")
                panel.set(title=column, xlabel=f"{self.cost} per image", ylabel=f"{level} AUC, percent")
                panel.grid(alpha=0.3)
            figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
            figure.supxlabel("\n".join(self.notices), fontsize=9)
            return svg_text(figure)

    def to_json(self) -> dict[str, Any]:
        cells = lambda of: {level: {c: cell._asdict() for c, cell in row.items()} for level, row in of.items()}
        pairs = lambda of: {c: pair._asdict() for c, pair in of.items()}
        rows = [{"name": r.name, "before": r.before, "cells": cells(r.cells), "after": r.after, "paper": pairs(r.paper),
                 "notice": r.notice, "facts": r.facts} for r in self.rows]  # fmt: skip
        paper = [{"name": r.name, "before": r.before, "cells": pairs(r.cells), "after": r.after} for r in self.paper]
        return {"name": self.name, "title": self.title, "columns": self.columns, "rows": rows, "paper_percent": paper,
                "column_notes": self.column_notes, "notes": self.notes}  # fmt: skip

    def write(self, out: Path) -> list[Path]:
        """Writes OUT.json, OUT.md, OUT.tex and OUT.svg, with a cost also OUT-cost.svg, and returns their paths."""
        texts = {
            ".json": json_text(self.to_json(), indent=1),
            ".md": self.markdown(),
            ".tex": "\n".join(self.latex(level) for level in self.levels),
            ".svg": self.chart(),
        }
        if self.cost:
            texts["-cost.svg"] = self.cost_chart()
        made = [out.with_name(out.name + suffix) for suffix in texts]
        for path, text in zip(made, texts.values(), strict=True):
            write_whole(path, text)
        return made


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, with the text of its cells escaped."""
    safe = lambda cells: [cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells]
    return ["| " + " | ".join(cells) + " |" for cells in (safe(header), ["---"] * len(header), *map(safe, rows))]


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], comments: Sequence[str] = ()) -> str:
    """LaTeX tabular (booktabs) of text; its first two columns are flush left."""
    shape = "ll" + "c" * (len(header) - 2)
    lines = [*(f"% {comment}" for comment in comments), rf"\begin{{tabular}}{{{shape}}}", r"\toprule",
             _line(map(_tex, header)), r"\midrule", *(_line(map(_tex, row)) for row in rows)]  # fmt: skip
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _printed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _beside(text: str, printed: float | None) -> str:
    return text if printed is None else f"{text} [{printed:.2f}]"


def _line(cells: Iterator[str] | Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


_ESCAPES = str.maketrans({
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
})  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_ESCAPES)
