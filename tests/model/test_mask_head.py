"""The mask head: beside the logits, which it leaves alone to the bit; folded, saved, of other detectors."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SMALL
from torch import Tensor

from dtn_fast import DTN, DTNConfig
from dtn_fast.errors import UsageError
from dtn_fast.model import backbone
from dtn_fast.model.build import TimmDetector, build_detector, load_detector
from dtn_fast.model.config import ModelConfig, TimmConfig, mask_side
from dtn_fast.model.detector import Detector
from dtn_fast.model.fold import fold
from dtn_fast.model.mask_head import WithMask
from dtn_fast.runtime.config import Runtime
from dtn_fast.runtime.torch_scorer import TorchScorer

MASKED = dataclasses.replace(SMALL, mask_head=True)
CROPS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def made(config: ModelConfig) -> tuple[Detector, torch.Tensor]:
    """A detector, and the number that torch draws after it."""
    torch.manual_seed(5)
    return build_detector(config), torch.rand(1)


def lively(config: ModelConfig = MASKED) -> Detector:
    """A detector whose masks differ from crop to crop."""
    model, _ = made(config)
    for _ in range(3):
        model.train()(torch.randn(8, 3, 64, 64))
    assert model.mask_head is not None
    with torch.no_grad():
        model.mask_head.out.weight.mul_(100)
    return model.eval()


@pytest.mark.parametrize("config", [SMALL, TimmConfig("resnet10t", 64), TimmConfig("vit_tiny_patch16_224", 64)])
def test_the_head_changes_neither_the_other_weights_nor_the_logits(config: ModelConfig) -> None:
    (plain, after), (masked, after_masked) = made(config), made(dataclasses.replace(config, mask_head=True))
    assert torch.equal(after, after_masked), "torch's generator is where it was"
    own, other = plain.state_dict(), masked.state_dict()
    assert {name for name in other if name not in own} == {n for n in other if n.startswith("mask_head.")} != set()
    assert all(torch.equal(own[name], other[name]) for name in own)
    images = torch.randn(4, 3, 64, 64)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = plain.train(mode)(images)
        torch.manual_seed(1)
        logits, mask = WithMask(masked.train(mode), masked)(images)
        assert torch.equal(logits, expected)
        assert mask.shape == (4, 8, 8)
    mask.sum().backward()
    assert all(p.grad is not None for p in masked.mask_head.parameters())
    assert copy.deepcopy(masked)(images).shape == (4, 2), "a copy's hooks do nothing"


def test_it_has_less_than_a_hundredth_of_the_paper_s_parameters() -> None:
    with torch.device("meta"):
        model = DTN(DTNConfig(mask_head=True))
    assert model.mask_head is not None
    head = sum(p.numel() for p in model.mask_head.parameters())
    assert (head, sum(p.numel() for p in model.parameters()) - head) == (78_081, 29_945_206)


def test_folded_saved_and_traced_it_gives_the_same_masks(tmp_path: Path, monkeypatch) -> None:
    model = lively()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        mask = WithMask(model, model)(images)[1]
        assert mask.std() > 0.1
        folded = fold(model)
        torch.testing.assert_close(WithMask(folded, folded)(images)[1], mask, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = load_detector(tmp_path)
    with torch.inference_mode():
        assert torch.equal(WithMask(again, again)(images)[1], mask)
    plain = TorchScorer(model).judge(CROPS).mask
    assert plain is not None
    assert plain.shape == (3, mask_side(MASKED), mask_side(MASKED))
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)  # traces as any backend would, in seconds
    monkeypatch.setattr(torch, "compile", whole)
    np.testing.assert_allclose(TorchScorer(model, runtime=Runtime(mode="compile")).judge(CROPS).mask, plain, atol=1e-4)
    assert TorchScorer(model).outputs(CROPS).shape == (3, 2), "without the masks"
    assert TorchScorer(made(SMALL)[0]).judge(CROPS).mask is None


def test_the_mask_s_pixels_lie_where_the_crop_s_do() -> None:
    """The deep map goes straight through a head of ones: a light in the crop's corner is one in the mask's."""
    model = lively(dataclasses.replace(MASKED, depth=0, num_experts=0))
    dark, light = np.zeros((2, 1, 64, 64, 3), np.uint8)
    light[:, :20, 44:] = 255
    masks = [TorchScorer(model).judge(crop).mask for crop in (dark, light)]
    change = np.abs(masks[1] - masks[0])[0]
    row, column = np.unravel_index(change.argmax(), change.shape)
    assert row < 4 <= column


def test_a_model_without_a_map_and_a_wrong_setting_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(TimmDetector, "mask_layers", lambda self: [])
    with pytest.raises(UsageError, match="resnet10t: has no feature map for a mask head; train it without"):
        TimmDetector(TimmConfig("resnet10t", 64, mask_head=True))
    with pytest.raises(UsageError, match=r"DTNConfig.mask_head is 1; it must be true or false"):
        dataclasses.replace(SMALL, mask_head=1)


def test_it_reads_the_pool_also_where_a_kernel_does_normalisation_relu_and_pool_at_once(monkeypatch) -> None:
    """As on a GPU in training, here with a stand-in for the kernel."""

    def at_once(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps).relu()
        fused.append(pool)
        return F.max_pool2d(y, 2) if pool else y, x.mean((0, 2, 3)), x.var((0, 2, 3))

    fused = list[bool]()
    images, model = torch.randn(4, 3, 64, 64), lively(dataclasses.replace(MASKED, noise_std=0.0)).train()
    expected = WithMask(model, model)(images)
    monkeypatch.setattr(backbone, "fuses_bn", lambda x, pool: True)
    monkeypatch.setattr(backbone, "bn_relu", at_once)
    for found, wanted in zip(WithMask(model, model)(images), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert fused == [True, True, False, True, True], "the third group's pool runs by itself"
