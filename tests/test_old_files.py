"""Files written by an earlier version still load and give the answers that they gave then (tests/old_files, 0.1.0)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dtn_fast.data.crop_dataset import open_crop_dataset
from dtn_fast.runtime.load import load_scorer
from dtn_fast.train.distill import distill
from dtn_fast.train.log_lines import read_lines

DATA = Path(__file__).parent / "old_files"
THEN = json.loads((DATA / "logits.json").read_text(encoding="utf-8"))
DIGITS = 2e-5  # another processor sums in another order; the same one gives the same bits


def test_old_crops_hold_what_they_held() -> None:
    crops = open_crop_dataset(DATA / "crops", verify=True)
    assert crops.fingerprint(np.arange(len(crops.video))) == THEN["fingerprint"]
    assert crops.labels.tolist() == THEN["labels"]
    assert crops.synthetic


@pytest.mark.parametrize("name", ["run", "run/generation-0", "model.onnx", "model.mnn"])
def test_an_old_model_answers_as_it_did(name: str) -> None:
    crops = open_crop_dataset(DATA / "crops")
    scorer = load_scorer(DATA / name)
    logits = scorer.logits(crops.get(np.arange(len(crops.video))))
    assert np.abs(logits - np.array(THEN["logits"][name])).max() < DIGITS
    assert "synthetic" in scorer.notice


def test_an_old_run_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(DATA / "run", run)
    before = read_lines(run / "generation-1" / "metrics.jsonl")
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    recipe["recipe"]["epochs"] += 1
    (run / "recipe.json").write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    for _ in distill(run, open_crop_dataset(DATA / "crops")):
        pass
    after = read_lines(run / "generation-1" / "metrics.jsonl")
    assert after[:-1] == before
    assert [row["epoch"] for row in after] == [0, 1, 2]
