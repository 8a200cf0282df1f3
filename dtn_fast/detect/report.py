"""Detection results as one self-contained HTML page (no script, no network) and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dtn_fast.detect.verdict import Picture, Result, rule_of, short_names
from dtn_fast.explain.heatmap import overlay
from dtn_fast.files import json_text, write_whole
from dtn_fast.html_page import data_uri, render
from dtn_fast.version import __version__

DETAILS = 50
"""Number of inputs shown with timeline and faces; the others have only a row in the table."""


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
) -> None:
    """Writes the page to ``path`` atomically.  Every text is escaped."""
    page = render(
        Path(__file__).with_name("report.html"),
        {"jpeg": jpeg_uri, "heat": heat_uri},
        title=title,
        notices=[notice for notice in notices if notice],
        tables=tables or [],
        results=results or [],
        names=short_names([result.path for result in results or []]),
        details=DETAILS,
        rule=_rule(results or []),
        limits="; ".join(limits_in_words(results or [])),
        version=__version__,
    )
    write_whole(path, page)


def write_results(path: Path, results: list[Result], notice: str, remarks: list[str]) -> None:
    """Writes the results to ``path`` as JSON, with the notice and remarks on the model."""
    data: dict[str, Any] = {"notice": notice, "remarks": remarks, "rule": _rule(results)}
    write_whole(path, json_text({**data, "results": [r.to_json() for r in results]}, indent=1))


def _rule(results: list[Result]) -> str:
    return rule_of(any(result.clips for result in results))


def jpeg_uri(image: NDArray[np.uint8]) -> str:
    """An RGB image [H, W, 3] as the data: URI of a JPEG."""
    data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    return data_uri("image/jpeg", data)


def heat_uri(picture: Picture) -> str:
    """A face overlaid with its heat map, as a data: URI."""
    assert picture.heat is not None
    return jpeg_uri(overlay(picture.crop, picture.heat))


def trained_on(notice: str) -> str:
    return f"This model was trained on {notice}." if notice else ""


def sentences(remarks: list[str]) -> list[str]:
    """Remarks on the model as sentences."""
    return [f"This model is {remark}." if not remark.startswith("no ") else f"There is {remark}." for remark in remarks]


def limits_in_words(results: list[Result]) -> list[str]:
    """The limits of each kind of input among ``results``, in a sentence."""
    named = {"videos" if r.moving else "pictures": str(r.limits) for r in results if r.ok}
    if len(set(named.values())) == 1:
        return list(named.values())[:1]
    return [f"{kind}: {limits}" for kind, limits in sorted(named.items())]
