"""The DTN as a model of timm's registry: what timm's own tests ask of a model, and more."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dtn_fast import DTN
from dtn_fast.errors import UsageError
from dtn_fast.model.fold import fold
from dtn_fast.model.levt import LEVTBlock
from dtn_fast.model.timm_compat import import_timm

timm = import_timm()
create_optimizer_v2 = importlib.import_module("timm.optim").create_optimizer_v2
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TIMM_FIRST = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")  # a torchvision that fits torch has them
if not hasattr(torch.ops.torchvision, "nms"):
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
assert not timm.list_models("dtn*")
import dtn_fast
"""


def made(name: str = "dtn_tiny", **how: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **how)


PROBED = "import dtn_fast, importlib.util\nassert importlib.util.find_spec('timm')\nimport timm"  # as transformers does


@pytest.mark.parametrize(
    "begin", ["import dtn_fast, sys\nassert 'timm' not in sys.modules\nimport timm", PROBED, TIMM_FIRST]
)
def test_either_may_be_imported_first(begin: str) -> None:
    program = f"{begin}\nprint(len(timm.list_models('dtn*')), len(timm.list_models('cvit*')))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "2 3\n", run.stderr


@pytest.mark.parametrize("how", [{}, {"backbone": "resnet10t"}, {"in_chans": 4}, {"drop_rate": 0.5}])
def test_every_parameter_gets_a_gradient(how: dict[str, Any]) -> None:
    model = made(num_classes=42, img_size=64, **how).train()
    channels = how.get("in_chans", 3)
    outputs = model(torch.randn(2, channels, 64, 64))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["dtn_tiny", "dtn_paper"])
def test_its_record_is_true(name: str) -> None:
    model = made(name).eval()
    cfg, names = model.default_cfg, set(model.state_dict())
    images = torch.randn(1, *cfg["input_size"])
    assert f"{cfg['classifier']}.weight" in names
    assert f"{cfg['first_conv']}.weight" in names
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape[-2:] == cfg["pool_size"]
        model.reset_classifier(0)
        assert torch.equal(model(images), features.mean((2, 3)))
        assert model(images).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        assert made(name, num_classes=0, global_pool="").eval()(images).shape == features.shape


def test_a_model_of_other_channels_is_folded() -> None:
    model, images = made(in_chans=4, img_size=64).eval(), torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_model_without_its_classifier_is_no_checkpoint(tmp_path: Path) -> None:
    for model in (made(num_classes=0), made(num_classes=1), made(in_chans=1)):
        with pytest.raises(UsageError, match="is no detector; store its state_dict"):
            model.save_pretrained(tmp_path)
    model = made().eval()
    model.reset_classifier(3)
    model.save_pretrained(tmp_path)
    assert torch.equal(DTN.from_pretrained(tmp_path)(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="'avg', or '' without classes"):
        model.reset_classifier(3, "")


@pytest.mark.parametrize(("how", "widths"), [({}, (16, 32, 48, 96, 128)), ({"backbone": "resnet10t"}, (128,))])
def test_its_maps(how: dict[str, Any], widths: tuple[int, ...]) -> None:
    model, body = made(**how).eval(), made(features_only=True, **how).eval()
    assert tuple(body.feature_info.channels()) == widths
    outputs, strides = body(IMAGES), body.feature_info.reduction()
    assert [tuple(o.shape) for o in outputs] == [
        (2, width, 64 // stride, 64 // stride) for width, stride in zip(widths, strides, strict=True)
    ]
    seen: dict[str, torch.Tensor] = {}
    for info in model.feature_info:
        layer = model.get_submodule(info["module"])
        layer.register_forward_hook(lambda _m, _i, out, key=info["module"]: seen.update({key: out}))
    last, maps = model.forward_intermediates(IMAGES)
    assert torch.equal(last, model.forward_features(IMAGES))
    for info, found, expected in zip(model.feature_info, maps, outputs, strict=True):
        assert torch.equal(found, seen[info["module"]])
        assert torch.equal(found, expected)


def test_some_of_its_maps() -> None:
    model = made().eval()
    every = model.forward_intermediates(IMAGES, intermediates_only=True)
    for indices, wanted in ((2, (3, 4)), ((1, 3), (1, 3)), ((-1,), (4,))):
        found = model.forward_intermediates(IMAGES, indices, stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, every[place]) for a, place in zip(found, wanted, strict=True))
    short = made(features_only=True, out_indices=(1, 3)).eval()
    assert all(torch.equal(a, every[place]) for a, place in zip(short(IMAGES), (1, 3), strict=True))
    assert len(list(short.parameters())) < len(list(model.parameters()))
    wrong: list[Any] = [6, 0, (5,), ()]
    for indices in wrong:
        with pytest.raises(ValueError, match="the model has the maps 0 to 4"):
            model.forward_intermediates(IMAGES, indices)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(IMAGES, output_fmt="NLC")
    with pytest.raises(ValueError, match="64x65"):
        model.forward_intermediates(torch.randn(1, 3, 64, 65))


def test_a_symbolic_trace_computes_the_same() -> None:
    features = timm.models._features_fx
    model = made().eval()
    last = features.get_graph_node_names(model)[1][-1]
    traced = features.create_feature_extractor(model, [last])
    for side in (64, 96):
        images = torch.randn(1, 3, side, side)
        assert torch.equal(traced(images)[last], model(images))


def test_layers_are_ordered_by_depth() -> None:
    for how, groups in (({}, 5), ({"backbone": "resnet10t"}, 1)):
        model = made(**how)
        for coarse in (False, True):
            found = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
            assert set(found) == {name for name, _ in model.named_parameters()}
            first, last = min(found.values()), max(found.values())
            assert found["backbone.0.weight" if groups > 1 else "backbone.0.body.conv1.0.weight"] == first
            assert found["head.weight"] == last == found["head.bias"]
            assert [n for n, layer in found.items() if layer == last] == ["head.weight", "head.bias"]
            assert found["gate.w1"] == found["pos_embed"] < found["blocks.0.mlp.0.weight"]
            assert last == (3 if coarse else groups + 1 + model.config.depth)
    groups_of = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    decayed = {id(p) for group in groups_of if group["weight_decay"] for p in group["params"]}
    assert id(model.pos_embed) not in decayed
    assert id(model.blocks[0].attention.head_scale) not in decayed
    assert id(model.blocks[0].mlp[0].weight) in decayed


@pytest.mark.parametrize("how", [{}, {"noise_std": 0.0, "drop_path_rate": 0.5}, {"backbone": "resnet10t"}])
def test_checkpointing_changes_nothing(how: dict[str, Any]) -> None:
    """Neither values nor gradients nor, though the forward pass runs twice, the running statistics of BN."""
    plain, spare = made(**how).train(), made(**how).train()
    spare.set_grad_checkpointing()
    for model in (plain, spare):
        torch.manual_seed(1)
        for _ in range(2):
            model(IMAGES).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), spare.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.state_dict().items(), spare.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    kept: list[int] = []
    for model in (plain, spare):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(IMAGES)
        kept.append(-1)
    first = kept.index(-1)
    assert sum(kept[first + 1 :]) < sum(kept[:first]) / 2
    spare.set_grad_checkpointing(False)
    assert not any(getattr(module, "grad_checkpointing", False) for module in spare.modules())


def test_blocks_are_left_out_at_their_rate() -> None:
    model = made(drop_path_rate=0.5).train()
    assert [block.drop_path_rate for block in model.blocks] == [0.0, 0.5]
    block, x = model.blocks[1], torch.randn(400, 128, 1, 1)
    assert isinstance(block, LEVTBlock)
    torch.manual_seed(0)
    y = block(x)
    left = (y == x).flatten(1).all(1)
    assert 0.4 < left.float().mean() < 0.6
    whole = copy.deepcopy(block)
    whole.drop_path_rate = 0.0
    torch.testing.assert_close(y[~left], (x + 2 * (whole(x) - x))[~left], rtol=1e-4, atol=1e-5)
    whole.load_state_dict(block.state_dict())  # the running statistics too
    assert torch.equal(block.eval()(x), whole.eval()(x))


def test_it_travels_as_timms_models_do(tmp_path: Path) -> None:
    model = made(num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    state = {"state_dict": model.state_dict()}
    other = made(pretrained=True, num_classes=5, pretrained_cfg_overlay=state)  # another head, the same body
    assert torch.equal(other.backbone[0].weight, model.backbone[0].weight)
    with pytest.raises(UsageError, match="no pretrained weights"):
        made(pretrained=True)
