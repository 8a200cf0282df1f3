"""The report of many runs: everything in it, nothing executable, the command of each."""

from __future__ import annotations

import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dtn_fast.errors import UsageError
from dtn_fast.provenance import COMMANDS, commands, commit, record
from dtn_fast.train.results_page import write_results_page

CHROMIUM = shutil.which("chromium")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_runs_tables_and_pictures_on_one_page(trained: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "table1.md").write_text(
        "# Title\n\n| a | b |\n| --- | --- |\n| <script>alert(1)</script> | **2** |\n\n"
        "[click](javascript:alert(3)) ![seen](https://example.com/x.png)\n"
    )
    (tables / "table1.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tables / "plot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(2)</script></svg>")
    record(tables, ["evaluate", "a b", "--model", "<x>"])
    write_results_page([trained, tables], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    tags = Tags(text).found
    assert not {"script", "link", "iframe", "x"} & {tag for tag, _ in tags}
    assert not any("javascript:" in str(value) for _, attrs in tags for value in attrs.values())
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(images) >= 4
    assert text.index("<strong>2</strong>") < text.index("table1.md as a chart") < text.index("plot.svg")
    assert all(str(src).startswith("data:image/") for src in images)
    assert "dtn-fast evaluate &#39;a b&#39; --model &#39;&lt;x&gt;&#39;" in text
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in text
    assert "<strong>2</strong>" in text
    assert "0 (teacher)" in text
    assert "synthetic faces: no claim about real deepfakes" in text
    assert "the command that made it is not recorded" in text  # the run of the tests was not made by a command


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1100, 390])
def test_the_page_in_a_browser(width: int, trained: Path, tmp_path: Path) -> None:
    """It is readable on a phone: nothing but tables scrolls sideways, every picture loads, nothing is said."""
    from playwright.sync_api import sync_playwright

    tables = tmp_path / "_".join(["tables_with_a_name_that_has_no_space_in_it"] * 3)
    tables.mkdir()
    (tables / "wide.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='2000' height='50'/>")
    cells = " | ".join(f"column {n}" for n in range(14))
    (tables / "wide.md").write_text(f"| {cells} |\n|{'---|' * 14}\n| {cells} |\n")
    record(tables, ["evaluate", "x" * 300])
    write_results_page([trained, tables], tmp_path / "report.html")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"file://{tmp_path / 'report.html'}")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        folder = os.environ.get("DTN_FAST_SCREENSHOTS")
        if folder:
            page.screenshot(path=str(Path(folder, f"report-{width}.png")), full_page=True)
        browser.close()
    assert said == []


def test_what_cannot_be_shown_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        write_results_page([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(UsageError, match="no run, table or picture in it"):
        write_results_page([tmp_path], tmp_path / "r.html")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with (run / "generation-0" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 7}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl: damaged, a line without val_auc"):
        write_results_page([run], tmp_path / "r.html")
    (tmp_path / "big.png").write_bytes(bytes(9 * 2**20))
    write_results_page([tmp_path], tmp_path / "r.html")
    assert "big.png: over 8 MiB" in (tmp_path / "r.html").read_text()


def test_commands_are_recorded_once_in_a_row(tmp_path: Path) -> None:
    for words in (["train", "a"], ["train", "a"], ["distill", "a"]):
        record(tmp_path, words)
    with (tmp_path / COMMANDS).open("a") as file:
        file.write('damaged\n{"command": "dtn-fast train a"}\n')
    assert [row["command"] for row in commands(tmp_path)] == ["dtn-fast train a", "dtn-fast distill a"]
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert commit().rstrip("+") == (head or "unknown")
    assert commands(tmp_path / "none") == []
