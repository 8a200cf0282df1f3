"""The page of a training run: what it says, in the middle of a run too, and that nothing in a file becomes markup."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import RECIPE, SMALL

from dtn_fast.errors import UsageError
from dtn_fast.evaluation.metrics import evaluate_scores
from dtn_fast.model.detector import WEIGHTS
from dtn_fast.runtime.load import RECIPE as RUN_RECIPE
from dtn_fast.train.run_folder import METRICS, NONFINITE, STEPS, VALIDATION
from dtn_fast.train.run_report import write_run_report

LABELS = [0, 0, 0, 0, 1, 1, 1, 1, 1]
SCORES = [0.1, 0.2, 0.3, 0.5, 0.9, 0.8, 0.6, 0.5, 0.4]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The trained run with a second generation of known figures, which is the best."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    student = run / "generation-1"
    student.mkdir()
    shutil.copy(run / "generation-0" / WEIGHTS, student)
    losses = {"loss": 2.5, "ce": 0.6, "kd": 0.1, "center": 0.2}
    epochs = [
        {"epoch": e, "lr": 1e-3, "losses": losses, "val_auc": auc, "images_per_second": speed}
        for e, (auc, speed) in enumerate([(0.97, 1000), (0.99, 5000), (0.99, 1234)])
    ]
    (student / METRICS).write_text("".join(json.dumps(row) + "\n" for row in epochs))
    (student / STEPS).write_text('{"epoch": 0, "step": 9, "lr": 0.001, "loss": 2.75}\n')
    (student / NONFINITE).write_text('{"epoch": 0, "step": 3}\n' * 7)
    np.savez(student / VALIDATION, labels=LABELS, scores=SCORES)
    return run


def page(run: Path) -> str:
    return write_run_report(run).read_text(encoding="utf-8")


def cells(text: str, first: str) -> list[str]:
    """The cells of the row that begins with ``first``."""
    row = re.search(rf"<tr[^>]*><th>{re.escape(first)}</th>(.*?)</tr>", text, re.DOTALL)
    assert row
    return re.findall(r"<td>(.*?)</td>", row[1])


def drawn(text: str) -> str:
    """All plots' SVG; matplotlib leaves what it draws as paths in comments."""
    return "".join(base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]*)", text))


def test_says_what_the_run_did(run: Path) -> None:
    text = page(run)
    first = json.loads((run / "summary.json").read_text())["generations"][0]["val_auc"]
    assert "AUC <strong>0.9900</strong> on 9 validation crops" in text
    assert "This model was trained on synthetic faces: no claim about real deepfakes." in text
    assert cells(text, "1 (student)") == ["0.9900", f"{0.99 - first:+.4f} over 0", "2", "3 of 2", "7", "1,234"]
    assert cells(text, "0 (teacher)")[:2] == [f"{first:.4f}", ""]
    assert cells(text, "epochs") == ["2", "30"]
    assert cells(text, "weights") == ["4.0, 0.4, 0.6", ""]
    assert cells(text, "image_size") == ["64", "256"]
    changed = [f.name for asked in (RECIPE, SMALL) for f in fields(asked) if getattr(asked, f.name) != f.default]
    assert text.count('class="mark"') == len(["the best generation", *changed])
    assert torch.__version__ in text


def test_the_best_is_the_last_with_a_gain_by_the_rule(run: Path) -> None:
    """The student's higher AUC is one of other crops, then one inside its interval."""
    stored = json.loads((run / RUN_RECIPE).read_text())
    stored["recipe"]["gain"] = "interval"
    (run / RUN_RECIPE).write_text(json.dumps(stored))
    assert "The best is generation 0 (teacher)" in page(run)
    shutil.copy(run / "generation-0" / VALIDATION, run / "generation-1" / VALIDATION)
    text = page(run)
    assert "The best is generation 0 (teacher)" in text
    first = json.loads((run / "summary.json").read_text())["generations"][0]["val_auc"]
    assert cells(text, "1 (student)")[1] == f"{0.99 - first:+.4f} (+0.0000 to +0.0000) over 0"


def test_curves_and_confusion_are_those_of_the_validation_scores(run: Path) -> None:
    text = page(run)
    legend = f"generation 1: AUC {evaluate_scores(LABELS, SCORES, 0.5).auc:.4f}"
    assert legend == "generation 1: AUC 0.9250"  # 18.5 of 20 pairs in order, a tie counting half
    assert legend in drawn(text)
    assert f'{legend}">' in text
    assert cells(text, "real") == ["3 (75.0 %)", "1 (25.0 %)"]
    assert cells(text, "fake") == ["1 (20.0 %)", "4 (80.0 %)"]
    assert {"<!-- loss -->", "<!-- ce -->", "<!-- kd -->", "<!-- center -->"} <= set(
        re.findall("<!-- .*? -->", drawn(text))
    )
    assert "end of generation 1: loss 2.75" in text


def test_is_self_contained_and_repeatable(run: Path) -> None:
    text = page(run)
    assert "<script" not in text + drawn(text)
    assert not re.search(r"(src|href)=.?http", text + drawn(text))
    assert text.count("<img") == len(re.findall(r'alt="[^"]+"', text)) == 6
    assert page(run) == text


def test_text_of_files_is_escaped(run: Path) -> None:
    evil = "<img src=x onerror=alert(1)>$\\frac$"
    asked = json.loads((run / "recipe.json").read_text())
    asked["recipe"]["methods"] = [evil]
    (run / "recipe.json").write_text(json.dumps(asked))
    save_file({"w": torch.zeros(1)}, run / "generation-1" / WEIGHTS, metadata={"notice": evil})
    rows = (run / "generation-1" / METRICS).read_text()
    (run / "generation-1" / METRICS).write_text(rows.replace('"kd"', json.dumps(evil)))
    text = page(run.rename(run.with_name("<img src=y>")))
    assert not re.search(r"<img src=[^\"]", text)
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3
    assert "&lt;img src=y&gt;" in text
    assert "<img" not in drawn(text)


def test_page_in_the_middle_of_a_run(run: Path) -> None:
    student = run / "generation-1"
    for name in (METRICS, VALIDATION, WEIGHTS):
        (student / name).unlink()
    text = page(run)
    assert "The best is generation 0 (teacher)" in text
    assert cells(text, "1 (student)") == ["", "", "", "0 of 2", "7", ""]
    shutil.rmtree(run / "generation-0")
    shutil.move(student, run / "generation-0")
    text = page(run)
    assert "No epoch is finished yet" in text
    assert text.count("<img") == 1, "the loss by update"
    shutil.rmtree(run / "generation-0")
    assert "No epoch is finished yet" in page(run)


def test_damaged_and_missing_files_are_said(run: Path) -> None:
    student = run / "generation-1"
    (student / METRICS).write_bytes((student / METRICS).read_bytes()[:-30])
    np.savez(student / VALIDATION, labels=LABELS, scores=np.array([{}] * 9))  # objects: reading would execute a pickle
    (student / WEIGHTS).write_bytes(b"damaged")
    (run / "generation-0" / VALIDATION).unlink()
    text = page(run)
    assert "generation 0 are missing or damaged: it has no ROC curve." in text
    assert "generation 1 are missing or damaged: it has no ROC curve and no confusion matrix" in text
    assert "Confusion" not in text
    assert cells(text, "1 (student)")[2:4] == ["2", "2 of 2"]
    assert "the notice about its training data is missing" in text


def test_what_it_needs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no training run there"):
        write_run_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'dtn-fast\[cli\]'"):
        write_run_report(run)
    assert not (run / "report.html").exists()
