"""Grad-CAM at every depth, attention maps, their collapse, features, soft labels; the pictures drawn of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SMALL

from dtn_fast import DTN
from dtn_fast.data.crop_dataset import CropDataset
from dtn_fast.data.pictures import read_image
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.config import FIGURES, FigureConfig
from dtn_fast.evaluation.figures import choose, draw
from dtn_fast.explain import internals
from dtn_fast.explain.heatmap import (
    NO_EVIDENCE,
    NO_MAP,
    UNEXPLAINED,
    Heat,
    feature_map,
    grad_cam,
    grad_cams,
    heat_maps,
    overlay,
)
from dtn_fast.explain.internals import (
    attention_maps,
    attentions,
    collapse,
    features,
    head_scales,
    regions,
    soft_labels,
)
from dtn_fast.model.build import build_detector
from dtn_fast.model.config import TimmConfig
from dtn_fast.model.detector import Depth, patch_side
from dtn_fast.model.preprocess import normalise
from dtn_fast.train.config import Recipe


@pytest.fixture
def faces(dataset: CropDataset) -> np.ndarray:
    return dataset.get(np.arange(3))


def by_formula(maps: torch.Tensor, rest: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Grad-CAM of fake over real at ``maps`` [B, C, h, w], from which ``rest`` makes the logits; [B, 64, 64]."""
    maps = maps.detach().requires_grad_()
    logits = rest(maps)
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), maps)
    heat = torch.einsum("bc,bchw->bhw", gradient.mean((2, 3)), maps.detach()).relu()
    heat = F.interpolate(heat[:, None], (64, 64), mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-30)).numpy()


def test_grad_cam_at_every_depth(faces: np.ndarray) -> None:
    """Each depth is the place in Eq. 8 that it is named after; at the head the map is the class activation map."""
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, depth=2)).eval()
    for parameter in model.parameters():  # none of the maps may be blank, nor BN and scales an identity
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = normalise(faces, model.config)
    last = model.blocks[-1]
    with torch.no_grad():
        pooled = model.backbone(x)
        gated = model.gate(pooled)
        before = model.blocks[:-1](gated + model.pos_embed)
        tokens = last.norm1(before).flatten(2).transpose(1, 2)
        added = last.local(last.attention(tokens).transpose(1, 2).unflatten(2, before.shape[2:]))
        final = model.forward_features(x)
    finish = lambda y: model.forward_head(y + last.mlp(last.norm2(y)))
    expected = {
        "gate": by_formula(gated, lambda m: model.forward_head(model.blocks(m + model.pos_embed))),
        "last-block": by_formula(added, lambda m: finish(before + m)),
        "head": by_formula(final, model.forward_head),
    }
    found = {depth: grad_cam(model, faces, depth) for depth in model.cam_layers()}
    at_once = grad_cams(model, faces)
    assert list(at_once) == list(found)
    assert all(np.array_equal(at_once[depth], found[depth]) for depth in found), "one pass gives the same maps"
    backwards = grad_cams(model, faces, ("head", "backbone"))
    assert all(np.array_equal(backwards[depth], found[depth]) for depth in ("head", "backbone"))
    assert list(found) == ["backbone", *expected]
    assert np.array_equal(grad_cam(model, faces), found["backbone"])
    for depth, heat in expected.items():
        assert heat.any(), f"{depth}: blank, which shows nothing"
        assert found[depth] == pytest.approx(heat, abs=1e-4), depth
    for one, other in combinations(found, 2):
        assert np.abs(found[one] - found[other]).max() > 0.05, f"{one} and {other} are the same map"
    weights = (model.head.weight[1] - model.head.weight[0]).detach()
    activation = F.interpolate(torch.einsum("c,bchw->bhw", weights, final).relu()[:, None], (64, 64), mode="bilinear")
    activation /= activation.amax((2, 3), keepdim=True).clamp_min(1e-30)
    assert found["head"] == pytest.approx(activation[:, 0].numpy(), abs=1e-4)
    bare = DTN(dataclasses.replace(SMALL, depth=0, num_experts=0)).eval()
    assert list(bare.cam_layers()) == ["backbone", "gate", "head"]
    whole = lambda m: bare.forward_head(m + bare.pos_embed)
    assert grad_cam(bare, faces, "gate") == pytest.approx(by_formula(bare.backbone(x), whole), abs=1e-4)
    with pytest.raises(ValueError, match="at last-block; it has backbone, gate, head"):
        grad_cam(bare, faces, "last-block")


def test_grad_cam_of_a_vit_leaves_out_its_class_token(faces: np.ndarray) -> None:
    torch.manual_seed(0)
    model = build_detector(TimmConfig("vit_tiny_patch16_224", 64)).eval()
    torch.nn.init.normal_(model.net.head.weight)
    seen: list[torch.Tensor] = []
    handle = model.net.blocks[-1].norm1.register_forward_hook(lambda _m, _given, out: seen.append(out) or out)
    logits = model(normalise(faces, model.config))
    handle.remove()
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), seen[0])
    assert gradient[:, 1:].any(), "the patches act on the class token"
    heat = torch.einsum("bc,bnc->bn", gradient[:, 1:].mean(1), seen[0][:, 1:]).relu().detach()
    heat = F.interpolate(heat.reshape(-1, 1, 4, 4), (64, 64), mode="bilinear")[:, 0]
    expected = heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-30)
    assert grad_cam(model, faces) == pytest.approx(expected.numpy(), abs=1e-4)
    assert [patch_side(n) for n in (64, 65, 197, 201, 2, 60, 0)] == [8, 8, 14, 14, 1, 0, 0]


def blind(weight: float, positions: float = 0.0) -> DTN:
    """A network whose head sums its map with one ``weight`` for fake, after ``positions`` was added everywhere."""
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, depth=0, num_experts=0)).eval()
    model.head.weight.data.zero_()[1] = weight
    model.pos_embed.data.fill_(positions)
    return model


def test_a_face_has_the_deepest_map_that_shows_a_region(faces: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    faces[:, :, 32:] = 0  # so that no map is even
    shown = heat_maps(model := blind(1.0), faces)
    maps = grad_cams(model, faces)
    assert [heat.depth for heat in shown] == ["head"] * 3
    for row, heat in enumerate(shown):
        assert np.array_equal(heat.map, maps["head"][row])
        assert heat.reason == ""
    pushed = blind(1.0, -1e3)  # no position's sum is over 0 at the head; before the positions are added, all are
    maps = grad_cams(pushed, faces)
    assert not maps["head"].any()
    for row, heat in enumerate(heat_maps(pushed, faces)):
        assert heat.depth == "gate"
        assert np.array_equal(heat.map, maps["gate"][row])
    for weight in (0.0, -1.0):  # a constant; less evidence is more fake
        assert heat_maps(blind(weight), faces) == [Heat(None, None, NO_EVIDENCE)] * 3
    even = blind(1.0, 1e6)
    monkeypatch.setattr(even, "cam_layers", lambda: {"head": even.blocks})
    assert grad_cams(even, faces)["head"].min() > 0.99
    assert heat_maps(even, faces) == [Heat(None, None, UNEXPLAINED)] * 3
    monkeypatch.setattr(even, "cam_layers", dict)
    assert [heat.reason for heat in heat_maps(even, faces)] == [NO_MAP] * 3


def test_a_map_follows_the_weights_after_it(faces: np.ndarray) -> None:
    """Randomising the weights after a place changes its map (Adebayo et al., 2018): it is no picture of the face."""
    torch.manual_seed(0)
    model = DTN(SMALL).eval()
    torch.nn.init.normal_(model.head.weight)
    before = grad_cams(model, faces)
    after: dict[Depth, list[np.ndarray]] = {}
    for seed in range(1, 5):
        torch.manual_seed(seed)
        for parameter in [*model.blocks.parameters(), *model.head.parameters()]:
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        for depth, heats in grad_cams(model, faces).items():
            after.setdefault(depth, []).append(heats)
    for place, random in after.items():
        apart = [np.abs(heats - before[place]).mean((1, 2)) for heats in random]
        assert np.mean(apart) > 0.2, f"{place}: {np.round(apart, 2)}"


def test_a_blank_heat_map_says_so_on_the_picture() -> None:
    for side in (16, 64, 256):
        crop = np.full((side, side, 3), 200, np.uint8)
        said = overlay(crop, np.zeros((side, side), np.float32))
        assert said.shape == crop.shape
        assert not np.array_equal(said, crop)
        assert (crop == 200).all(), "the crop itself is not written on"
        assert np.array_equal(said[:, :, 0], said[:, :, 1]), "in white"
        assert not np.array_equal(said, overlay(crop, np.zeros((side, side), np.float32), "another reason"))
    assert (said[:200] == 200).all(), "the face stays visible"
    heat = np.zeros((256, 256), np.float32)
    heat[0, 0] = 1
    assert (overlay(crop, heat)[1:] == 200).all(), "a map that shows something has no text"


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


def test_regions_are_the_share_of_tokens_that_heads_look_at() -> None:
    spots = np.zeros((3, 2, 2, 8, 8), np.float32)
    spots[0] = 1 / 8  # everywhere
    spots[1, :, :, :, 0] = 1  # one token
    spots[2, :, 0, :, 0], spots[2, :, 1, :, :4] = 1, 1 / 4  # one head a token, the other four
    assert regions(spots) == pytest.approx([1, 1 / 8, (1 + 4) / 2 / 8])
    scales = np.array([0.1, 5], np.float32)[:, None, None]
    assert regions(spots * scales) == pytest.approx(regions(spots)), "scales change nothing"
    diagonal = np.eye(8, dtype=np.float32)[None, None, None]
    assert regions(diagonal) == pytest.approx([1]), "each query another token: all of them"
    assert regions(-spots) == pytest.approx(regions(spots)), "mixed weights may be negative"


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
    faces, soft = choose({"x": dataset}, "test", 12), dict.fromkeys(models, Recipe.temperature)
    assert faces.titles == ["real", *dataset.methods]
    assert faces.fake == [False] + [True] * len(dataset.methods)
    assert len(faces.few) == 1 + len(dataset.methods)
    assert list(draw(models, faces, tmp_path, FigureConfig(), soft)) == list(FIGURES)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"grad-cam.png", "attention.png", "scales.svg", "collapse.svg", "collapse-maps.png",
                     "feature-maps.png", "t-sne.svg", "soft-labels.png", "figures.json"}  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["notice"] == "trained on synthetic faces"
    assert set(figures["collapse"]) == {"with $MAS", "plain"}
    maps = attention_maps(small, faces.many)  # all twelve: fewer than the sixteen that are measured at most
    assert figures["collapse"]["with $MAS"] == {
        "tokens": 4, "mean cosine between heads": pytest.approx(collapse(maps), abs=1e-5),
        "share of tokens looked at": pytest.approx(regions(maps), abs=1e-5),
    }  # fmt: skip
    assert figures["grad-cam"]["depths"] == ["backbone", "gate", "last-block", "head"]
    heats = {(n, d): grad_cam(model, faces.few, d) for n, model in models.items() for d in model.cam_layers()}
    blank = {(*which, faces.titles[face]) for which, heat in heats.items() for face in range(5) if not heat[face].any()}
    assert {(b["model"], b["depth"], b["face"]) for b in figures["grad-cam"]["blank"]} == blank
    assert 0 < len(blank) < 9 * len(faces.few), "some maps of fresh models are blank, some are not"
    attentive = ["attention", "scales", "collapse", "feature-maps"]
    absent = {kind: ["plain", "cnn"] if kind == "scales" else ["cnn"] for kind in attentive}
    assert figures["left out"] == {kind: absent.get(kind, []) for kind in FIGURES}
    assert list(figures["scales"]) == ["with $MAS"]
    assert len(figures["t-sne"]["cnn"]["points"]) == len(faces.many)
    assert len(figures["soft-labels"]["plain"]["real, fake"]) == len(faces.few)
    assert figures["soft-labels"]["plain"]["temperature"] == Recipe.temperature
    again = tmp_path / "again"
    list(draw(models, faces, again, FigureConfig(), soft))
    for name in names:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), f"{name} differs from run to run"
    two = FigureConfig(("scales", "soft-labels"))
    list(draw(models, faces, again, two, {**soft, "plain": 5.0}))  # the other figures stay
    kept = json.loads((again / "figures.json").read_text())
    assert kept["collapse"] == figures["collapse"]
    assert kept["soft-labels"]["plain"]["temperature"] == 5
    vit = {"vit": build_detector(TimmConfig("vit_b16", 64)).eval()}
    list(draw(vit, faces, again, FigureConfig(("attention", "scales")), {}))
    assert (again / "attention.png").read_bytes() != (tmp_path / "attention.png").read_bytes()
    assert not (again / "scales.svg").exists()  # it has none, and the other models' is not its own
    none = tmp_path / "none"
    list(draw({"cnn": models["cnn"]}, faces, none, FigureConfig(("attention", "soft-labels")), soft))
    assert {path.name for path in none.iterdir()} == {"soft-labels.png", "figures.json"}
    with pytest.raises(UsageError, match="unknown figure 'portrait'"):
        FigureConfig(("portrait",))
    with pytest.raises(UsageError, match="holds no crops"):
        choose({"x": dataset}, "nowhere", 3)
    for depths, said in (((), "at least one"), (("head", "head"), "each once"), (("neck",), "unknown; there are")):
        with pytest.raises(UsageError, match=said):
            FigureConfig(depths=depths)


def test_several_datasets_stand_side_by_side(small: DTN, dataset: CropDataset, tmp_path: Path) -> None:
    """Figure 9: the same models on faces of every dataset, each named after its own."""
    some = dataclasses.replace(dataset, videos=[v._replace(method="fake" if v.label else "") for v in dataset.videos])
    faces = choose({"FF++": dataset, "DFDC": some}, "test", 5)
    assert faces.titles == ["FF++: real", *(f"FF++: {m}" for m in dataset.methods), "DFDC: real", "DFDC: fake"]
    assert faces.fake == [title[-4:] != "real" for title in faces.titles]
    assert len(faces.few) == len(faces.titles)
    rows = dataset.select("test")
    real, fake = (rows[dataset.labels[rows] == label][0] for label in (0, 1))
    assert np.array_equal(faces.few[-2:], dataset.get(np.array([real, fake])))
    assert len(faces.many) == len(faces.kinds) == 2 * 5
    assert {kind.split(":")[0] for kind in faces.kinds[:5]} == {"FF++"}
    config = FigureConfig(("grad-cam", "feature-maps", "t-sne", "soft-labels"), depths=("head",))
    list(draw({"DTN": small}, faces, tmp_path, config, {"DTN": 1.0}))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["t-sne"]["DTN"]["kinds"] == faces.kinds
    assert len(figures["soft-labels"]["DTN"]["real, fake"]) == len(faces.titles)
    assert figures["grad-cam"]["depths"] == ["head"]
    shape = lambda kind: read_image(tmp_path / f"{kind}.png").shape
    assert shape("feature-maps")[1] > 2 * shape("feature-maps")[0], "a column for each face, a row for each model"
    assert shape("grad-cam")[0] > 2 * shape("grad-cam")[1], "a row for each face"
