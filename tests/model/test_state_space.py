"""The state space: by its recurrence, in both directions, inside a DTN, folded and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import SMALL
from torch import Tensor

from dtn_fast import DTN
from dtn_fast.errors import UsageError
from dtn_fast.evaluation.mac_count import count
from dtn_fast.export.to_onnx import export_onnx
from dtn_fast.model.fold import fold
from dtn_fast.model.state_space import StateSpace
from dtn_fast.runtime.load import load_scorer

MAMBA = dataclasses.replace(SMALL, mixer="mamba", state_size=8, depth=2)


def scanned(layer: StateSpace, x: Tensor, begin: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """Both directions' scans, token by token, in float64: x [B, N, H, D] -> the same."""
    steps = F.softplus(step.unflatten(2, (2, -1)) + layer.step.double())  # [B, N, 2, H]
    y = torch.zeros_like(x)
    for direction, order in enumerate((range(x.shape[1]), reversed(range(x.shape[1])))):
        state = x.new_zeros(x.shape[0], x.shape[2], begin.shape[2], x.shape[3])  # [B, H, S, D]
        for t in order:
            d = steps[:, t, direction]
            keep = torch.exp(-layer.decay[direction].double().exp() * d)
            state = keep[..., None, None] * state + torch.einsum("bh,bs,bhd->bhsd", d, begin[:, t], x[:, t])
            y[:, t] += torch.einsum("bs,bhsd->bhd", end[:, t], state)
    return y


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_the_product_is_the_scan(tokens: int) -> None:
    torch.manual_seed(0)
    layer = StateSpace(32, 4, 8, True, 0.0)
    with torch.no_grad():
        layer.step.add_(3)  # steps of about 0.1 to 2: what is cut away would be up to e^2000
    x, begin, end, step = (torch.randn(2, tokens, size) for size in (32, 8, 8, 8))
    heads = x.unflatten(2, (4, 8))
    expected = scanned(layer, *(t.double() for t in (heads, begin, end, step)))
    found = torch.einsum("bhts,bshd->bthd", layer.matrix(begin, end, step), heads)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_and_reach_everything() -> None:
    torch.manual_seed(0)
    layer = StateSpace(32, 4, 8, True, 0.0)
    with torch.no_grad():
        layer.step.add_(8)
    layer(torch.randn(2, 64, 32)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_closed_head_adds_nothing() -> None:
    torch.manual_seed(0)
    layer, x = StateSpace(32, 4, 8, True, 0.0), torch.randn(2, 5, 32)
    with torch.no_grad():
        layer.scale.head_scale[1] = -1e4
        before = layer(x)
        layer.out.weight[:, 8:16] = 123.0
        assert torch.equal(layer(x), before)


def test_a_dtn_of_state_spaces(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DTN(MAMBA)
    for _ in range(3):
        model.train()(torch.randn(4, 3, 64, 64))  # running statistics
    model.eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(images), model(images), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(DTN.from_pretrained(tmp_path)(images), model(images))
    plain = DTN(dataclasses.replace(MAMBA, mas=False))
    assert not [name for name, _ in plain.named_parameters() if "head_scale" in name]
    known = count(MAMBA)
    assert known.attention_macs == 2 * 4**2 * (64 + 8)
    assert known.macs < count(dataclasses.replace(MAMBA, mixer="attention")).macs


def test_it_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DTN(MAMBA).eval()
    export_onnx(model, tmp_path / "m.onnx")
    crops = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8).numpy()
    model.save_pretrained(tmp_path / "m")
    found, expected = (load_scorer(tmp_path / name).logits(crops) for name in ("m.onnx", "m"))
    assert abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("change", [{"mixer": "rnn"}, {"state_size": 0}, {"partition": "before"},
                                    {"reattention": True, "mas": False}])  # fmt: skip
def test_wrong_settings_are_named(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"DTNConfig.{next(iter(change))} is"):
        dataclasses.replace(MAMBA, **change)
