"""The results page: runs and results on one self-contained HTML page, with curves, tables, pictures and commands."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dtn_fast.errors import UsageError
from dtn_fast.files import write_whole
from dtn_fast.html_page import data_uri, render
from dtn_fast.model.detector import WEIGHTS
from dtn_fast.packages import require
from dtn_fast.provenance import commands
from dtn_fast.train.run_folder import RECIPE, generation_folder, judge
from dtn_fast.train.run_report import Plot, notice_of, plots_of, read_generations
from dtn_fast.version import __version__

PAGE = "results_page.html"
LARGEST = 8 * 2**20
"""Maximum size in bytes of a picture or text on the page."""
LINKS = (
    "reference",
    "link",
    "image_link",
    "image_reference",
    "short_reference",
    "short_image_ref",
    "autolink",
    "automail",
)
"""Markdown's patterns of links and images, which are disabled because the texts are untrusted."""
PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}


class Section(NamedTuple):
    """One folder's results."""

    title: str
    path: str
    notice: str
    commands: list[dict[str, Any]]
    generations: list[list[str]]
    plots: list[Plot]
    tables: list[tuple[str, str, str]]
    """Tables: file name, text as HTML, and the data: URI of the chart of the same name, empty if there is none."""
    pictures: list[tuple[str, str]]
    """Pictures: file name and data: URI."""
    left_out: list[str]


def write_results_page(paths: list[Path], out: Path) -> None:
    """Writes the results page of ``paths`` (runs, or folders of evaluate, robustness, ablate or explain) to ``out``.

    Every text from a file is escaped.  Raises UsageError when a path holds nothing to show.
    """
    sections = [section(path) for path in paths]
    write_whole(out, render(Path(__file__).with_name(PAGE), sections=sections, version=__version__))


def section(path: Path) -> Section:
    """Results in the folder ``path``.  Raises UsageError when there are none."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give runs, or folders written by other verbs")
    generations, plots, notice = [], [], ""
    if (path / RECIPE).is_file():
        read = list(read_generations(path))
        done = [g for g in read if g.epochs]
        plots = list(plots_of(read))
        number, _ = judge(path)
        best = next((g for g in done if g.number == number), None)
        for g in done:
            mark = "best" if g is best else ""
            generations.append([g.name, f"{g.best['val_auc']:.4f}", str(len(g.epochs)), mark])
        notice = notice_of(generation_folder(path, best.number) / WEIGHTS) if best else ""
    texts, images, left_out = [], {}, []
    for file in _files(path):
        if file.stat().st_size > LARGEST:
            left_out.append(f"{file.name}: over {LARGEST // 2**20} MiB")
        elif file.suffix == ".md":
            texts.append(file)
        else:
            images[file.name] = data_uri(PICTURES[file.suffix], file.read_bytes())
    tables = [(file.name, _html(file), images.pop(file.with_suffix(".svg").name, "")) for file in texts]
    pictures = list(images.items())
    made = Section(
        path.resolve().name, str(path), notice, commands(path), generations, plots, tables, pictures, left_out
    )
    if not (generations or tables or pictures or left_out):
        raise UsageError(f"{path}: no run, table or picture in it; give runs, or folders written by other verbs")
    return made


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.suffix in (".md", *PICTURES) and file.is_file() and not file.name.startswith("."):
            yield file


def _html(file: Path) -> str:
    """A Markdown file as HTML; HTML, links and pictures inside it are shown as text."""
    jinja2, markdown = require("jinja2"), require("markdown")
    text = html.escape(html.unescape(file.read_text(encoding="utf-8", errors="replace")), quote=False)
    reader = markdown.Markdown(extensions=["tables", "sane_lists"])
    for name in LINKS:
        reader.inlinePatterns.deregister(name)
    return jinja2.utils.markupsafe.Markup(reader.convert(text))
