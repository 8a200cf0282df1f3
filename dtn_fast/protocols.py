"""The paper's protocols over several models and datasets: its tables' layout, its own figures beside ours.

within-dataset and cross-dataset (Table 1): models by datasets, ACC and AUC.  cross-manipulation (Table 2): models each
trained on one forgery, by the forgery tested on, AUC.  At frame and at video level, each AUC with its 95 % interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtn_fast import paper
from dtn_fast.data.shards import Shards
from dtn_fast.errors import UsageError
from dtn_fast.evaluate import Evaluation, evaluate
from dtn_fast.files import write_whole
from dtn_fast.runtime import Scorer

Level = Literal["frame", "video"]
LEVELS: tuple[Level, ...] = ("frame", "video")


class Cell(NamedTuple):
    """One model on one test set, as fractions; None where a set holds one class."""

    acc: float | None
    auc: float | None
    interval: tuple[float, float] | None

    def percent(self) -> tuple[str, str]:
        """ACC and AUC as the paper prints them, in percent."""
        return _percent(self.acc), _percent(self.auc)


class PaperRow(NamedTuple):
    name: str
    cells: dict[str, tuple[float | None, float | None]]
    """By column: ACC and AUC, percent."""


@dataclass(frozen=True)
class Protocol:
    """What a protocol measured."""

    name: str
    title: str
    columns: tuple[str, ...]
    acc: bool
    """Whether the table shows ACC beside AUC."""
    cells: dict[Level, dict[str, dict[str, Cell]]]
    """By level, row and column."""
    paper: list[PaperRow]
    policies: dict[str, str]
    """How each column's figures came about."""
    notices: tuple[str, ...]

    def table(self, level: Level) -> tuple[list[str], list[list[str]]]:
        """Header and rows as text, the paper's own at the end; percent."""
        header = ["model", *(f"{c} {m}" for c in self.columns for m in (("ACC", "AUC") if self.acc else ("AUC",)))]
        rows = []
        for name, cells in self.cells[level].items():
            row = [name]
            for column in self.columns:
                acc, auc = cells[column].percent()
                found = cells[column].interval
                auc += f" ({100 * found[0]:.1f}-{100 * found[1]:.1f})" if found else ""
                row += [acc, auc] if self.acc else [auc]
            rows.append(row)
        for printed in self.paper:
            row = [f"{printed.name} (the paper's figures)"]
            for column in self.columns:
                pair = printed.cells.get(column, (None, None))
                texts = [f"{v:.2f}" if v is not None else "-" for v in pair]
                row += texts if self.acc else texts[1:]
            rows.append(row)
        return header, rows

    def markdown(self) -> str:
        """Both levels, the policies, what must be said of the models."""
        lines = [f"# {self.title}", ""]
        for level in LEVELS:
            header, rows = self.table(level)
            lines += [f"**{level.capitalize()} level**", ""]
            lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
            lines.append("")
        lines += [f"- {column}: {policy}" for column, policy in self.policies.items()]
        lines += ["", *(f"**{notice}**" for notice in self.notices)]
        return "\n".join(lines).rstrip() + "\n"

    def latex(self, level: Level) -> str:
        """A tabular in the paper's layout (booktabs): percent, the paper's own rows after a rule."""
        each = 2 if self.acc else 1
        lines = [
            f"% {self.title}, {level} level",
            rf"\begin{{tabular}}{{l{'c' * each * len(self.columns)}}}",
            r"\toprule",
        ]
        if self.acc:
            lines.append(
                "Method & " + " & ".join(rf"\multicolumn{{2}}{{c}}{{{_tex(c)}}}" for c in self.columns) + r" \\"
            )
            lines.append(" & " + " & ".join("ACC & AUC" for _ in self.columns) + r" \\")
        else:
            lines.append("Training set & " + " & ".join(_tex(c) for c in self.columns) + r" \\")
        lines.append(r"\midrule")
        for name, cells in self.cells[level].items():
            values = [v for c in self.columns for v in (cells[c].percent() if self.acc else cells[c].percent()[1:])]
            lines.append(" & ".join([_tex(name), *values]) + r" \\")
        if self.paper:
            lines.append(r"\midrule")
        for printed in self.paper:
            pairs = [printed.cells.get(c, (None, None)) for c in self.columns]
            values = [f"{v:.2f}" if v is not None else "-" for p in pairs for v in (p if self.acc else p[1:])]
            lines.append(" & ".join([_tex(printed.name) + r"$^{\ast}$", *values]) + r" \\")
        note = [r"% * the paper's own figures"] if self.paper else []
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *note, ""])

    def to_json(self) -> dict[str, Any]:
        cells = {level: {row: {c: cell._asdict() for c, cell in columns.items()} for row, columns in rows.items()}
                 for level, rows in self.cells.items()}  # fmt: skip
        printed = {row.name: {c: {"acc": a, "auc": b} for c, (a, b) in row.cells.items()} for row in self.paper}
        return {"protocol": self.name, "cells": cells, "paper_percent": printed, "policies": self.policies,
                "notices": list(self.notices)}  # fmt: skip

    def write(self, out: Path) -> list[Path]:
        """OUT.json, OUT.md and OUT.tex; returns them."""
        texts = {
            ".json": json.dumps(self.to_json(), indent=1),
            ".md": self.markdown(),
            ".tex": "\n".join(self.latex(level) for level in LEVELS),
        }
        made = [out.with_name(out.name + suffix) for suffix in texts]
        for path, text in zip(made, texts.values(), strict=True):
            write_whole(path, text)
        return made


def cross_dataset(
    scorers: Mapping[str, Callable[[], Scorer]], datasets: Mapping[str, Shards], split: str = "test"
) -> Iterator[Protocol | str]:
    """Every model on every dataset (Table 1): what is being measured, then the result.

    A model is made when its turn comes.  Raises UsageError as ``evaluate``.
    """
    cells: dict[Level, dict[str, dict[str, Cell]]] = {level: {} for level in LEVELS}
    policies: dict[str, str] = {}
    notices: set[str] = set()
    for name, make in scorers.items():
        scorer = make()
        notices.add(scorer.notice)
        for column, shards in datasets.items():
            yield f"{name} on {column}"
            found = evaluate(scorer, shards, split, groups={"all": shards.methods})
            policies[column] = found.policy()
            for level in LEVELS:
                cells[level].setdefault(name, {})[column] = _cell(found, 0, level)
    printed = [
        PaperRow(name, {c: (row[c].acc, row[c].auc) for c in datasets if c in row})
        for name, row in paper.TABLE1.items()
        if set(row) & set(datasets)
    ]
    title = "Within-dataset and cross-dataset evaluation (Table 1)"
    yield Protocol(
        "cross-dataset", title, tuple(datasets), True, cells, printed, policies, tuple(sorted(notices - {""}))
    )


def cross_manipulation(
    scorers: Mapping[str, Callable[[], Scorer]], shards: Shards, split: str = "test"
) -> Iterator[Protocol | str]:
    """Models each trained on one forgery, named by it, on each forgery of one dataset (Table 2)."""
    columns = {method: paper.FF_NAMES.get(method, method) for method in shards.methods}
    if not columns:
        raise UsageError("the data holds no forgery to test on")
    cells: dict[Level, dict[str, dict[str, Cell]]] = {level: {} for level in LEVELS}
    policies: dict[str, str] = {}
    notices: set[str] = set()
    for name, make in scorers.items():
        scorer = make()
        notices.add(scorer.notice)
        yield f"trained on {name}"
        found = evaluate(scorer, shards, split, groups={m: (m,) for m in columns})
        for place, column in enumerate(columns.values()):
            policies[column] = found.policy()
            for level in LEVELS:
                cells[level].setdefault(name, {})[column] = _cell(found, place, level)
    printed = [
        PaperRow(f"{model}, trained on {trained}", {c: (None, v) for c, v in row.items() if c in columns.values()})
        for model, table in paper.TABLE2.items()
        for trained, row in table.items()
        if trained in scorers
    ]
    title = "Generalisation to forgeries not trained on (Table 2)"
    yield Protocol("cross-manipulation", title, tuple(columns.values()), False, cells, printed, policies,
                   tuple(sorted(notices - {""})))  # fmt: skip


def _cell(found: Evaluation, place: int, level: Level) -> Cell:
    row = found.rows[place]
    if level == "frame":
        return Cell(row.frame.acc, row.frame.auc, row.frame_interval)
    return Cell(row.video.acc, row.video.auc, row.video_interval)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


_ESCAPES = str.maketrans({
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
})  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_ESCAPES)


def names_of(paths: Sequence[Path], names: Sequence[str], what: str) -> list[str]:
    """``names``, or the last parts of ``paths`` that tell them apart.  Raises UsageError when they do not fit."""
    if names:
        if len(names) != len(paths):
            raise UsageError(f"--{what}: {len(names)} names for {len(paths)}; give one each")
        found = list(names)
    else:
        found = [path.name for path in paths]
        if len(set(found)) < len(found):
            found = [str(path) for path in paths]
    if len(set(found)) < len(found):
        raise UsageError(f"--{what}: {', '.join(found)}: each must be named once")
    return found
