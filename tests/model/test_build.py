"""Detectors other than the DTN: saved, loaded, explained, refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import RECIPE

from dtn_fast import DTN
from dtn_fast.errors import DtnWarning, UsageError
from dtn_fast.explain.heatmap import grad_cam
from dtn_fast.model.build import TimmDetector, build_detector, load_detector, timm_config
from dtn_fast.model.config import CropPolicy, TimmConfig, parse_config
from dtn_fast.model.mas import HeadScale, with_mas
from dtn_fast.runtime.load import load_scorer
from dtn_fast.runtime.torch_scorer import TorchScorer
from dtn_fast.train.ablation_tables import ABLATIONS, configure
from dtn_fast.train.config import Recipe, choose_model
from dtn_fast.train.run_folder import load_run, start_run


@pytest.fixture
def timm():
    importlib.import_module("dtn_fast.model.timm_registry")  # first: it lets torchvision be imported beside a CPU torch
    return importlib.import_module("timm")


@pytest.mark.parametrize(
    ("name", "mapped"),
    [
        ("resnet10t", "backbone"),
        ("legacy_xception", "backbone"),
        ("vit_tiny_patch16_224", "last-block"),
        ("efficient_vit", "backbone"),
        ("swin_tiny_patch4_window7_224", ""),
    ],
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
    assert list(model.cam_layers()) == [mapped] * bool(mapped)
    if mapped:
        assert grad_cam(model.train(), crops).shape == (2, 64, 64)
        assert model.training
        (layer,) = model.cam_layers().values()
        assert not layer._forward_hooks, "looked for without a trace"
    else:
        with pytest.raises(ValueError, match="no map for Grad-CAM at any depth; it has none"):
            grad_cam(model, crops)
    with pytest.raises(ValueError, match=f"no map for Grad-CAM at gate; it has {mapped or 'none'}"):
        grad_cam(model, crops, "gate")


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
        '{"timm": "a", "image_size": "64"}',
        '{"timm": "a", "num_classes": 1}',
    ):
        with pytest.raises(UsageError):
            parse_config(text, "config.json")
    with pytest.raises(UsageError, match="no_such_model: timm cannot make it"):
        build_detector(TimmConfig("no_such_model"))
    model = build_detector(TimmConfig("resnet10t", image_size=64))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="extra is"):
        load_detector(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"no config\.json there"):
        load_detector(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"timm": "resnet18", "image_size": 64}))
    with pytest.raises(UsageError, match="belongs to another preset"):
        load_detector(tmp_path)


def test_a_timm_model_has_its_own_mean_and_deviation(tmp_path: Path) -> None:
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    imagenet = (TimmConfig.mean, TimmConfig.std)
    path = tmp_path / "model.json"
    for name, constants in (("legacy_xception", half), ("vit_b16", imagenet), ("no_such_model", imagenet)):
        made = timm_config(name, 96, CropPolicy(margin=1.7))
        assert (made.timm, made.image_size, made.crop) == (name, 96, CropPolicy(margin=1.7))
        assert (made.mean, made.std) == constants
        assert choose_model("tiny", None, name) == timm_config(name, 128)
        path.write_text(json.dumps({"timm": name, "image_size": 64}))
        assert choose_model("paper", path, "") == timm_config(name, 64)
        path.write_text(json.dumps({"timm": name, "mean": [0.1, 0.2, 0.3]}))
        stated = choose_model("paper", path, "")
        assert (stated.mean, stated.std) == ((0.1, 0.2, 0.3), constants[1])
    variant = next(v for v in ABLATIONS["cross-dataset"].variants if v.name == "Xception")
    config, _ = configure(variant, DTN().config, Recipe())
    assert (config.mean, config.std) == half


def test_a_timm_run_of_an_earlier_version_goes_on_with_its_constants(tmp_path: Path) -> None:
    before, now = TimmConfig("legacy_xception", 64), timm_config("legacy_xception", 64)
    start_run(tmp_path, RECIPE, before)
    (tmp_path / "generation-0").mkdir()
    (tmp_path / "generation-0" / "steps.jsonl").touch()
    with pytest.warns(DtnWarning, match="begun by an earlier version with ImageNet's mean"):
        start_run(tmp_path, RECIPE, now)
    assert load_run(tmp_path)[1] == before
    with pytest.raises(UsageError, match="holds a run with mean"):
        start_run(tmp_path, RECIPE, TimmConfig("legacy_xception", 64, mean=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "eva02_tiny_patch14_224",
        "xcit_nano_12_p16_224",
        "cait_xxs24_224",
    ],
)
def test_mas_in_any_vit(name: str, timm) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before, parameters = model(images), sum(p.numel() for p in model.parameters())
        model = with_mas(model)
        assert torch.equal(model(images), before)
        scales = [m.head_scale for m in model.modules() if isinstance(m, HeadScale)]
        assert len(scales) >= 12
        assert sum(p.numel() for p in model.parameters()) == parameters + sum(s.numel() for s in scales)
        scales[-1][0] = -100.0  # one head of the last block closed: its channels reach the projection as zeros
        inputs: list[torch.Tensor] = []
        last = [m for m in model.modules() if isinstance(m, HeadScale)][-1]
        handle = last.register_forward_hook(lambda module, arguments, output: inputs.append(output))
        closed = model(images)
        handle.remove()
        size = inputs[0].shape[-1] // len(scales[-1])
        assert not inputs[0][..., :size].any()
        assert inputs[0][..., size:].any()
        assert not torch.equal(closed, before)
    model(images).sum().backward()
    assert all(s.grad is not None and s.grad.isfinite().all() for s in scales)
    with pytest.raises(ValueError, match="has head scales already"):
        with_mas(model)


def test_mas_elsewhere(timm) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("vit_tiny_patch16_224", num_classes=2).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(with_mas(model, mas_init=1.5)(images), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no attention"):
        with_mas(timm.create_model("resnet10t"))


def test_gradient_checkpointing_of_timm_models() -> None:
    vit = build_detector(timm_config("vit_tiny_patch16_224", 64)).train()
    images, gradients = torch.randn(2, 3, 64, 64), []
    for _ in range(2):
        vit.zero_grad()
        vit(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
        vit.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(UsageError, match=r"resnet10t: has BN.*; leave --grad-checkpointing out"):
        build_detector(timm_config("resnet10t", 64)).set_grad_checkpointing()


def test_grad_cam_before_a_layer_that_works_in_place(timm) -> None:
    model = build_detector(TimmConfig("test_resnet", image_size=64)).eval()
    crops = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pool, found = model.net.global_pool, []
    for inplace in (False, True):
        negative = torch.nn.Threshold(0.5, -1.0, inplace)  # whatever the weights, it changes the map
        model.net.global_pool = torch.nn.Sequential(negative, pool)
        found.append(grad_cam(model, crops))
    assert np.array_equal(*found)
    model.net.layer4.register_forward_hook(lambda _module, _inputs, output: (output, output))
    model.net.global_pool.register_forward_pre_hook(lambda _module, given: given[0][:1])
    assert model.cam_layers() == {}, "a layer that gives no tensor"
