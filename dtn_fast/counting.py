"""Parameters and multiply-accumulates, whole and by the paper's way of counting (thop's)."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtn_fast.config import DTNConfig
from dtn_fast.dtn import DTN
from dtn_fast.moe import MoEGate

NORMS = (nn.BatchNorm2d, nn.LayerNorm)


class Count(NamedTuple):
    parameters: int
    """Every parameter."""
    layer_parameters: int
    """The paper's way (thop): those of convolutions, linear and norm layers."""
    macs: int
    """Multiply-accumulates per image the paper's way (thop): convolutions and linears, four operations per element of
    an affine norm, no attention products."""
    attention_macs: int
    """The two products inside attention, which thop does not see; of a DTN alone, else 0."""


def count(config: DTNConfig) -> Count:
    """Counts a DTN of ``config`` without allocating it (meta tensors)."""
    with torch.device("meta"):
        model = DTN(config).eval()
    tokens = (config.image_size // 32) ** 2
    whole = count_layers(model, config.image_size)
    return Count(*whole[:3], attention_macs=config.depth * 2 * tokens**2 * config.channels[-1])


def count_layers(
    model: nn.Module, size: int, unseen: Collection[nn.Module] = (), softmax: Collection[nn.Module] = ()
) -> Count:
    """Counts ``model`` on one image [1, 3, size, size] on its device.

    unseen: modules of classes that thop does not know; it sees neither their parameters nor their products.
    softmax: attention modules whose softmax it counts, as a module of its own: 3 n - 1 operations a row of n.
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
    handles = [layer.register_forward_hook(add) for layer in layers]
    handles += [module.register_forward_hook(add_softmax) for module in softmax]
    device = next(model.parameters()).device
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    seen = sum(
        p.numel() for layer in layers for name, p in layer.named_parameters(recurse=False) if name != "expert_scale"
    )
    return Count(sum(p.numel() for p in model.parameters()), seen, macs, 0)
