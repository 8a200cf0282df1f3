"""Files written by an earlier version still load and give the answers that they gave then (tests/old_files, 0.1.0)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dtn_fast.data.crop_dataset import full_fingerprint, open_crop_dataset
from dtn_fast.detect.config import DetectConfig
from dtn_fast.detect.pipeline import finder_of
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.export.pipeline import export
from dtn_fast.model.config import CropPolicy, DTNConfig, parse_config
from dtn_fast.runtime.load import load_model, load_scorer
from dtn_fast.train.config import Recipe
from dtn_fast.train.distill import distill
from dtn_fast.train.log_lines import read_lines
from dtn_fast.train.run_folder import load_run

DATA = Path(__file__).parent / "old_files"
THEN = json.loads((DATA / "logits.json").read_text(encoding="utf-8"))
DIGITS = 2e-5  # another processor sums in another order; the same one gives the same bits


def test_old_crops_hold_what_they_held() -> None:
    crops = open_crop_dataset(DATA / "crops", verify=True)
    now = crops.fingerprint(np.arange(len(crops.video)))
    assert full_fingerprint(THEN["fingerprint"], now) == now
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


def test_an_old_recipe_means_what_it_meant() -> None:
    """What it does not say is what was done then, not today's default."""
    recipe, _ = load_run(DATA / "run")
    now = Recipe()
    then = {"center_weight_decay": 1e-4, "student_centers": "new", "gain": "any", "student_warmup": 0.0}
    assert {name: getattr(recipe, name) for name in then} == then
    assert all(getattr(now, name) != value for name, value in then.items())
    assert (recipe.center_lr, recipe.student_lr) == (None, 1.0)


def test_an_old_noise_is_as_strong_as_it_was() -> None:
    """One field was the strength of every noise."""
    config = parse_config((DATA / "run" / "generation-0" / "config.json").read_text(), "x")
    assert isinstance(config, DTNConfig)
    assert (config.noise_std, config.noise_strength) == (0.1, 0.1)
    assert DTNConfig().noise_std != 0.1
    blur = parse_config(json.dumps({"noise": "blur", "noise_std": 0.3}), "x")
    assert isinstance(blur, DTNConfig)
    assert blur.noise_strength == 0.3


def test_what_an_old_file_does_not_say_is_taken_as_dlib_and_told() -> None:
    """Earlier versions knew no crop policy: their crops are dlib's, and their models' are taken for such."""
    crops, model = open_crop_dataset(DATA / "crops"), load_scorer(DATA / "run")
    assert crops.crop == CropPolicy("dlib", 1.3, "none")
    for name in ("run", "model.onnx", "model.mnn"):
        assert load_scorer(DATA / name).config.crop is None
    crops.check_fits(model.config, "it")
    with pytest.warns(DtnWarning, match=r"it: no crop policy is stored in it; taken as dlib at margin 1\.3"):
        crops.tell_differences(model.config, "it")
    with pytest.warns(DtnWarning, match="records no crop policy"):
        finder_of(model, DetectConfig())
    wide = json.loads((DATA / "run" / "generation-0" / "config.json").read_text()) | {"margin": 1.7}
    assert parse_config(json.dumps(wide), "x").crop == CropPolicy(margin=1.7)


def test_a_policy_travels_with_every_file(tmp_path: Path) -> None:
    policy = CropPolicy("yunet", 1.5, "landmarks")
    model = load_model(DATA / "run")
    model.config = dataclasses.replace(model.config, crop=policy)
    model.save_pretrained(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "model.onnx")
    export(tmp_path / "checkpoint", tmp_path / "model.mnn")
    crops = open_crop_dataset(DATA / "crops")
    for name in ("checkpoint", "model.onnx", "model.mnn"):
        config = load_scorer(tmp_path / name).config
        assert config.crop == policy
        with pytest.raises(UsageError, match=r"it: takes crops of margin 1\.5, these have 1\.3"):
            crops.check_fits(config, "it")
        fitting = dataclasses.replace(crops, crop=CropPolicy("dlib", 1.5, "landmarks"))
        fitting.check_fits(config, "it")
        with pytest.warns(DtnWarning, match="trained on crops by yunet, these are by dlib"):
            fitting.tell_differences(config, "it")
        upright = dataclasses.replace(crops, crop=CropPolicy("yunet", 1.5))
        with pytest.raises(UsageError, match="takes crops with --align landmarks, these have none"):
            upright.check_fits(config, "it")


@pytest.mark.parametrize(
    ("crop", "match"),
    [
        ({"finder": "haar"}, "CropPolicy.finder is 'haar'"),
        ({"margin": 0}, "CropPolicy.margin is 0"),
        ({"margin": "1"}, "CropPolicy.margin is '1'"),
        ({"align": 5}, "CropPolicy.align is 5"),
        ({"size": 3}, "not a valid CropPolicy"),
        (7, "crop is 7"),
    ],
)
def test_a_damaged_policy_is_named(crop: object, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_config(json.dumps({"crop": crop}), "config.json")
