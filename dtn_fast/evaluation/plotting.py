"""matplotlib without a display or global state; the same values give the same bytes of SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtn_fast.packages import require

MARKERS = "osD^vP*X"
DASHES = ("-", "--", "-.", ":")
REPEATABLE = {"svg.hashsalt": "dtn_fast", "text.parse_math": False}


@contextmanager
def drawing(style: dict[str, Any] | None = None) -> Iterator[type[Any]]:
    """Yields matplotlib's Figure class, to be filled and saved inside the ``with`` block.

    style: rc parameters on top of matplotlib's defaults.  Raises UsageError without matplotlib.
    """
    style_sheets = require("matplotlib.style")
    figure = require("matplotlib.figure").Figure  # not pyplot, which looks for a display and keeps state
    with style_sheets.context(["default", {**REPEATABLE, **(style or {})}]):
        yield figure


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], each of ``width`` by ``height`` inches."""
    Figure = require("matplotlib.figure").Figure
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, file: Any, kind: str, **how: Any) -> None:
    """Writes ``figure`` to an open file or a path as svg, png or pdf, without the date."""
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None, **how)


def svg_text(figure: Any, **how: Any) -> str:
    """``figure`` as the text of an SVG."""
    page = io.BytesIO()
    save(figure, page, "svg", **how)
    return page.getvalue().decode()


def legible(name: str) -> str:
    """``name`` as a label for a legend; a space hides a leading underscore, because matplotlib skips such labels."""
    return " " + name if name.startswith("_") else name
