"""Detectors other than the DTN: saved, loaded, explained, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtn_fast import DTN
from dtn_fast.detectors import TimmConfig, TimmDetector, build_detector, load_detector, parse_config
from dtn_fast.errors import UsageError
from dtn_fast.explain import grad_cam
from dtn_fast.runtime import TorchScorer, load_scorer


@pytest.mark.parametrize(
    ("name", "mapped"),
    [("resnet10t", True), ("legacy_xception", True), ("vit_tiny_patch16_224", False), ("efficient_vit", False)],
)
def test_a_timm_model_is_a_detector(name: str, mapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_detector(TimmConfig(name, image_size=64)).eval()
    assert isinstance(model, TimmDetector)
    model.notice = "a test"
    model.save_pretrained(tmp_path / "model")
    again = load_detector(tmp_path / "model")
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert (again.notice, again.training, again.config) == ("a test", False, model.config)
    torch.testing.assert_close(model(images[1:2]), model(images)[1:2], rtol=1e-4, atol=1e-5)
    crops = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    scores = load_scorer(tmp_path / "model").score(crops)
    assert np.array_equal(scores, TorchScorer(model).score(crops))
    assert (model.cam_layer() is not None) == mapped
    if mapped:
        assert grad_cam(model.train(), crops).shape == (2, 64, 64)
        assert model.training
    else:
        with pytest.raises(ValueError, match="no map to weigh"):
            grad_cam(model, crops)


def test_efficient_vit_is_the_published_size() -> None:
    """104.167 M as the paper counts: without EfficientNet's convolutions and last BN, class token and positions."""
    model = TimmDetector(TimmConfig("efficient_vit", image_size=224)).net
    convolutions = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    left_out = [p for m in (*convolutions, model.backbone.bn2) for p in m.parameters()]
    counted = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in left_out)
    assert round((counted - model.token.numel() - model.positions.numel()) / 1e6, 3) == 104.167


def test_configurations_are_told_apart(tmp_path: Path) -> None:
    config = TimmConfig("resnet10t", image_size=96)
    assert parse_config(config.to_json(), "x") == config
    dtn = DTN().config
    assert parse_config(dtn.to_json(), "x") == dtn
    for text in (
        "[",
        '{"timm": 3}',
        '{"timm": "a", "nonsense": 1}',
        '{"nonsense": 1}',
        "3",
        '{"timm": "a", "image_size": 1}',
    ):
        with pytest.raises(UsageError):
            parse_config(text, "config.json")
    with pytest.raises(UsageError, match="no_such_model: timm cannot make it"):
        build_detector(TimmConfig("no_such_model"))
    model = build_detector(TimmConfig("resnet10t", image_size=64))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"timm": "resnet18", "image_size": 64}))
    with pytest.raises(UsageError, match="belongs to another preset"):
        load_detector(tmp_path)
