"""The demo, and the notebooks in examples/ run from the first cell to the last on it, all in miniature."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from small import changed

from dtn_fast.cli import demo
from dtn_fast.data.config import SyntheticConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with runs/demo, made by the demo's own path on a miniature set, and the text that it printed."""
    root, printed = tmp_path_factory.mktemp("examples"), io.StringIO()
    size = SyntheticConfig(train=4, val=2, test=2, frames=2)
    recipe = changed(demo.RECIPE, epochs=1, generations=2)
    with contextlib.redirect_stdout(printed):
        demo.run(root / "runs" / "demo", 2, size=size, recipe=recipe)
    return root, printed.getvalue()


def test_demo_end_to_end(made: tuple[Path, str]) -> None:
    root, printed = made
    assert re.search(r"teacher +test frame AUC 0\.\d{4}", printed)
    assert "student 2" in printed
    assert "Calibration of" in printed
    assert re.search(r"largest logit error \d\.\d\de-\d\d", printed)
    report = (root / "runs" / "demo" / "report.html").read_text()
    assert "synthetic faces: no claim about real deepfakes" in report
    assert report.count("<img") >= 16
    assert (root / "runs" / "demo" / "videos" / "photographs.mp4").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(made[0])}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_it_made(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "run it on the demo and store it with its outputs"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "/tmp" not in str(outputs)
