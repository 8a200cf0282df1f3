"""LoRA and Effort on timm's transformers: few trained parameters, the same answers first, plain weights at last."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtn_fast.errors import UsageError
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.model.adapt import AdaptedLinear, EffortLinear, effort_penalty, merged
from dtn_fast.model.build import TimmDetector, build_detector, load_detector, timm_config
from dtn_fast.model.config import Adaptation, TimmConfig
from dtn_fast.model.detector import Detector
from dtn_fast.model.fold import frozen
from dtn_fast.model.mas import HeadScale
from dtn_fast.train.config import FOUNDATION

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")  # queries, keys, values: as one
READS_THE_WEIGHT = "beit_base_patch16_224"  # does not call the layer
SIDE = 112


def config_of(name: str, how: Adaptation) -> TimmConfig:
    return dataclasses.replace(timm_config(name, SIDE), adaptation=how)


def made(name: str, how: Adaptation) -> Detector:
    torch.manual_seed(0)
    model = build_detector(config_of(name, how)).eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key:  # DINO's scales of each block, 1e-5 before they are trained
            nn.init.ones_(parameter)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def moved(model: Detector) -> Detector:
    """The model after a training of sorts."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "mas"), [(READS_THE_WEIGHT, False), *((name, mas) for name in NAMES for mas in (False, True))]
)
@pytest.mark.parametrize("adapt", ["lora", "effort"])
def test_the_answers_are_the_same_at_first_and_after_merging(name: str, adapt: str, mas: bool) -> None:
    x, how = images(), Adaptation(adapt, 0, mas)
    with torch.no_grad():
        model = made(name, how)
        begin = made(name, Adaptation())(x)
        torch.testing.assert_close(model(x), begin, rtol=0, atol=1e-5)
        after = moved(model)(x)
        assert not torch.allclose(after, begin, atol=1e-2)
        plain = frozen(model)
        torch.testing.assert_close(plain(x), after, rtol=0, atol=1e-5)
    assert not [m for m in plain.modules() if isinstance(m, AdaptedLinear | HeadScale)]
    assert set(plain.state_dict()) == set(made(name, Adaptation()).state_dict())
    assert [m for m in model.modules() if isinstance(m, AdaptedLinear)], "and the model itself goes on"


@pytest.mark.parametrize("adapt", ["lora", "effort"])
def test_what_is_trained(adapt: str) -> None:
    """Every trained parameter, and no other, gets a gradient and moves the answers."""
    model = made(NAMES[0], Adaptation(adapt, 2, True)).train()
    F.cross_entropy(moved(model)(images()), torch.tensor([0, 1])).backward()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if p.grad is not None}
    parts = {name.rsplit(".", 1)[-1] for name in names}
    assert parts == {"left", "right", "head_scale", "weight", "bias"} | ({"scale"} if adapt == "effort" else set())
    assert {n for n in names if n.endswith(("weight", "bias"))} == {"net.head.weight", "net.head.bias"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", FOUNDATION)
def test_few_parameters_of_a_vit_l_are_trained(preset: str) -> None:
    share = {"lora": 0.01, "effort": 0.001}
    for adapt in ("lora", "effort"):
        with torch.device("meta"):
            model = TimmDetector(
                dataclasses.replace(timm_config(FOUNDATION[preset], 256), adaptation=Adaptation(adapt))
            )
            assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 2)
        sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (1, 0)]
        assert 3e8 < sizes[1] < 3.3e8
        assert sizes[0] < share[adapt] * sizes[1]
    if preset == "clip":
        assert sizes[0] - 2 * 1025 == 24 * 4 * (1024 + 1024 + 1)  # "0.19M", as published


def test_lora_is_its_formula() -> None:
    """y = x W^T + b + x A^T B^T for each of the queries, keys and values."""
    torch.manual_seed(0)
    source, x = nn.Linear(12, 36), torch.randn(5, 7, 12)
    layer = AdaptedLinear(source, 3)
    layer.initialise()
    assert torch.equal(layer(x), source(x))
    with torch.no_grad():
        layer.left.normal_()
    parts = [(x @ a.T) @ b.T for a, b in zip(layer.right, layer.left, strict=True)]
    torch.testing.assert_close(layer(x), source(x) + torch.cat(parts, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)


def test_effort_trains_the_smallest_singular_values() -> None:
    torch.manual_seed(0)
    source = nn.Linear(12, 24).double()
    weight = source.weight.detach().clone()
    layer = EffortLinear(source, 2)
    layer.initialise()
    for block, whole in enumerate(weight.unflatten(0, (2, 12))):
        values = torch.linalg.svdvals(whole)
        torch.testing.assert_close(layer.scale[block].detach(), values[-2:], rtol=1e-4, atol=1e-6)
        kept = layer.base.detach().unflatten(0, (2, 12))[block]
        torch.testing.assert_close(torch.linalg.svdvals(kept)[:10], values[:10], rtol=1e-4, atol=1e-6)
        assert torch.linalg.svdvals(kept)[10:].max() < 1e-5
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_efforts_losses_are_their_formulas(rank: int) -> None:
    """||[U_r U]^T [U_r U] - 1||^2 + the same of V + | ||W||^2 - ||W_0||^2 |, here from whole matrices."""
    torch.manual_seed(0)
    source = nn.Linear(10, 20).double()
    weight = source.weight.detach().clone()
    layer = EffortLinear(source, rank)
    layer.initialise()
    assert layer.penalty() < 1e-4
    with torch.no_grad():
        for parameter in (layer.left, layer.right, layer.scale):
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = 0.0
    for block, whole in enumerate(weight.unflatten(0, (2, 10))):
        u, _, v = torch.linalg.svd(whole)
        left = torch.cat((u[:, : 10 - rank], layer.left[block]), 1)
        right = torch.cat((v[: 10 - rank], layer.right[block]))
        one = torch.eye(10).double()
        now = layer.weight.unflatten(0, (2, 10))[block]
        change = (now.square().sum() - whole.square().sum()).abs()
        expected += (left.T @ left - one).square().sum() + (right @ right.T - one).square().sum() + change
    torch.testing.assert_close(layer.penalty().double(), expected / 2, rtol=1e-3, atol=1e-4)


def test_the_penalty_is_efforts_alone() -> None:
    assert effort_penalty(made(NAMES[0], Adaptation("lora"))) is None
    model = made(NAMES[0], Adaptation("effort"))
    before, after = effort_penalty(model), effort_penalty(moved(model))
    assert before is not None
    assert after is not None
    assert before < 1e-4 < 1e-2 < after


def test_an_adapted_model_is_stored_and_read(tmp_path: Path) -> None:
    for adapt in ("lora", "effort"):
        model = moved(made(NAMES[0], Adaptation(adapt, 3, True)))
        model.save_pretrained(tmp_path)
        again = load_detector(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(images()), model(images()))
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("name", "how", "text"),
    [
        ("resnet10t", Adaptation("lora"), "resnet10t: cannot be adapted so: it has no attention"),
        ("resnet10t", Adaptation(mas=True), "resnet10t: cannot be adapted so"),
        (NAMES[0], Adaptation("effort", 500), "rank 500 is over its width 192; choose a ViT, or leave"),
    ],
)
def test_what_cannot_be_adapted_is_named(name: str, how: Adaptation, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        made(name, how)


def test_a_rank_without_an_adaptation_is_refused() -> None:
    with pytest.raises(UsageError, match="--rank: only with --adapt lora or effort"):
        Adaptation(rank=4)


def test_merging_leaves_other_models_alone() -> None:
    model = made(NAMES[0], Adaptation())
    assert torch.equal(merged(model)(images()), model(images()))


def test_every_classifier_of_a_model_with_several_is_trained() -> None:
    model = build_detector(
        dataclasses.replace(timm_config("deit_tiny_distilled_patch16_224", SIDE), adaptation=Adaptation("lora"))
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "head" in name} == {f"net.{head}.{part}" for head in ("head", "head_dist")
                                                            for part in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize("wrong", [None, {"adapt": "other"}, {"adapt": ["lora"]}, {"mas": "yes"}, {"rank": "8"}])
def test_a_damaged_adaptation_is_named(wrong: object) -> None:
    with pytest.raises(UsageError, match=r"here: not a valid TimmConfig .*[aA]daptation"):
        TimmConfig.from_json(json.dumps({"timm": NAMES[0], "adaptation": wrong}), "here")


def test_an_exported_file_holds_plain_weights(tmp_path: Path) -> None:
    graphs = []
    for how in (Adaptation(), Adaptation("lora", 2, True), Adaptation("effort", 2, True)):
        model = build_detector(TimmConfig("test_vit", 64, adaptation=how)).eval()
        export_onnx(moved(model), tmp_path / "m.onnx")  # compares it with torch
        graphs.append([node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node])
    assert graphs[1] == graphs[2] == graphs[0]
