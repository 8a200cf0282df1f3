"""Folding changes no answer: whole models and every layer, in float64 with random statistics."""

from __future__ import annotations

import pytest
import torch
from small import SMALL
from torch import Tensor, nn

from dtn_fast import DTN, DTNConfig
from dtn_fast.model.fold import FoldedBlock, fold
from dtn_fast.model.levt import LEVTBlock

CONFIGS = {
    "small": SMALL,
    "tiny": DTNConfig.preset("tiny"),
    "no local connection": DTNConfig.preset("tiny", local_connection=False),
    "no MAS": DTNConfig.preset("tiny", mas=False),
    "Re-attention": DTNConfig.preset("tiny", mas=False, reattention=True),
    "3x3 experts": DTNConfig.preset("tiny", expert_kernel=3, num_experts=3),
    "no gate": DTNConfig.preset("tiny", num_experts=0),
}


def lived_in(config: DTNConfig, seed: int = 0) -> DTN:
    """A float64 model whose every statistic, weight and scale is random."""
    torch.manual_seed(seed)
    model = DTN(config).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.normal_(module.bias)
    for name, parameter in model.named_parameters():
        if "scale" in name:
            nn.init.normal_(parameter, std=2)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("attention", ["native", "kernel"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits(name: str, attention) -> None:
    model = lived_in(CONFIGS[name])
    folded = fold(model, attention)
    side = model.config.image_size
    with torch.no_grad():
        for size in (side, side + 32):
            images = torch.randn(3, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
            assert relative(folded(images), model(images)) < 1e-10
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert folded.head.weight.data_ptr() != model.head.weight.data_ptr(), "a copy"


@pytest.mark.parametrize("name", CONFIGS)
def test_same_answer_layer_by_layer(name: str) -> None:
    model = lived_in(CONFIGS[name], seed=1)
    folded = fold(model)
    x = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    before, after = x, x
    position = 0
    with torch.no_grad():
        for layer in model.backbone:
            before = layer(before)
            if isinstance(layer, nn.Conv2d):
                continue  # its BN is the next
            after = folded.backbone[position](after)
            assert relative(after, before) < 1e-10
            position += 1
            after = before
        assert position == len(folded.backbone)
        assert torch.equal(folded.gate(before), model.gate(before))
        for old, new in zip(model.blocks, folded.blocks, strict=True):
            assert isinstance(old, LEVTBlock)
            assert isinstance(new, FoldedBlock)
            x = torch.randn(2, model.num_features, 4, 6, dtype=torch.float64)
            assert relative(new(x), old(x)) < 1e-10


def test_head_scales_and_norms_leave_no_parameter_behind() -> None:
    model = DTN(DTNConfig.preset("paper"))
    names = [name for name, _ in fold(model).named_parameters()]
    assert not [name for name in names if "norm" in name or "head_scale" in name]
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in fold(model).parameters())
    # gone: gamma and beta of 17 + 4 * 6 norms, the head scales; new: the bias of each qkv product
    norms = sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert saved == norms + 6 * 8 - 6 * 3 * 512


def test_single_precision_keeps_its_accuracy() -> None:
    model = lived_in(DTNConfig.preset("tiny"))
    images = torch.randn(4, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        exact, single = model(images), model.float()(images.float())
        folded = fold(model)(images.float())
    assert folded.dtype == torch.float32
    assert relative(folded.double(), exact) < 4 * relative(single.double(), exact) + 1e-6


def test_a_training_model_folds_as_in_eval_mode_and_is_left_alone() -> None:
    model = lived_in(SMALL).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        folded = fold(model)(images)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert relative(folded, model.eval()(images)) < 1e-10
