"""The model against the paper's tables, its shapes, its errors, its files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small import SMALL
from torch import nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.mac_count import count
from dtn_fast.kernels.ops import moe_gate
from dtn_fast.model.backbone import Backbone
from dtn_fast.model.fold import fold
from dtn_fast.model.moe_gate import MoEGate

PAPER = [  # depth, local connection, M parameters, GMAC at 256x256 (Tables 7 and 8)
    (4, True, "23.590", 9.393),
    (5, True, "26.751", 9.596),
    (6, True, "29.912", 9.799),
    (7, True, "33.073", 10.002),
    (6, False, "29.876", 9.796),
]


@pytest.mark.parametrize(("depth", "local", "parameters", "gmac"), PAPER)
def test_counts_of_the_paper(depth: int, local: bool, parameters: str, gmac: float) -> None:
    counted = count(DTNConfig.preset("paper", depth=depth, local_connection=local))
    assert f"{counted.layer_parameters / 1e6:.3f}" == parameters
    assert counted.macs / 1e9 == pytest.approx(gmac, rel=0.002)


def test_whole_count_and_backbone() -> None:
    assert count(DTNConfig()).parameters == 29_945_206
    with torch.device("meta"):
        model = DTN()
    assert sum(p.numel() for p in model.backbone.parameters()) == 10_813_248
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 3_161_088 + 8


@pytest.mark.parametrize("side", [(64, 64), (32, 96), (128, 64)])
def test_any_multiple_of_32(small: DTN, side: tuple[int, int]) -> None:
    assert small(torch.randn(2, 3, *side)).shape == (2, 2)


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (torch.zeros(1, 3, 65, 64), "65x64"),
        (torch.zeros(1, 1, 64, 64), r"\(1, 1, 64, 64\)"),
        (torch.zeros(3, 64, 64), r"\(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_input_is_named(small: DTN, images: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        small(images)


def test_identical_images_get_identical_logits(small: DTN) -> None:
    image = torch.randn(1, 3, 64, 64)
    logits = small(image.expand(5, -1, -1, -1))
    assert torch.allclose(logits, small(image).expand(5, -1), atol=1e-6)


def test_noise_only_in_training(small: DTN) -> None:
    x = torch.randn(2, 64, 2, 2)
    assert torch.equal(small.gate(x), small.gate(x))
    small.gate.train()
    assert not torch.equal(small.gate(x), small.gate(x))


def test_heads_may_be_parted_before_their_projections() -> None:
    """Eq. 16-19 to the letter: each head sees its own channels alone, and Table 9's 3.161 M per block are missed."""
    torch.manual_seed(0)
    model = DTN(dataclasses.replace(SMALL, partition="before")).eval()
    tokens, attention = torch.randn(2, 4, 64), model.blocks[0].attention
    packed = attention.project(tokens)  # [B, N, 3, H, D]
    for part in range(3):
        for head in range(2):
            own = tokens[..., 32 * head : 32 * (head + 1)] @ attention.qkv.matrices[part, head].T
            torch.testing.assert_close(packed[:, :, part, head], own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.flatten(2), tokens @ attention.qkv.weight.T, rtol=1e-4, atol=1e-5)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fold(model)(image), model(image), rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        block = DTN(DTNConfig(partition="before", depth=1)).blocks[0]
    assert sum(p.numel() for p in block.parameters()) == 2_472_960 + 8  # a head's scale each
    assert 2_472_960 - 7 * 3 * 64**2 == 2_386_944, "with matrices that the heads share"


@pytest.mark.parametrize("kind", ["relu", "gelu", "none"])
def test_an_experts_activation(kind: str) -> None:
    torch.manual_seed(0)
    gate, x = MoEGate(dataclasses.replace(SMALL, expert_activation=kind)).eval(), torch.randn(2, 64, 3, 3)
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "none": lambda h: h}[kind]
    maps = []
    for e in range(2):
        hidden = act(torch.einsum("mc,bchw->bmhw", gate.w1[e], x) + gate.b1[e][:, None, None])
        maps.append((torch.einsum("m,bmhw->bhw", gate.w2[e], hidden) + gate.b2[e]).sigmoid())
    scaled = [a * gate.expert_scale[e].sigmoid() for e, a in enumerate(maps)]
    torch.testing.assert_close(gate(x), x * torch.maximum(*scaled).sigmoid()[:, None], rtol=1e-4, atol=1e-5)
    assert not torch.equal(gate.train()(x), gate(x)), "noise, whichever path computes it"


def test_the_noise_does_something() -> None:
    """By default it moves the gate's map by more than half of the map's own spread, five times as far as 0.1 did."""
    torch.manual_seed(0)
    config = DTNConfig()
    features = torch.nn.functional.max_pool2d(torch.randn(4, config.channels[-1], 16, 16).relu(), 2)
    gate = MoEGate(config)
    weights = [w.detach() for w in (gate.w1, gate.b1, gate.w2, gate.b2, gate.expert_scale)]
    scale = lambda noise: moe_gate(features, *weights, noise_std=noise, seed=1).mean(1) / features.mean(1)
    moved = lambda noise: float((scale(noise) - scale(0.0)).std() / scale(0.0).std())
    assert moved(config.noise_std) > 0.5
    assert moved(config.noise_std) > 5 * moved(0.1)


def test_mas_is_a_scale_per_head(small: DTN) -> None:
    """Gate by gate: a closed head adds nothing, and without MAS the gates are exactly one."""
    attention = small.blocks[0].attention
    tokens = torch.randn(1, 4, 64)
    with torch.no_grad():
        attention.head_scale.copy_(torch.tensor([-1e4, 1e4]))  # sigmoid: 0 and 1
        half = attention(tokens)
        attention.out.weight[:, :32] = 123.0  # the columns of the closed head
        assert torch.equal(attention(tokens), half)
    plain = DTN(dataclasses.replace(SMALL, mas=False)).eval()
    assert not [name for name, _ in plain.named_parameters() if name.endswith("head_scale")]
    assert plain.blocks[0].attention.head_scale.sigmoid().tolist() == [1.0, 1.0]
    assert plain(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 0},
        {"expert_kernel": 3},
        {"depth": 0},
        {"local_connection": False},
        {"partition": "before"},
        {"expert_activation": "gelu"},
    ],
)
def test_every_variant_trains(change: dict[str, int]) -> None:
    model = DTN(dataclasses.replace(SMALL, **change)).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 100},
        {"num_heads": 3},
        {"channels": (1, 2)},
        {"expert_hidden": 20},
        {"noise_std": -1.0},
        {"noise_strength": -1.0},
        {"expert_activation": "x"},
        {"partition": "x"},
    ],
)
def test_wrong_configuration_is_named(change: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_save_and_load(small: DTN, tmp_path: Path) -> None:
    small.notice = "a notice"
    small.save_pretrained(tmp_path)
    again = DTN.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), small(image))
    assert (again.config, again.notice, again.training) == (small.config, "a notice", False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_unfitting_files_are_named(small: DTN, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="another preset"):
        DTN.from_pretrained(tmp_path, DTNConfig.preset("tiny"))
    (tmp_path / "config.json").write_text(DTNConfig.preset("tiny").to_json())
    with pytest.raises(UsageError, match=r"model\.safetensors.*another preset"):
        DTN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    with pytest.raises(UsageError, match=r"config\.json.*colour"):
        DTN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(SMALL.to_json())
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 not weights")
    with pytest.raises(UsageError, match="not a safetensors file"):
        DTN.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        DTN.from_pretrained(tmp_path / "nowhere")


def test_a_flipped_bit_is_found(small: DTN, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    right = weights.read_bytes()
    for place in (-1, -9000):
        weights.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[len(right) + place + 1 :])
        with pytest.raises(UsageError, match=r"model\.safetensors: damaged .*; copy or train the model again"):
            DTN.from_pretrained(tmp_path)
    weights.write_bytes(right)
    (tmp_path / "config.json").write_text(dataclasses.replace(SMALL, mas_init=1.0).to_json())
    with pytest.raises(UsageError, match=r"config\.json: damaged"):
        DTN.from_pretrained(tmp_path)
    save_file(load_file(weights), weights)  # without checksums, as earlier versions
    assert DTN.from_pretrained(tmp_path).config.mas_init == 1.0


def test_a_configuration_of_any_size_takes_no_memory(small: DTN, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    weights, wide = (
        tmp_path / "model.safetensors",
        dataclasses.replace(SMALL, channels=(60_000, 60_000, 60_000, 60_000, 64)),
    )
    (tmp_path / "config.json").write_text(wide.to_json())
    with pytest.raises(UsageError, match="another preset or configuration"):  # and not of 400 GB
        DTN.from_pretrained(tmp_path)
    save_file(load_file(weights), weights)  # without checksums, as earlier versions
    with pytest.raises(UsageError, match="another preset or configuration"):
        DTN.from_pretrained(tmp_path)


def test_equal_weights_are_equal_files(small: DTN, tmp_path: Path) -> None:
    contents = set[bytes]()
    for _ in range(12):  # safetensors orders its metadata in another way each time
        small.save_pretrained(tmp_path)
        contents.add((tmp_path / "model.safetensors").read_bytes())
    assert len(contents) == 1
    assert load_file(tmp_path / "model.safetensors").keys() == small.state_dict().keys()


@pytest.mark.parametrize("change", ["frozen", "momentum None", "momentum 1", "no running statistics"])
def test_a_bn_that_was_changed_is_computed_as_torch_computes_it(change: str) -> None:
    torch.manual_seed(0)
    plain = DTN(DTNConfig.preset("tiny", image_size=64)).backbone.train()
    for norm in (layer for layer in plain if isinstance(layer, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        if change == "frozen":
            norm.eval()
        elif change.startswith("momentum"):
            norm.momentum = None if change.endswith("None") else 1.0
        else:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    ours, images = copy.deepcopy(plain), torch.randn(4, 3, 64, 64)
    for _ in range(2):
        assert torch.equal(Backbone.forward(ours, images), nn.Sequential.forward(plain, images))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize("pad", [False, True])
def test_training_leaves_the_convolutions_bias_out_and_changes_nothing_else(pad: bool, monkeypatch) -> None:
    """Against the same layers called one after another, in float64: values, gradients, running statistics."""
    torch.manual_seed(0)
    plain = DTN(DTNConfig.preset("tiny", image_size=64)).backbone.double().train()
    ours = copy.deepcopy(plain)
    ours.pad_input = pad  # type: ignore[assignment]
    images, results, added = torch.randn(4, 3, 64, 64, dtype=torch.float64), [], []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: added.append(a[2] is not None) or convolve(*a, **k))
    for layers, forward in ((plain, nn.Sequential.forward), (ours, Backbone.forward)):
        x = images.clone().requires_grad_()
        added.clear()
        y = forward(layers, x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()))
    assert added
    assert not any(added), "a bias was added"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)
    for layer in ours:
        if isinstance(layer, nn.Conv2d):
            assert torch.equal(layer.bias.grad, torch.zeros_like(layer.bias))
    torch.testing.assert_close(ours.eval()(images), plain.eval()(images), rtol=1e-9, atol=1e-11)
