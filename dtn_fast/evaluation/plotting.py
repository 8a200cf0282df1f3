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
    """Yields matplotlib's Figure class, to be filled and saved within; ``style``: rc parameters on top of matplotlib's.

    Raises UsageError without matplotlib.
    """
    style_sheets = require("matplotlib.style", "matplotlib")
    figure = require("matplotlib.figure", "matplotlib").Figure  # pyplot would look for a display and keep state
    with style_sheets.context(["default", {**REPEATABLE, **(style or {})}]):
        yield figure


def save(figure: Any, file: Any, kind: str, **how: Any) -> None:
    """Writes ``figure`` to an open file or a path as svg, png or pdf, without the date."""
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None, **how)


def svg_text(figure: Any, **how: Any) -> str:
    """``figure`` as the text of an SVG."""
    page = io.BytesIO()
    save(figure, page, "svg", **how)
    return page.getvalue().decode()


def legible(name: str) -> str:
    """``name`` for a legend: matplotlib leaves those out that start with an underscore."""
    return " " + name if name.startswith("_") else name
