"""Parameters and multiply-accumulates, whole and by the paper's way of counting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dtn_fast.config import DTNConfig
from dtn_fast.dtn import DTN
from dtn_fast.moe import MoEGate

RAW = ("pos_embed", "head_scale", "expert_scale")  # parameters outside any layer, which thop leaves out


class Count(NamedTuple):
    parameters: int
    """Every parameter."""
    layer_parameters: int
    """The paper's way (thop): those of convolutions, linear and norm layers."""
    macs: int
    """Multiply-accumulates per image the paper's way (thop): convolutions and linears, four operations per element of
    an affine batch norm, no attention products."""
    attention_macs: int
    """The two products inside attention, which thop does not see."""


def count(config: DTNConfig) -> Count:
    """Counts a DTN of ``config`` without allocating it (meta tensors)."""
    with torch.device("meta"):
        model = DTN(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
    total = {"macs": 0}

    def add(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            total["macs"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total["macs"] += output.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d):
            total["macs"] += 4 * output.numel()
        elif isinstance(module, MoEGate):
            total["macs"] += (module.w1.numel() + module.w2.numel()) * output[0, 0].numel()

    for module in model.modules():
        module.register_forward_hook(add)
    model(images)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tokens = (config.image_size // 32) ** 2
    return Count(
        parameters=sum(sizes.values()),
        layer_parameters=sum(size for name, size in sizes.items() if not name.endswith(RAW)),
        macs=total["macs"],
        attention_macs=config.depth * 2 * tokens**2 * config.channels[-1],
    )
