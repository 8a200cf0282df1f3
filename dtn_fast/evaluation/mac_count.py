"""Counts of parameters and multiply-accumulates, in total and as the paper counts them (with thop)."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtn_fast.evaluation.paper_numbers import TABLE8_SIZES
from dtn_fast.model.config import DTNConfig
from dtn_fast.model.dtn import DTN
from dtn_fast.model.hooks import hooked
from dtn_fast.model.moe_gate import MoEGate

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


class Count(NamedTuple):
    parameters: int
    """Number of all parameters."""
    layer_parameters: int
    """Parameters as thop counts them: those of convolutions, linear and norm layers."""
    macs: int
    """Multiply-accumulates per image as thop counts them: convolutions and linear layers, four operations per element
    of an affine norm, no attention products."""
    attention_macs: int
    """Multiply-accumulates of the two products inside a DTN's attention or state space, which thop does not count; 0
    for others."""


@functools.cache
def count(config: DTNConfig) -> Count:
    """Counts a DTN of ``config`` without allocating it (meta tensors)."""
    with torch.device("meta"):
        model = DTN(config).eval()
    tokens = (config.image_size // 32) ** 2
    whole = count_layers(model, config.image_size)
    width = config.channels[-1]
    products = 2 * width if config.mixer == "attention" else width + config.state_size
    return Count(*whole[:3], attention_macs=config.depth * products * tokens**2)


def count_layers(
    model: nn.Module, size: int, unseen: Collection[nn.Module] = (), softmax: Collection[nn.Module] = ()
) -> Count:
    """Counts ``model`` on one image [1, 3, size, size] on its device.

    unseen: modules of classes that thop does not know, so that it counts neither their parameters nor their products.
    softmax: attention modules whose softmax is a module, which thop counts: 3 n - 1 operations per row of n.
    """
    hidden = {id(module) for module in unseen}
    macs = 0

    def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        elif isinstance(module, NORMS):
            macs += 4 * output.numel()
        elif isinstance(module, MoEGate):
            macs += (module.w1.numel() + module.w2.numel()) * output[0, 0].numel()

    def add_softmax(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        tokens = given[0].shape[1]
        macs += int(module.heads) * tokens * (3 * tokens - 1)  # type: ignore[arg-type]

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, *NORMS, MoEGate))]
    layers = [m for m in layers if id(m) not in hidden]
    hooks = [*((layer, add) for layer in layers), *((module, add_softmax) for module in softmax)]
    with hooked(model, hooks), torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    seen = sum(
        p.numel() for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "expert_scale"
    )
    return Count(sum(p.numel() for p in model.parameters()), seen, macs, 0)


# ------------------------------------------------------------------------------------------------ Table 8


class Table8(NamedTuple):
    model: str
    parameters: float
    """Millions of parameters, as the paper counts them."""
    gmacs: float
    paper_parameters: float
    paper_gmacs: float


@functools.cache
def table8(name: str) -> Table8:
    """Counts a model of TABLE8_SIZES at 224x224 as the paper counts (with thop), without allocating it.

    thop misses EfficientNet's convolutions (a class of their own in the published code) and modules that are not
    called.  EfficientViT and CrossEfficientViT are counted with the single logit of their published code.  Of all
    attention modules thop counts only ViT's softmax.
    """

    from dtn_fast.model.baselines import FAMILIES, Attention, timm

    family = next(f for f in sorted(FAMILIES, key=len, reverse=True) if name.startswith(f))
    efficient = "efficient" in family
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1 if efficient else 2)
    bodies = [m for m in (getattr(model, "backbone", None), getattr(model, "early", None)) if m is not None]
    unseen = [m for body in bodies for m in body.modules() if isinstance(m, nn.Conv2d)] if efficient else []
    softmax = [m for m in model.modules() if isinstance(m, Attention)] if family == "vit_b16" else []
    found = count_layers(model, 224, unseen, softmax)
    return Table8(name, found.layer_parameters / 1e6, found.macs / 1e9, *TABLE8_SIZES[name])
