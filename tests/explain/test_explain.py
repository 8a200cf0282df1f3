"""Attention maps, their collapse, features, soft labels; the pictures drawn of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import FIGURES, FigureConfig
from dtn_fast.evaluation.figures import choose, draw
from dtn_fast.explain import internals
from dtn_fast.explain.heatmap import feature_map
from dtn_fast.explain.internals import (
    attention_maps,
    attentions,
    collapse,
    features,
    head_scales,
    soft_labels,
)
from dtn_fast.model.build import build_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.preprocess import normalise
from dtn_fast.train.config import Recipe


@pytest.fixture
def faces(dataset: CropDataset) -> np.ndarray:
    return dataset.get(np.arange(3))


def test_attention_maps_are_those_that_the_output_is_made_of(small: DTN, faces: np.ndarray) -> None:
    """Values mixed by the returned maps give what the attention itself gave."""
    attention = small.blocks[0].attention
    with torch.no_grad():
        attention.head_scale.copy_(torch.tensor([-1.0, 2.0]))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = attention.register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    maps = attention_maps(small, faces)
    handle.remove()
    assert maps.shape == (1, 3, 2, 4, 4)
    scales = head_scales(small)
    assert scales[0] == pytest.approx([1 / (1 + np.e), 1 / (1 + np.exp(-2))])
    assert maps.sum(-1) == pytest.approx(np.broadcast_to(scales[0][None, None, :, None], (1, 3, 2, 4)), abs=1e-5)
    tokens, out = seen[0]
    with torch.no_grad():
        values = attention.project(tokens).unbind(2)[2].transpose(1, 2)  # [B, H, N, D]
        mixed = (torch.from_numpy(maps[0]) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.out(mixed), out, rtol=1e-4, atol=1e-5)
    assert not attention._forward_hooks
    assert not small.training
    assert attention_maps(DTN(dataclasses.replace(SMALL, depth=0)), faces).size == 0


def test_mixed_maps_are_those_that_the_output_is_made_of(faces: np.ndarray) -> None:
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, mas=False, reattention=True)).eval()
    attention = model.blocks[0].attention
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = attention.register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    maps = attention_maps(model, faces)
    handle.remove()
    tokens, out = seen[0]
    with torch.no_grad():
        values = attention.project(tokens).unbind(2)[2].transpose(1, 2)
        mixed = (torch.from_numpy(maps[0]) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.out(mixed), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_b16_mas", "vit_b16_reattention", "cvit"])
def test_maps_of_other_transformers_are_those_that_the_output_is_made_of(name: str, faces: np.ndarray) -> None:
    torch.manual_seed(0)
    model = build_detector(TimmConfig(name, 64)).eval()
    blocks = attentions(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = blocks[0].register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    maps = attention_maps(model, faces)
    handle.remove()
    tokens, out = seen[0]
    with torch.no_grad():
        mixed = torch.from_numpy(maps[0]) @ blocks[0]._project(tokens)[2]
        torch.testing.assert_close(blocks[0].out(mixed.transpose(1, 2).flatten(2)), out, rtol=1e-4, atol=1e-5)
    assert head_scales(model).shape == ((12, 12) if name.endswith("mas") else (0, 0))
    assert len(collapse(maps)) == len(blocks)
    if name == "cvit":  # the published code divides by the root of the whole width, not of a head's
        with torch.no_grad():
            q, k, _ = blocks[0]._project(tokens)
            direct = (q @ k.transpose(2, 3) / 1024**0.5).softmax(3)
        torch.testing.assert_close(torch.from_numpy(maps[0]), direct, rtol=1e-4, atol=1e-6)


def test_collapse_is_one_for_equal_heads_and_falls_with_diversity() -> None:
    random = np.random.default_rng(0)
    one = random.random((1, 2, 1, 6, 6)).astype(np.float32)
    same = np.repeat(one, 4, axis=2) * np.array([1, 2, 3, 0.5], np.float32)[:, None, None]  # scales change nothing
    assert collapse(same) == pytest.approx([1.0])
    apart = np.zeros((1, 1, 2, 4, 4), np.float32)
    apart[0, 0, 0, :, 0] = apart[0, 0, 1, :, 1] = 1
    assert collapse(apart) == pytest.approx([0.0])
    assert 0 < collapse(random.random((3, 2, 4, 6, 6)).astype(np.float32)).min() < 1
    assert np.isnan(collapse(one)).all()


def test_features_are_what_the_classifier_sees(small: DTN, faces: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = small.forward_head(small.forward_features(normalise(faces, small.config)), pre_logits=True)
    monkeypatch.setattr(internals, "BATCH", 2)  # 3 crops in two batches
    assert features(small, faces) == pytest.approx(expected.numpy(), abs=1e-6)
    other = build_detector(TimmConfig("resnet10t", 64)).eval()
    assert features(other, faces).shape == (3, 512)
    two_heads = build_detector(TimmConfig("cross_efficient_vit", 64)).eval()
    seen = features(two_heads, faces)
    assert seen.shape == (3, 192 + 384)
    with torch.no_grad():
        layers = two_heads.classifiers()
        parts = torch.from_numpy(seen).split((192, 384), 1)
        logits = sum(layer(part) for layer, part in zip(layers, parts, strict=True))
        torch.testing.assert_close(logits, two_heads(normalise(faces, two_heads.config)), rtol=1e-4, atol=1e-5)
    said = soft_labels(small, faces, temperature=1.0)
    with torch.no_grad():
        assert said == pytest.approx(small(normalise(faces, small.config)).softmax(1).numpy(), abs=1e-6)
    assert np.abs(soft_labels(small, faces, 10.0) - 0.5).max() <= np.abs(said - 0.5).max()
    maps = feature_map(small, faces)
    assert maps.shape == (3, 64, 64)
    assert (maps.min(), maps.max()) == (0, 1)


def test_every_picture_is_drawn(small: DTN, dataset: CropDataset, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = DTN(dataclasses.replace(SMALL, mas=False)).eval()
    small.notice = "synthetic faces"
    models = {"with $MAS": small, "plain": plain, "cnn": build_detector(TimmConfig("resnet10t", 64)).eval()}
    faces, soft = choose(dataset, "test", 12), dict.fromkeys(models, Recipe.temperature)
    assert faces.titles[0] == "real"
    assert len(faces.few) == 1 + len(dataset.methods)
    assert list(draw(models, faces, tmp_path, FIGURES, soft)) == list(FIGURES)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"grad-cam.png", "attention.png", "scales.svg", "collapse.svg", "feature-maps.png", "t-sne.svg",
                     "soft-labels.png", "figures.json"}  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["notice"] == "trained on synthetic faces"
    assert set(figures["collapse"]) == {"with $MAS", "plain"}
    attentive = ["attention", "scales", "collapse", "feature-maps"]
    absent = {kind: ["plain", "cnn"] if kind == "scales" else ["cnn"] for kind in attentive}
    assert figures["left out"] == {kind: absent.get(kind, []) for kind in FIGURES}
    assert list(figures["scales"]) == ["with $MAS"]
    assert len(figures["t-sne"]["cnn"]["points"]) == len(faces.many)
    assert len(figures["soft-labels"]["plain"]["real, fake"]) == len(faces.few)
    assert figures["soft-labels"]["plain"]["temperature"] == Recipe.temperature
    again = tmp_path / "again"
    list(draw(models, faces, again, FIGURES, soft))
    for name in names:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name} differs from run to run"
    list(draw(models, faces, again, ("scales", "soft-labels"), {**soft, "plain": 5.0}))  # the other figures stay
    kept = json.loads((again / "figures.json").read_text())
    assert kept["collapse"] == figures["collapse"]
    assert kept["soft-labels"]["plain"]["temperature"] == 5
    vit = {"vit": build_detector(TimmConfig("vit_b16", 64)).eval()}
    list(draw(vit, faces, again, ("attention", "scales"), {}))
    assert (again / "attention.png").read_bytes() != (tmp_path / "attention.png").read_bytes()
    assert not (again / "scales.svg").exists()  # it has none, and the other models' is not its own
    none = tmp_path / "none"
    list(draw({"cnn": models["cnn"]}, faces, none, ("attention", "soft-labels"), soft))
    assert {path.name for path in none.iterdir()} == {"soft-labels.png", "figures.json"}
    with pytest.raises(UsageError, match="unknown figure 'portrait'"):
        FigureConfig(("portrait",))
    with pytest.raises(UsageError, match="holds no crops"):
        choose(dataset, "nowhere", 3)
