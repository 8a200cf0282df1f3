"""Results to one self-contained HTML page (no script, no network) and JSON."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.detect.verdict import RULE, Picture, Result
from dtn_fast.explain.heatmap import overlay
from dtn_fast.files import write_whole
from dtn_fast.version import __version__

DETAILS = 50
"""Inputs shown with timeline and faces; the rest have their row in the table."""


class ReportTable(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(
    path: Path,
    title: str,
    notices: list[str],
    tables: list[ReportTable] | None = None,
    results: list[Result] | None = None,
    *,
    threshold: float,
) -> None:
    """Writes the page to ``path``, whole or not at all.  Every text is escaped."""
    import jinja2

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"jpeg": data_uri, "heat": heat_uri}
    page = environment.from_string(template).render(
        title=title,
        notices=[notice for notice in notices if notice],
        tables=tables or [],
        results=results or [],
        details=DETAILS,
        rule=RULE,
        threshold=threshold,
        version=__version__,
    )
    write_whole(path, page)


def write_results(path: Path, results: list[Result], notice: str, threshold: float) -> None:
    """The same results for programs."""
    data: dict[str, Any] = {"notice": notice, "rule": RULE, "threshold": threshold}
    write_whole(path, json.dumps({**data, "results": [r.to_json() for r in results]}, indent=1))


def data_uri(image: NDArray[np.uint8]) -> str:
    """An RGB image [H, W, 3] as a JPEG inside a URI."""
    data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def heat_uri(picture: Picture) -> str:
    """A kept face with its heat map laid over it."""
    assert picture.heat is not None
    return data_uri(overlay(picture.crop, picture.heat))


def trained_on(notice: str) -> str:
    return f"This model was trained on {notice}." if notice else ""
